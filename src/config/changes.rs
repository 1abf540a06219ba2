//! How a config differs from the one of a run that it is to go on with, and what that means to the run.

use std::path::Path;

use serde_json::{Map, Value};

use super::reader::Reader;
use super::{Config, Faults, FileKeys, KEYS, Named, find, raw, read};
use crate::error::Result;

/// A key in which two configs differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key, as `section.key`.
    pub key: String,
    /// The value in the config asked, or `not set`.
    pub ours: String,
    /// The value in the other.
    pub theirs: String,
    /// What it means.
    pub meaning: Meaning,
}

/// What a changed key means to a run that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Meaning {
    /// It would be another run.
    Defines,
    /// It names files, and only what is in them counts.
    Contents,
    /// The run ends elsewhere, and with it the learning rate's schedule.
    Length,
    /// Sums are rounded otherwise.
    Rounding,
    /// Where, when, and what is kept.
    Free,
}

impl Config {
    /// What a checkpoint keeps of the config: every key that holds with its value, `section.key` by `section.key`, but for
    /// those that name places to write to.
    pub fn values_to_keep(&self) -> Map<String, Value> {
        let mut values = self.values();
        values.retain(|key, _| !is_place(key));
        values
    }

    /// Every key that holds with its value.
    pub fn values(&self) -> Map<String, Value> {
        values_of_text(&self.to_toml(), "the config").unwrap_or_default()
    }

    /// Gives the keys whose values differ from those of another config. `auto` agrees with every value, and where the run
    /// and the token cache lie does not count. A key that the other one lacks has its default there: it may be of a version
    /// that did not have the key yet.
    pub fn differences(&self, theirs: &Map<String, Value>) -> Vec<Difference> {
        let ours = self.values();
        let only_theirs = theirs.keys().filter(|key| !ours.contains_key(*key));
        let defaults = Self::load_without_files(None, &[]).map(|config| config.values()).unwrap_or_default();
        let is_auto = |value: Option<&Value>| value.is_some_and(|value| value == "auto");
        let shown = |value: Option<&Value>| value.map_or("not set".to_owned(), Value::to_string);
        ours.keys()
            .chain(only_theirs)
            .map(|key| (key, ours.get(key), theirs.get(key).or_else(|| defaults.get(key))))
            .filter(|(key, ..)| !is_place(key))
            .filter(|(_, ours, theirs)| !agree(*ours, *theirs) && !is_auto(*ours) && !is_auto(*theirs))
            .map(|(key, ours, theirs)| Difference {
                key: key.clone(),
                ours: shown(ours),
                theirs: shown(theirs),
                meaning: find(key).map_or(Meaning::Free, |key| key.meaning),
            })
            .collect()
    }

    /// Takes what a run settled for `auto`, where this config still says `auto`.
    pub fn keep_settled(&mut self, theirs: &Map<String, Value>) {
        let mut faults = Faults::default();
        let mut reader = Reader::new(raw::Raw::default(), FileKeys::PassedOver, &mut faults);
        for key in KEYS {
            if let Some(value) = theirs.get(key.name) {
                (key.settle)(self, &mut reader.key(key.name, raw::Given::typed(&value.to_string())));
            }
        }
    }
}

/// Reads the values of a run's `config.toml` without looking for the files that it names.
///
/// # Errors
/// [`crate::error::Error::Invalid`] for a file that cannot be read or is no TOML.
pub fn values_of(path: &Path) -> Result<Map<String, Value>> {
    values_of_text(&read(path)?, &path.display().to_string())
}

/// Whether a key only says where something is written.
fn is_place(key: &str) -> bool {
    find(key).is_some_and(|key| (key.named)() == Named::Place)
}

fn values_of_text(text: &str, name: &str) -> Result<Map<String, Value>> {
    // Keys that are not known are left out: no config that is judged here has any.
    let raw = raw::read(text, name, &mut Faults::default())?;
    Ok(raw.keys().filter_map(|key| Some((key.to_owned(), raw.get(key)?.value.to_json()))).collect())
}

fn agree(ours: Option<&Value>, theirs: Option<&Value>) -> bool {
    match (ours, theirs) {
        (Some(Value::Number(ours)), Some(Value::Number(theirs))) => ours == theirs || ours.as_f64() == theirs.as_f64(),
        (Some(Value::Array(ours)), Some(Value::Array(theirs))) => {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(ours, theirs)| agree(Some(ours), Some(theirs)))
        }
        _ => ours == theirs,
    }
}
