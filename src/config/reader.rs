//! Keys as they were given, for the kinds of values to read, and the faults that are met.

use std::collections::BTreeSet;
use std::path::Path;

use super::problem::Checked;
use super::raw::{Given, Raw, Value};
use super::{Config, Fallback, Faults, FileKeys, find, foreign, paths};
use crate::error::Fault;

/// What was given, and what is at fault in it.
pub(super) struct Reader<'a> {
    pub(super) raw: Raw,
    pub(super) file_keys: FileKeys,
    pub(super) faults: &'a mut Faults,
    /// The keys at fault so far.
    faulty: BTreeSet<String>,
    /// Faults that say nothing of what to do yet: their keys, and their places among the faults.
    without_hint: Vec<(String, usize)>,
    /// What may not be what the user means, though it is no fault.
    pub(super) warnings: Vec<Fault>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(raw: Raw, file_keys: FileKeys, faults: &'a mut Faults) -> Self {
        Self { raw, file_keys, faults, faulty: BTreeSet::new(), without_hint: Vec::new(), warnings: Vec::new() }
    }

    /// Gives a key to be read from what was given, or as if it had been.
    pub(super) fn key(&mut self, key: &'static str, given: Given) -> GivenKey<'_, 'a> {
        GivenKey { key, given, or_auto: false, reader: self }
    }

    /// Notes what is wrong with a key; without a hint, [`Reader::name_defaults`] gives one.
    pub(super) fn fault(&mut self, key: &str, what: impl Into<String>, hint: impl Into<String>) {
        let fault = Fault::new(self.raw.place(key), what).hint(hint);
        if fault.hint.is_empty() {
            self.without_hint.push((key.to_owned(), self.faults.found.len()));
        }
        self.faults.add(self.raw.get(key).map_or(usize::MAX, Given::line), fault);
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

    /// Notes that a required file is missing, unless it is there and faulty or a hint has already named it.
    pub(super) fn missing(&mut self, key: &'static str, example: &str) {
        let is_required = match self.file_keys {
            FileKeys::Required => true,
            FileKeys::WithoutTraining => key != "data.train",
            FileKeys::PassedOver => false,
        };
        if is_required && self.raw.get(key).is_none() && !self.faults.proposed.contains(key) {
            let section = key.split_once('.').map_or(key, |(section, _)| section);
            let hint = format!("write {example} under [{section}]");
            self.fault(key, "this key is required and was not given", hint);
        }
    }

    /// What keeps a command from writing at a place that a key names, or that it has by default.
    pub(super) fn unwritable(&self, key: &str, place: &Path) -> Option<(usize, Fault)> {
        let problem = paths::unwritable(place)?;
        let line = self.raw.get(key).map_or(usize::MAX, Given::line);
        Some((line, Fault::new(self.raw.place(key), problem.what).hint(problem.hint)))
    }

    pub(super) fn warn(&mut self, key: &str, what: String, hint: &str) {
        self.warnings.push(Fault::new(self.raw.place(key), what).hint(hint));
    }
}

/// A key that was given.
pub(super) struct GivenKey<'r, 'a> {
    key: &'static str,
    given: Given,
    /// Whether it takes `auto` too, for messages.
    pub(super) or_auto: bool,
    reader: &'r mut Reader<'a>,
}

impl GivenKey<'_, '_> {
    pub(super) fn value(&self) -> &Value {
        &self.given.value
    }

    /// Gives the value as [`Given::text`] does.
    pub(super) fn text(&self) -> Option<&str> {
        self.given.text()
    }

    pub(super) fn is_required(&self) -> bool {
        find(self.key).is_some_and(|key| matches!(key.fallback, Fallback::Required(_)))
    }

    /// Says what to write instead of a text that is none of `words`.
    pub(super) fn value_hint(&self, found: &str, words: &[&str]) -> Option<String> {
        foreign::value_hint(self.key, found, words)
    }

    pub(super) fn fault(&mut self, what: String, hint: impl Into<String>) {
        self.reader.fault(self.key, what, hint);
    }

    pub(super) fn warn(&mut self, what: String, hint: &str) {
        self.reader.warn(self.key, what, hint);
    }

    /// Notes that the value is something else than it must be; gives `None`, for the caller to return.
    pub(super) fn unexpected<T>(&mut self, expected: &str) -> Option<T> {
        let found = self.given.value.clone();
        self.unexpected_part(expected, &found)
    }

    /// As [`GivenKey::unexpected`], of a part of the value.
    pub(super) fn unexpected_part<T>(&mut self, expected: &str, found: &Value) -> Option<T> {
        let hint = match found {
            Value::Text(text)
                if text.parse::<f64>().is_ok_and(f64::is_finite) || matches!(&**text, "true" | "false") =>
            {
                format!("write {text} without quotes")
            }
            _ if self.is_required() => "write a path in quotes: this key has no default".to_owned(),
            _ => String::new(),
        };
        self.fault(format!("expected {expected}, found {found}"), hint);
        None
    }

    /// Gives a path that is as it should be, or notes what is wrong with it.
    pub(super) fn checked<T>(&mut self, result: Checked<T>) -> Option<T> {
        result.map_err(|problem| self.fault(problem.what, problem.hint)).ok()
    }
}
