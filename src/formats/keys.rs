//! What is known of the keys of a JSON file, in one table a file, and what becomes of the others.
//!
//! A key that changes the result and is passed over would make another model than the one that the user means. So every
//! key is in the table of its file, or it is named: in a warning, or, where an unknown number may change what is
//! computed, in an error.

use serde_json::{Map, Value};

use crate::error::Fault;

/// What is known of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It is read, and what it says is done.
    Honoured,
    /// It says nothing about what is computed here.
    Harmless,
    /// It is read, and refused unless it is off.
    Refused,
}

/// A key of a file.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name. One that ends in `*` stands for all that begin so, one that begins with `*` for all that end so.
    pub name: &'static str,
    /// What becomes of it.
    pub effect: Effect,
    /// What it does, why it has no effect, or which of its values are taken.
    pub note: &'static str,
}

/// A key that is read.
pub const fn honoured(name: &'static str, note: &'static str) -> Key {
    Key { name, effect: Effect::Honoured, note }
}

/// A key without effect.
pub const fn harmless(name: &'static str, note: &'static str) -> Key {
    Key { name, effect: Effect::Harmless, note }
}

/// A key that is refused unless it is off.
pub const fn refused(name: &'static str, note: &'static str) -> Key {
    Key { name, effect: Effect::Refused, note }
}

/// What is known of a file's keys.
#[derive(Debug)]
pub struct KeyTable {
    /// The file's name.
    pub file: &'static str,
    /// Its keys, in the order in which people look for them.
    pub keys: &'static [Key],
}

impl KeyTable {
    /// What is known of a key.
    pub fn find(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| match (key.name.strip_suffix('*'), key.name.strip_prefix('*')) {
            (Some(beginning), _) => name.starts_with(beginning),
            (None, Some(end)) => name.ends_with(end),
            (None, None) => key.name == name,
        })
    }

    /// The keys of a file that are in the table in no way and whose value says something.
    pub fn unknown<'a>(&self, file: &'a Map<String, Value>) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let unknown = |(name, value): &(&String, &Value)| self.find(name).is_none() && !is_neutral(value);
        file.iter().filter(unknown).map(|(name, value)| (name.as_str(), value))
    }

    /// A warning for each unknown key; `place` is the file's path.
    pub fn warnings(&self, file: &Map<String, Value>, place: &str) -> Vec<Fault> {
        self.unknown(file).map(|(name, value)| passed_over(place, name, value)).collect()
    }
}

/// The warning that a key is not known.
pub fn passed_over(place: &str, name: &str, value: &Value) -> Fault {
    Fault::new(format!("{place}: {name}"), format!("is not known here and is passed over; it says {}", short(value)))
        .hint("if it changes what the model computes, results differ from those of other programs")
}

/// Whether a value says nothing: absent, off, 0, 1 (as a factor), empty, or an object of nothing but such values.
pub fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64().is_some_and(|number| number == 0.0 || number == 1.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.values().all(is_neutral),
    }
}

/// A value, cut where it is long.
pub fn short(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
