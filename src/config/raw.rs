//! What the user wrote, before it is judged: the keys of the file and of `--set`, each with the place it comes from.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Faults, SECTIONS, find, foreign};
use crate::error::{Error, Fault, Result};

/// Keys that say the same thing in two ways: at most one of them holds, and the first where neither is given.
pub(super) const EITHER: [(&str, &str); 2] =
    [("train.epochs", "train.max_steps"), ("train.warmup_ratio", "train.warmup_steps")];

/// The known keys that were given.
#[derive(Default)]
pub(super) struct Raw {
    file: String,
    given: BTreeMap<&'static str, Given>,
}

/// A value and where it was given.
#[derive(Debug, Clone)]
pub(super) struct Given {
    pub(super) value: Value,
    origin: Origin,
}

#[derive(Debug, Clone)]
enum Origin {
    /// On a line of the file, counted from 1.
    File(usize),
    /// In a `--set`: the whole argument, and the value as it was typed.
    Set { argument: String, typed: String },
}

/// A TOML value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Text(String),
    Integer(i128),
    Float(f64),
    Bool(bool),
    List(Vec<Value>),
    /// A date or a table, by name: no key takes one.
    Other(&'static str),
}

impl Value {
    /// The value in JSON.
    pub(super) fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Text(text) => text.as_str().into(),
            Self::Integer(number) => match u64::try_from(*number) {
                Ok(number) => number.into(),
                Err(_) => (*number as i64).into(),
            },
            Self::Float(number) => (*number).into(),
            Self::Bool(truth) => (*truth).into(),
            Self::List(items) => items.iter().map(Self::to_json).collect(),
            Self::Other(_) => serde_json::Value::Null,
        }
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "the text {text:?}"),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number:?}"),
            Self::Bool(truth) => write!(f, "{truth}"),
            Self::List(items) if items.is_empty() => write!(f, "an empty list"),
            Self::List(_) => write!(f, "a list"),
            Self::Other(name) => write!(f, "a {name}"),
        }
    }
}

impl Given {
    /// What is typed for a key: a TOML value, or a text where it is none.
    pub(super) fn typed(typed: &str) -> Self {
        let value = match DeValue::parse(typed) {
            Ok(value) => to_value(value.get_ref()),
            Err(_) => Value::Text(typed.to_owned()),
        };
        Self { value, origin: Origin::File(usize::MAX) }
    }

    /// Gives the value as text: a `--set` value that only looks like a number or a date is the text it was typed as.
    pub(super) fn text(&self) -> Option<&str> {
        match (&self.value, &self.origin) {
            (Value::Text(text), _) => Some(text),
            (Value::List(_), _) | (_, Origin::File(_)) => None,
            (_, Origin::Set { typed, .. }) => Some(typed),
        }
    }

    /// Whether it came from the command line.
    pub(super) fn is_set(&self) -> bool {
        matches!(self.origin, Origin::Set { .. })
    }

    /// The line of the file, for ordering a report.
    pub(super) fn line(&self) -> usize {
        match self.origin {
            Origin::File(line) => line,
            Origin::Set { .. } => usize::MAX,
        }
    }
}

impl Raw {
    /// Gives what was said of a key.
    pub(super) fn get(&self, key: &str) -> Option<&Given> {
        self.given.get(key)
    }

    /// Says a text of a key, in place of what the file says.
    pub(super) fn put(&mut self, key: &'static str, text: String) {
        let line = self.given.get(key).map_or(1, Given::line);
        self.given.insert(key, Given { value: Value::Text(text), origin: Origin::File(line) });
    }

    /// Forgets a key that another one overrides.
    pub(super) fn remove(&mut self, key: &str) {
        self.given.remove(key);
    }

    /// Gives the keys that hold.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'static str> {
        self.given.keys().copied()
    }

    /// Names the place of a key for a message: where it was given, or the file that lacks it.
    pub(super) fn place(&self, key: &str) -> String {
        match self.given.get(key).map(|given| &given.origin) {
            Some(Origin::File(line)) => format!("{}:{line}: {key}", self.file),
            Some(Origin::Set { argument, .. }) => format!("--set {argument}"),
            None => format!("{}: {key}", self.file),
        }
    }

    /// Puts the `--set` arguments over the file, the later over the earlier.
    pub(super) fn apply_sets(&mut self, sets: &[String], faults: &mut Faults) {
        for argument in sets {
            let place = format!("--set {argument}");
            let Some((key, typed)) = argument.split_once('=') else {
                let fault = Fault::new(place, "expected section.key=value");
                faults.add(usize::MAX, fault.hint("for example --set train.learning_rate=1e-4"));
                continue;
            };
            let (key, typed) = (key.trim(), typed.trim());
            let Some(key) = find(key).map(|known| known.name) else {
                let (section, name) = key.split_once('.').unwrap_or(("", key));
                foreign::unknown_key(place, usize::MAX, section, name, faults);
                continue;
            };
            let origin = Origin::Set { argument: argument.clone(), typed: typed.to_owned() };
            self.given.insert(key, Given { origin, ..Given::typed(typed) });
            if let Some(twin) = twin_of(key) {
                self.remove(twin);
            }
        }
    }
}

fn twin_of(key: &str) -> Option<&'static str> {
    EITHER.into_iter().find_map(|(a, b)| if a == key { Some(b) } else { (b == key).then_some(a) })
}

/// Reads the text of a config file. Unknown keys become faults; a text that is no TOML is an error of its own, because
/// nothing in it can be judged.
pub(super) fn read(text: &str, file: &str, faults: &mut Faults) -> Result<Raw> {
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        return Err(syntax_error(text, file, &errors));
    }
    let mut raw = Raw { file: file.to_owned(), given: BTreeMap::new() };
    for (name, value) in table.get_ref() {
        let line = line_of(text, &name.span());
        let name: &str = name.get_ref();
        match value.get_ref() {
            DeValue::Table(entries) => read_section(&mut raw, text, name, line, entries, faults),
            _ if SECTIONS.contains(&name) => {
                let fault = Fault::new(format!("{file}:{line}: {name}"), "this is a section, not a key");
                faults.add(line, fault.hint(format!("write a line [{name}] and its keys below it")));
            }
            _ => foreign::unknown_key(format!("{file}:{line}: {name}"), line, "", name, faults),
        }
    }
    for (a, b) in EITHER {
        if let (Some(first), Some(second)) = (raw.get(a), raw.get(b)) {
            let line = first.line().max(second.line());
            let (_, other) = b.split_once('.').unwrap_or(("", b));
            let what = format!("{other} says the same in another way, and both are given");
            faults.add(line, Fault::new(raw.place(a), what).hint(format!("keep one of {a} and {b}")));
        }
    }
    Ok(raw)
}

fn read_section(raw: &mut Raw, text: &str, name: &str, line: usize, entries: &DeTable<'_>, faults: &mut Faults) {
    let section = match SECTIONS.iter().find(|known| **known == name) {
        Some(section) => section,
        None => {
            let place = format!("{}:{line}: [{name}]", raw.file);
            let meant = foreign::meant_section(name);
            let hint = match meant {
                Some(meant) => format!("call it [{meant}]"),
                None => "the sections are [model], [lora], [data] and [train]".to_owned(),
            };
            faults.add(line, Fault::new(place, "unknown section").hint(hint));
            meant.unwrap_or(name)
        }
    };
    for (key, value) in entries {
        let line = line_of(text, &key.span());
        let key: &str = key.get_ref();
        match find(&format!("{section}.{key}")) {
            Some(known) => {
                let given = Given { value: to_value(value.get_ref()), origin: Origin::File(line) };
                raw.given.entry(known.name).or_insert(given);
            }
            None => foreign::unknown_key(format!("{}:{line}: {name}.{key}", raw.file), line, section, key, faults),
        }
    }
}

fn to_value(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::Other("number too large to count with"),
        },
        DeValue::Float(number) => Value::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(truth) => Value::Bool(*truth),
        DeValue::Array(items) => Value::List(items.iter().map(|item: &Spanned<_>| to_value(item.get_ref())).collect()),
        DeValue::Datetime(_) => Value::Other("date"),
        DeValue::Table(_) => Value::Other("table"),
    }
}

/// Gives the line, counted from 1, on which a span begins.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count()
}

fn syntax_error(text: &str, file: &str, errors: &[toml::de::Error]) -> Error {
    if let Some(format) = other_format(text, file) {
        return Error::invalid(file, format!("this is {format}, and a config of Bellora is TOML")).hint(
            "write sections and keys like this: [data] on one line, max_length = 512 below it; README.md has a config",
        );
    }
    let faults = errors.iter().map(|error| {
        let place = match error.span() {
            Some(span) => format!("{file}:{}", line_of(text, &span)),
            None => file.to_owned(),
        };
        let hint = "TOML wants key = value, texts in \"quotes\", lists in [brackets], true and false in lower case, \
                    each section and key once";
        Fault::new(place, format!("not valid TOML: {}", error.message())).hint(hint)
    });
    Error::Invalid(faults.collect())
}

/// Names the format of a text that is not TOML, if it is one that other trainers use.
fn other_format(text: &str, file: &str) -> Option<&'static str> {
    let extension = Path::new(file).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'))?;
    let yaml_key = |line: &str| line.split_once(':').is_some_and(|(key, _)| !key.contains(['=', '[', '"']));
    match () {
        () if first.starts_with('{') || extension == "json" => Some("JSON"),
        () if matches!(extension, "yaml" | "yml") || first.starts_with("---") || yaml_key(first) => Some("YAML"),
        () if extension == "py" || first.starts_with("import ") || first.starts_with("from ") => Some("Python"),
        () if text.starts_with("#!") || first.starts_with("--") => Some("a shell command"),
        () => None,
    }
}
