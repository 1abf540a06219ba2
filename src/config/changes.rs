//! How a config differs from the one of a run that it is to go on with, and what that means to the run.

use std::path::Path;

use serde_json::{Map, Value};

use super::choices::Choice;
use super::{Auto, CONTENTS_KEYS, Config, DEFINING_KEYS, Faults, LENGTH_KEYS, ROUNDING_KEYS, raw, read};
use crate::error::Result;

/// Keys that only say where something lies.
const PLACES: [&str; 2] = ["train.output", "data.cache_dir"];

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

impl Meaning {
    fn of(key: &str) -> Self {
        match key {
            _ if DEFINING_KEYS.contains(&key) => Self::Defines,
            _ if CONTENTS_KEYS.contains(&key) => Self::Contents,
            _ if LENGTH_KEYS.contains(&key) => Self::Length,
            _ if ROUNDING_KEYS.contains(&key) => Self::Rounding,
            _ => Self::Free,
        }
    }
}

impl Config {
    /// What a checkpoint keeps of the config: every key that holds with its value, `section.key` by `section.key`, but for
    /// [`PLACES`].
    pub fn values_to_keep(&self) -> Map<String, Value> {
        let mut values = self.values();
        PLACES.iter().for_each(|key| drop(values.shift_remove(*key)));
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
            .filter(|(key, ..)| !PLACES.contains(&key.as_str()))
            .filter(|(_, ours, theirs)| !agree(*ours, *theirs) && !is_auto(*ours) && !is_auto(*theirs))
            .map(|(key, ours, theirs)| Difference {
                key: key.clone(),
                ours: shown(ours),
                theirs: shown(theirs),
                meaning: Meaning::of(key),
            })
            .collect()
    }

    /// Takes what a run settled for `auto`, where this config still says `auto`.
    pub fn keep_settled(&mut self, theirs: &Map<String, Value>) {
        fn word<T: Choice>(ours: &mut Auto<T>, theirs: Option<&Value>) {
            let found = T::WORDS.iter().find(|(word, _)| theirs.is_some_and(|theirs| theirs == word));
            if let (Auto::Auto, Some((_, value))) = (&ours, found) {
                *ours = Auto::Is(*value);
            }
        }
        word(&mut self.model.dtype, theirs.get("model.dtype"));
        word(&mut self.model.device, theirs.get("model.device"));
        word(&mut self.data.learn, theirs.get("data.learn"));
        word(&mut self.train.recompute, theirs.get("train.recompute"));
        let tokens = theirs.get("train.micro_batch_tokens").and_then(Value::as_u64);
        if let (Auto::Auto, Some(shard)) = (self.train.shard, theirs.get("train.shard").and_then(Value::as_bool)) {
            self.train.shard = Auto::Is(shard);
        }
        if let (Auto::Auto, Some(tokens)) = (self.train.micro_batch_tokens, tokens) {
            self.train.micro_batch_tokens = Auto::Is(tokens as usize);
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
