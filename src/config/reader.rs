//! Reads single keys into values of the right type and range, noting a fault where there is one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::choices::Choice;
use super::problem::Checked;
use super::raw::{Given, Raw, Value};
use super::{Auto, Config, Faults, FileKeys, TemplateChoice, foreign, paths};
use crate::error::Fault;

/// Tokens that a micro-batch may hold: they are counted in 32 bits.
const MOST_TOKENS: u64 = 1 << 31;

/// Reads single keys. Each method gives `None` for a key that was not given, and for one at fault after noting it.
pub(super) struct Reader<'a> {
    pub(super) raw: Raw,
    pub(super) file_keys: FileKeys,
    pub(super) faults: &'a mut Faults,
    /// The keys at fault so far.
    pub(super) faulty: BTreeSet<String>,
    /// Faults that say nothing of what to do yet: their keys, and their places among the faults.
    pub(super) without_hint: Vec<(String, usize)>,
    /// What may not be what the user means, though it is no fault.
    pub(super) warnings: Vec<Fault>,
}

impl Reader<'_> {
    pub(super) fn fault(&mut self, key: &str, fault: Fault) {
        let line = self.raw.get(key).map_or(usize::MAX, Given::line);
        if fault.hint.is_empty() {
            self.without_hint.push((key.to_owned(), self.faults.found.len()));
        }
        self.faults.add(line, fault);
        self.faulty.insert(key.to_owned());
    }

    /// Names the default of each key whose fault says nothing of what to do; `config` has it, for want of a good value.
    pub(super) fn name_defaults(&mut self, config: &Config) {
        let entries = config.entries();
        for (key, index) in std::mem::take(&mut self.without_hint) {
            let default = entries.iter().find(|(of, value)| *of == key && !["\"\"", "[]"].contains(&value.as_str()));
            self.faults.found[index].1.hint = match default {
                Some((_, value)) => format!("leave it out for the default, {value}"),
                None => "leave it out, or write another value".to_owned(),
            };
        }
    }

    /// Whether the value of a key is what the user meant: neither a default in place of a faulty one, nor of one given
    /// under another name.
    pub(super) fn is_sure(&self, key: &str) -> bool {
        !self.faulty.contains(key) && !self.faults.proposed.contains(key)
    }

    /// Notes that a key holds something else than what it must; gives `None`, for the caller to return.
    fn unexpected<T>(&mut self, key: &str, expected: &str, found: &Value) -> Option<T> {
        let fault = Fault::new(self.raw.place(key), format!("expected {expected}, found {found}"));
        let hint = match found {
            Value::Text(text)
                if text.parse::<f64>().is_ok_and(f64::is_finite) || matches!(&**text, "true" | "false") =>
            {
                format!("write {text} without quotes")
            }
            _ if ["model.base", "data.train", "train.output"].contains(&key) => {
                "write a path in quotes: this key has no default".to_owned()
            }
            _ => String::new(),
        };
        self.fault(key, fault.hint(hint));
        None
    }

    /// Notes that a required file is missing, unless it is there and faulty or a hint has already named it.
    pub(super) fn missing(&mut self, key: &'static str, example: &str) {
        let is_required = self.file_keys == FileKeys::Required && !self.faults.proposed.contains(key);
        if self.raw.get(key).is_none() && is_required {
            let section = key.split_once('.').map_or(key, |(section, _)| section);
            let fault = Fault::new(self.raw.place(key), "this key is required and was not given");
            self.fault(key, fault.hint(format!("write {example} under [{section}]")));
        }
    }

    fn value(&self, key: &str) -> Option<Value> {
        self.raw.get(key).map(|given| given.value.clone())
    }

    pub(super) fn bool(&mut self, key: &str) -> Option<bool> {
        match self.value(key)? {
            Value::Bool(truth) => Some(truth),
            other => self.unexpected(key, "true or false", &other),
        }
    }

    /// A whole number of a range. The run's own config is TOML again, whose integers have 64 bits with a sign.
    pub(super) fn integer_up_to(&mut self, key: &str, least: u64, most: u64) -> Option<u64> {
        let found = self.value(key)?;
        let number = match found {
            Value::Integer(number) => Some(number),
            // 3.0 is 3: such files are often written by programs that know only floats.
            Value::Float(number) if number.fract() == 0.0 && number.abs() < 1e15 => Some(number as i128),
            _ => None,
        };
        match number {
            Some(number) if (i128::from(least)..=i128::from(most)).contains(&number) => Some(number as u64),
            _ => {
                let at_most = if most < i64::MAX as u64 { format!(" and at most {most}") } else { String::new() };
                self.unexpected(key, &format!("a whole number of at least {least}{at_most}"), &found)
            }
        }
    }

    /// A list of whole numbers, sorted, each once.
    pub(super) fn integers(&mut self, key: &str, least: u64, most: u64) -> Option<Vec<u64>> {
        let found = self.value(key)?;
        let number = |item: &Value| match item {
            Value::Integer(number) => u64::try_from(*number).ok().filter(|number| (least..=most).contains(number)),
            _ => None,
        };
        let numbers = match &found {
            Value::List(items) => items.iter().map(number).collect::<Option<BTreeSet<u64>>>(),
            _ => None,
        };
        match numbers {
            Some(numbers) => Some(numbers.into_iter().collect()),
            None => {
                self.unexpected(key, &format!("a list of whole numbers of at least {least} and at most {most}"), &found)
            }
        }
    }

    pub(super) fn auto_integer(&mut self, key: &str) -> Auto<usize> {
        match self.value(key) {
            Some(Value::Text(text)) if text == "auto" => Auto::Auto,
            Some(found @ Value::Text(_)) => {
                self.unexpected(key, "\"auto\" or a whole number of at least 1", &found).unwrap_or(Auto::Auto)
            }
            _ => self.integer_up_to(key, 1, MOST_TOKENS).map_or(Auto::Auto, |number| Auto::Is(number as usize)),
        }
    }

    pub(super) fn auto_bool(&mut self, key: &str) -> Auto<bool> {
        match self.value(key) {
            None => Auto::Auto,
            Some(Value::Text(text)) if text == "auto" => Auto::Auto,
            Some(Value::Bool(truth)) => Auto::Is(truth),
            Some(other) => self.unexpected(key, "\"auto\", true or false", &other).unwrap_or(Auto::Auto),
        }
    }

    pub(super) fn float(&mut self, key: &str, expected: &str, is_valid: impl Fn(f64) -> bool) -> Option<f64> {
        let found = self.value(key)?;
        match as_float(&found) {
            Some(number) if is_valid(number) => Some(number),
            _ => self.unexpected(key, expected, &found),
        }
    }

    pub(super) fn share(&mut self, key: &str) -> Option<f64> {
        self.float(key, "a share of at least 0 and less than 1", |share| (0.0..1.0).contains(&share))
    }

    pub(super) fn betas(&mut self) -> Option<[f64; 2]> {
        let found = self.value("train.betas")?;
        if let Value::List(items) = &found
            && let [Some(first), Some(second)] = *items.iter().map(as_float).collect::<Vec<_>>()
            && [first, second].iter().all(|beta| (0.0..1.0).contains(beta))
        {
            return Some([first, second]);
        }
        self.unexpected(
            "train.betas",
            "a list of two numbers of at least 0 and less than 1, such as [0.9, 0.999]",
            &found,
        )
    }

    pub(super) fn choice<T: Choice>(&mut self, key: &str) -> Option<T> {
        self.word(key, T::WORDS)
    }

    pub(super) fn auto_choice<T: Choice>(&mut self, key: &str) -> Auto<T> {
        let auto = [("auto", Auto::Auto)].into_iter();
        let words: Vec<_> = auto.chain(T::WORDS.iter().map(|(word, value)| (*word, Auto::Is(*value)))).collect();
        self.word(key, &words).unwrap_or(Auto::Auto)
    }

    fn word<T: Copy>(&mut self, key: &str, words: &[(&str, T)]) -> Option<T> {
        let found = self.value(key)?;
        if let Value::Text(text) = &found
            && let Some((_, value)) = words.iter().find(|(word, _)| word == text)
        {
            return Some(*value);
        }
        let names: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let quoted: Vec<_> = names.iter().map(|word| format!("\"{word}\"")).collect();
        let fault = Fault::new(self.raw.place(key), format!("expected one of {}, found {found}", quoted.join(", ")));
        let text = match &found {
            Value::Bool(truth) => truth.to_string(),
            Value::Text(text) => text.clone(),
            _ => String::new(),
        };
        self.fault(key, fault.hint(foreign::value_hint(key, &text, &names).unwrap_or_default()));
        None
    }

    /// Reads a list of texts of any kind; one by itself is a list of one.
    pub(super) fn texts(&mut self, key: &str) -> Option<Vec<String>> {
        let found = self.value(key)?;
        let text = |item: &Value| match item {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        };
        let texts = match &found {
            Value::List(items) => items.iter().map(text).collect(),
            one => text(one).map(|text| vec![text]),
        };
        texts.or_else(|| self.unexpected(key, "a list of names in quotes", &found))
    }

    /// Reads a list of words out of `known`, each at most once, and puts it into their order.
    pub(super) fn names(&mut self, key: &str, known: &[&str]) -> Option<Vec<String>> {
        let found = self.value(key)?;
        let items = match &found {
            Value::List(items) => items.clone(),
            // One name is a list of one; a --set needs no brackets then.
            Value::Text(_) => vec![found.clone()],
            _ => return self.unexpected(key, &format!("a list of names out of {}", known.join(", ")), &found),
        };
        let mut named = BTreeSet::new();
        let mut is_good = true;
        for item in &items {
            let (what, hint) = match item {
                Value::Text(name) if !known.contains(&&**name) => {
                    let what = format!("expected names out of {}, found {item}", known.join(", "));
                    let hint = foreign::value_hint(key, name, known);
                    (what, hint.unwrap_or_else(|| format!("write a list such as [\"{}\"]", known[..2].join("\", \""))))
                }
                Value::Text(name) if !named.insert(name.as_str()) => {
                    (format!("\"{name}\" is named twice"), String::new())
                }
                Value::Text(_) => continue,
                other => (format!("expected names out of {}, found {other}", known.join(", ")), String::new()),
            };
            let fault = Fault::new(self.raw.place(key), what).hint(hint);
            self.fault(key, fault);
            is_good = false;
        }
        let in_order = known.iter().filter(|name| named.contains(**name));
        is_good.then(|| in_order.map(|name| (*name).to_owned()).collect())
    }

    /// Reads a path and hands it to `check`, which makes it absolute or gives its fault.
    pub(super) fn path<T>(&mut self, key: &str, check: impl Fn(&str) -> Checked<T>) -> Option<T> {
        let given = self.raw.get(key)?;
        let Some(text) = given.text().map(str::to_owned) else {
            let found = given.value.clone();
            return self.unexpected(key, "a path in quotes", &found);
        };
        self.checked(key, check(&text))
    }

    /// What keeps a command from writing at a place that a key names, or that it has by default.
    pub(super) fn unwritable(&self, key: &str, place: &Path) -> Option<(usize, Fault)> {
        let problem = paths::unwritable(place)?;
        let line = self.raw.get(key).map_or(usize::MAX, Given::line);
        Some((line, Fault::new(self.raw.place(key), problem.what).hint(problem.hint)))
    }

    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        example: &str,
        check: impl Fn(&str) -> Checked<T>,
    ) -> Option<T> {
        self.missing(key, example);
        self.path(key, check)
    }

    /// Reads a path or glob, or a list of them, into files. `None` only when the key was not given.
    pub(super) fn files(&mut self, key: &str) -> Option<Vec<PathBuf>> {
        let given = self.raw.get(key)?;
        let patterns = match (&given.value, given.text()) {
            (Value::List(items), _) => items.clone(),
            (_, Some(text)) => vec![Value::Text(text.to_owned())],
            (found, None) => vec![found.clone()],
        };
        if key == "data.train" && patterns.is_empty() {
            self.unexpected::<()>(key, "at least one file", &Value::List(patterns.clone()));
        }
        let (mut files, mut twice, mut known) = (Vec::new(), Vec::new(), BTreeSet::new());
        for pattern in &patterns {
            let found = match pattern {
                Value::Text(text) => self.checked(key, paths::data_files(text)),
                other => self.unexpected(key, "paths or globs in quotes", other),
            };
            let found = found.unwrap_or_default();
            for folder in found.folders {
                let what = format!("{} is a folder: the files in it are not taken", folder.display());
                self.warn(key, what, "name them too: /**/ in a pattern stands for folders in folders");
            }
            for file in found.files {
                // Links and ways round through other folders lead to the same file.
                if known.insert(real(&file)) {
                    files.push(file);
                } else {
                    twice.push(file);
                }
            }
        }
        if let Some(first) = twice.first() {
            let more = match twice.len() {
                1 => " is".to_owned(),
                n => format!(" and {} more are", n - 1),
            };
            let what = format!("{}{more} named or matched twice: each file is taken once", first.display());
            self.warn(key, what, "to have rows count more, copy their file");
        }
        Some(files)
    }

    /// Says which files are to be learned and evaluated on as well.
    pub(super) fn compare_files(&mut self, train: &[PathBuf], validation: &[PathBuf]) {
        let learned: BTreeSet<PathBuf> = train.iter().map(|file| real(file)).collect();
        if let Some(file) = validation.iter().find(|file| learned.contains(&real(file))) {
            let what =
                format!("{} is in data.train as well: what is learned says little when evaluated on", file.display());
            self.warn(
                "data.validation",
                what,
                "evaluate on rows that are not trained on, or set data.validation_fraction",
            );
        }
    }

    fn warn(&mut self, key: &str, what: String, hint: &str) {
        self.warnings.push(Fault::new(self.raw.place(key), what).hint(hint));
    }

    pub(super) fn template(&mut self) -> Option<TemplateChoice> {
        let key = "data.template";
        let given = self.raw.get(key)?;
        let Some(text) = given.text().map(str::to_owned) else {
            let found = given.value.clone();
            return self.unexpected(key, "the name of a template or the path of a template file", &found);
        };
        match &*text {
            "alpaca" => Some(TemplateChoice::Alpaca),
            "chinese-alpaca" => Some(TemplateChoice::ChineseAlpaca),
            "chat" => Some(TemplateChoice::Chat),
            text if Path::new(text)
                .extension()
                .is_some_and(|extension| ["toml", "jinja"].iter().any(|known| extension == *known)) =>
            {
                self.path(key, paths::template).map(TemplateChoice::File)
            }
            text => {
                let what = format!(
                    "expected \"alpaca\", \"chinese-alpaca\", \"chat\" or the path of a .toml or .jinja file, found {text:?}"
                );
                let near = foreign::value_hint(key, text, &["alpaca", "chinese-alpaca", "chat"]);
                let hint = near.unwrap_or_else(|| "a format of your own is written as a template file".to_owned());
                let fault = Fault::new(self.raw.place(key), what).hint(hint);
                self.fault(key, fault);
                None
            }
        }
    }

    fn checked<T>(&mut self, key: &str, result: Checked<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(problem) => {
                let fault = Fault::new(self.raw.place(key), problem.what).hint(problem.hint);
                self.fault(key, fault);
                None
            }
        }
    }
}

/// A file's own path, no link and no way round in it.
fn real(file: &Path) -> PathBuf {
    file.canonicalize().unwrap_or_else(|_| file.to_path_buf())
}

fn as_float(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(number) => Some(*number as f64),
        Value::Float(number) if number.is_finite() => Some(*number),
        _ => None,
    }
}
