//! The kinds of values that keys take: how each is read, printed and described. The type of the key's field says the rest:
//! [`Auto`] takes `auto` as well, and an [`Option`] is off where the key is not given.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;

use super::Auto;
use super::raw::Value;
use super::reader::GivenKey;
use crate::choice::Choice;

/// What a key that takes paths names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// Neither a file nor a folder.
    Nothing,
    /// What is read.
    Files,
    /// A folder that is written.
    Place,
}

/// A kind of values of type `T`.
pub(super) trait Kind<T> {
    /// Reads what was given; gives `None` after noting why it is at fault.
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<T>;

    /// Writes a value in TOML; gives `None` for one that is off.
    fn print(&self, value: &T) -> Option<String>;

    /// Says which values there are, in Markdown.
    fn values(&self) -> String;

    /// What its values name.
    fn named(&self) -> Named {
        Named::Nothing
    }

    /// Takes what a run settled, where `ours` is still `auto`.
    fn settle(&self, _ours: &mut T, _theirs: &mut GivenKey<'_, '_>) {}
}

impl<T, K: Kind<T>> Kind<Option<T>> for K {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<Option<T>> {
        self.read(given).map(Some)
    }

    fn print(&self, value: &Option<T>) -> Option<String> {
        value.as_ref().and_then(|value| self.print(value))
    }

    fn values(&self) -> String {
        self.values()
    }

    fn named(&self) -> Named {
        self.named()
    }
}

impl<T, K: Kind<T>> Kind<Auto<T>> for K {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<Auto<T>> {
        if matches!(given.value(), Value::Text(text) if text == "auto") {
            return Some(Auto::Auto);
        }
        given.or_auto = true;
        self.read(given).map(Auto::Is)
    }

    fn print(&self, value: &Auto<T>) -> Option<String> {
        match value {
            Auto::Auto => Some(quoted("auto")),
            Auto::Is(value) => self.print(value),
        }
    }

    fn values(&self) -> String {
        format!("`auto`, {}", self.values())
    }

    fn settle(&self, ours: &mut Auto<T>, theirs: &mut GivenKey<'_, '_>) {
        if let (Auto::Auto, Some(value)) = (&ours, self.read(theirs)) {
            *ours = Auto::Is(value);
        }
    }
}

/// Whole numbers of a range. The run's own config is TOML again, whose integers have 64 bits with a sign.
pub(super) struct Whole(pub(super) RangeInclusive<u64>);

/// A type of whole numbers.
pub(super) trait Count: TryFrom<u64> + Display {}

impl Count for u32 {}
impl Count for u64 {}
impl Count for usize {}

impl<T: Count> Kind<T> for Whole {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<T> {
        let number = match *given.value() {
            Value::Integer(number) => u64::try_from(number).ok(),
            // 3.0 is 3: such files are often written by programs that know only floats.
            Value::Float(number) if number.fract() == 0.0 && number.abs() < 1e15 => u64::try_from(number as i128).ok(),
            _ => None,
        };
        let in_range = number.filter(|number| self.0.contains(number)).and_then(|number| T::try_from(number).ok());
        in_range.or_else(|| {
            let (whole, most) = (format!("a whole number of at least {}", self.0.start()), *self.0.end());
            given.unexpected(&match given.value() {
                Value::Text(_) if given.or_auto => format!("\"auto\" or {whole}"),
                _ if most < i64::MAX as u64 => format!("{whole} and at most {most}"),
                _ => whole,
            })
        })
    }

    fn print(&self, value: &T) -> Option<String> {
        Some(value.to_string())
    }

    fn values(&self) -> String {
        // A greater limit is there only so that sums can be counted.
        let (least, most) = (self.0.start(), self.0.end());
        if *most <= 1 << 20 { format!("{least} to {most}") } else { format!("from {least}") }
    }
}

/// Each of a list, sorted, each once.
impl Kind<Vec<u64>> for Whole {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<Vec<u64>> {
        let number = |item: &Value| match item {
            Value::Integer(number) => u64::try_from(*number).ok().filter(|number| self.0.contains(number)),
            _ => None,
        };
        let numbers = match given.value() {
            Value::List(items) => items.iter().map(number).collect::<Option<BTreeSet<u64>>>(),
            _ => None,
        };
        let (least, most) = (self.0.start(), self.0.end());
        let expected = format!("a list of whole numbers of at least {least} and at most {most}");
        numbers.map(|numbers| numbers.into_iter().collect()).or_else(|| given.unexpected(&expected))
    }

    fn print(&self, value: &Vec<u64>) -> Option<String> {
        Some(list(value))
    }

    fn values(&self) -> String {
        format!("list, each from {}", self.0.start())
    }
}

/// Numbers: which, in the docs and in a message, and the condition.
pub(super) struct Real(&'static str, &'static str, fn(f64) -> bool);

pub(super) const ABOVE_ZERO: Real = Real("above 0", "a number greater than 0", |number| number > 0.0);
pub(super) const FROM_ZERO: Real = Real("from 0", "a number of at least 0", |number| number >= 0.0);
pub(super) const SHARE: Real =
    Real("0 up to 1", "a share of at least 0 and less than 1", |share| (0.0..1.0).contains(&share));
pub(super) const SHARE_OR_ALL: Real = Real("0 to 1", "a share from 0 to 1", |share| (0.0..=1.0).contains(&share));

impl Kind<f64> for Real {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<f64> {
        let number = as_float(given.value()).filter(|number| self.2(*number));
        number.or_else(|| given.unexpected(self.1))
    }

    /// With all digits, and so that it is read back as a float.
    fn print(&self, value: &f64) -> Option<String> {
        Some(format!("{value:?}"))
    }

    fn values(&self) -> String {
        self.0.to_owned()
    }
}

/// AdamW's two decay rates.
pub(super) struct Betas;

impl Kind<[f64; 2]> for Betas {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<[f64; 2]> {
        if let Value::List(items) = given.value()
            && let [Some(first), Some(second)] = *items.iter().map(as_float).collect::<Vec<_>>()
            && [first, second].iter().all(|beta| (0.0..1.0).contains(beta))
        {
            return Some([first, second]);
        }
        given.unexpected("a list of two numbers of at least 0 and less than 1, such as [0.9, 0.999]")
    }

    fn print(&self, value: &[f64; 2]) -> Option<String> {
        Some(format!("{value:?}"))
    }

    fn values(&self) -> String {
        "two, each 0 up to 1".to_owned()
    }
}

/// True or false.
pub(super) struct Truth;

impl Kind<bool> for Truth {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<bool> {
        match *given.value() {
            Value::Bool(truth) => Some(truth),
            _ if given.or_auto => given.unexpected("\"auto\", true or false"),
            _ => given.unexpected("true or false"),
        }
    }

    fn print(&self, value: &bool) -> Option<String> {
        Some(value.to_string())
    }

    fn values(&self) -> String {
        "true, false".to_owned()
    }
}

/// One of a few words.
pub(super) struct Word;

impl<T: Choice> Kind<T> for Word {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<T> {
        let found = given.value();
        if let Value::Text(text) = found
            && let Some((_, value)) = T::WORDS.iter().find(|(word, _)| word == text)
        {
            return Some(*value);
        }
        let text = match found {
            Value::Bool(truth) => truth.to_string(),
            Value::Text(text) => text.clone(),
            _ => String::new(),
        };
        let auto = given.or_auto.then_some("auto").into_iter();
        let words: Vec<_> = auto.chain(T::WORDS.iter().map(|(word, _)| *word)).collect();
        let what = format!("expected one of \"{}\", found {found}", words.join("\", \""));
        given.fault(what, given.value_hint(&text, &words).unwrap_or_default());
        None
    }

    fn print(&self, value: &T) -> Option<String> {
        Some(quoted(value.as_str()))
    }

    fn values(&self) -> String {
        T::WORDS.iter().map(|(word, _)| format!("`{word}`")).collect::<Vec<_>>().join(", ")
    }
}

/// Texts of any kind; one by itself is a list of one.
pub(super) struct Texts;

impl Kind<Vec<String>> for Texts {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<Vec<String>> {
        let text = |item: &Value| match item {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        };
        let texts = match given.value() {
            Value::List(items) => items.iter().map(text).collect(),
            one => text(one).map(|text| vec![text]),
        };
        texts.or_else(|| given.unexpected("a list of names in quotes"))
    }

    fn print(&self, value: &Vec<String>) -> Option<String> {
        Some(list(value.iter().map(|text| quoted(text))))
    }

    fn values(&self) -> String {
        "list".to_owned()
    }
}

/// Names out of those known, each at most once, put into their order; and what to do in place of an empty list, where at
/// least one must be given.
pub(super) struct Names(pub(super) &'static [&'static str], pub(super) Option<&'static str>);

impl Kind<Vec<String>> for Names {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<Vec<String>> {
        let Self(known, in_place_of_none) = *self;
        let items = match given.value() {
            Value::List(items) => items.clone(),
            // One name is a list of one; a --set needs no brackets then.
            Value::Text(text) => vec![Value::Text(text.clone())],
            _ => return given.unexpected(&format!("a list of names out of {}", known.join(", "))),
        };
        if let (true, Some(hint)) = (items.is_empty(), in_place_of_none) {
            given.fault("expected at least one name, found an empty list".to_owned(), hint);
            return None;
        }
        let mut named = BTreeSet::new();
        let mut is_good = true;
        for item in &items {
            let strange = || format!("expected names out of {}, found {item}", known.join(", "));
            let (what, hint) = match item {
                Value::Text(name) if !known.contains(&&**name) => {
                    let list = || format!("write a list such as [\"{}\"]", known[..2].join("\", \""));
                    (strange(), given.value_hint(name, known).unwrap_or_else(list))
                }
                Value::Text(name) if !named.insert(name.as_str()) => {
                    (format!("\"{name}\" is named twice"), String::new())
                }
                Value::Text(_) => continue,
                _ => (strange(), String::new()),
            };
            given.fault(what, hint);
            is_good = false;
        }
        let in_order = known.iter().filter(|name| named.contains(**name));
        is_good.then(|| in_order.map(|name| (*name).to_owned()).collect())
    }

    fn print(&self, value: &Vec<String>) -> Option<String> {
        Texts.print(value)
    }

    fn values(&self) -> String {
        Kind::<Vec<String>>::values(&Texts)
    }
}

fn as_float(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(number) => Some(*number as f64),
        Value::Float(number) if number.is_finite() => Some(*number),
        _ => None,
    }
}

pub(super) fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

pub(super) fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    format!("[{}]", items.join(", "))
}
