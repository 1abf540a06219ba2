//! `config.json` of a Hugging Face model directory, read strictly: every fault is collected, and no key is passed over in silence.
//!
//! What the keys mean to an architecture is said in `model/arch/`.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Fault, Result, shell_quoted};
use crate::formats::json;
use crate::formats::keys::{Key, is_neutral, passed_over, short};
use crate::formats::model_keys::CONFIG;

mod rope;

/// Reads a file that holds a JSON object; also gives its path, for messages.
///
/// # Errors
/// A file that cannot be read or holds no object.
pub fn object(path: &Path) -> Result<(Map<String, Value>, String)> {
    let place = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| {
        Error::invalid(&place, format!("cannot be read: {e}"))
            .hint("a base is a folder of Hugging Face's kind, with config.json and model.safetensors")
    })?;
    Ok((json::object(&bytes, &place)?, place))
}

/// What to do about a feature that changes every result.
pub const ANOTHER_BASE: &str =
    "choose another base: this is part of how the model was trained, and without it, it is another";
/// What to do about a value that no model of this kind has.
pub const NOT_THE_MODELS_OWN: &str = "is this the model's own config.json? Download it again";

/// The keys of a `config.json`, and what was found wrong with them so far.
#[derive(Debug)]
pub struct ConfigFile<'a> {
    map: &'a Map<String, Value>,
    /// Its path.
    place: String,
    /// Keys that the user allows to be passed over.
    allowed: &'a [String],
    faults: Vec<Fault>,
    warnings: Vec<Fault>,
}

impl<'a> ConfigFile<'a> {
    /// Begins to read keys; `allowed` names those that are passed over though they might change what is computed.
    pub fn new(map: &'a Map<String, Value>, place: String, allowed: &'a [String]) -> Self {
        Self { map, place, allowed, faults: Vec::new(), warnings: Vec::new() }
    }

    /// Gives what was read and the warnings, where nothing was at fault.
    ///
    /// # Errors
    /// Every fault that was found.
    pub fn finish<T>(self, read: T) -> Result<(T, Vec<Fault>)> {
        if self.faults.is_empty() { Ok((read, self.warnings)) } else { Err(Error::Invalid(self.faults)) }
    }

    /// Adds a warning about a key.
    pub fn warn(&mut self, key: &str, what: impl Into<String>, hint: &str) {
        self.warnings.push(Fault::new(format!("{}: {key}", self.place), what).hint(hint));
    }

    /// Names the keys that are in no table: a number may be a factor of some product, so it is a fault unless allowed.
    /// `own` are the keys that the architecture has beside those of all.
    pub fn unknown_keys(&mut self, own: &[Key]) {
        if !self.faults.is_empty() {
            // Those of another architecture would only hide what matters.
            return;
        }
        let map = self.map;
        let is_own = |name: &str| own.iter().any(|key| key.name == name);
        for (name, value) in CONFIG.unknown(map).filter(|(name, _)| !is_own(name)) {
            self.unknown_key(name, value);
        }
        for name in self.allowed {
            let top = name.split('.').next().unwrap_or_default();
            let is_known = (is_own(name) || CONFIG.find(name).is_some()) && name != "attention_dropout";
            if is_known || !map.contains_key(top) {
                let what = if is_known { "is a key that is known" } else { "is no key of this file" };
                self.warn(name, format!("{what}, so allowing it changes nothing"), "");
            }
        }
    }

    fn unknown_key(&mut self, name: &str, value: &Value) {
        if !holds_a_number(value) || self.allowed.iter().any(|allowed| allowed == name) {
            self.warnings.push(passed_over(&self.place, name, value));
            return;
        }
        let hint = format!(
            "if it has no effect on the model, pass it over: model.allow_config_keys = [{name:?}] in a config, \
             --allow-config-key {} for generate and export; else choose another base",
            shell_quoted(name)
        );
        self.fault(
            name,
            format!("is {}, and this key is not known here: it may change what the model computes", short(value)),
            &hint,
        );
    }

    /// Adds a fault of a key.
    pub fn fault(&mut self, key: &str, what: impl Into<String>, hint: &str) {
        self.faults.push(Fault::new(format!("{}: {key}", self.place), what).hint(hint));
    }

    /// The value of a key, unless it is null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A positive number, which must be there.
    pub fn int(&mut self, key: &str) -> i64 {
        match self.get(key).map(|v| (v.as_i64(), v.clone())) {
            Some((Some(n), _)) if (1..=1 << 31).contains(&n) => n,
            Some((_, v)) => {
                self.fault(key, format!("expected a positive integer, found {v}"), NOT_THE_MODELS_OWN);
                1
            }
            None => {
                self.fault(key, "missing", NOT_THE_MODELS_OWN);
                1
            }
        }
    }

    /// A positive number.
    pub fn int_or(&mut self, key: &str, default: i64) -> i64 {
        if self.get(key).is_some() { self.int(key) } else { default }
    }

    /// A number above 0.
    pub fn float_or(&mut self, key: &str, default: f64) -> f64 {
        self.float_in(self.map, key, Some(default))
    }

    /// A positive number, the default where the key is absent, and none where it is null.
    pub fn int_or_null(&mut self, key: &str, default: i64) -> Option<i64> {
        let is_null = self.map.get(key).is_some_and(Value::is_null);
        (!is_null).then(|| self.int_or(key, default))
    }

    /// Wants keys to be there whose absence means something else to this architecture than to others.
    pub fn required(&mut self, keys: &[&str]) {
        for key in keys {
            if self.get(key).is_none() {
                self.fault(key, "missing", NOT_THE_MODELS_OWN);
            }
        }
    }

    fn float_in(&mut self, map: &Map<String, Value>, key: &str, default: Option<f64>) -> f64 {
        match (map.get(key).filter(|v| !v.is_null()), default) {
            (Some(v), _) => match v.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() => x,
                _ => {
                    let what = format!("expected a positive number, found {v}");
                    self.fault(key, what, NOT_THE_MODELS_OWN);
                    1.0
                }
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.fault(key, "missing", NOT_THE_MODELS_OWN);
                1.0
            }
        }
    }

    /// A share from 0 up to 1. Where the user allows the key it is passed over.
    pub fn attention_dropout(&mut self) -> f64 {
        let key = "attention_dropout";
        let found = self.get(key).cloned().unwrap_or(Value::from(0));
        match found.as_f64().filter(|share| (0.0..1.0).contains(share)) {
            Some(share) if share > 0.0 && self.allowed.iter().any(|allowed| allowed == key) => {
                self.warn(key, format!("is {share}, and is passed over: no attention weight is dropped"), "");
                0.0
            }
            Some(share) => share,
            None => {
                self.fault(
                    key,
                    format!("expected a share from 0 up to 1, found {}", short(&found)),
                    NOT_THE_MODELS_OWN,
                );
                0.0
            }
        }
    }

    /// A switch, off where it is absent.
    pub fn bool_or_false(&mut self, key: &str) -> bool {
        match self.get(key).cloned() {
            None => false,
            Some(Value::Bool(truth)) => truth,
            Some(other) => {
                self.fault(key, format!("expected true or false, found {other}"), NOT_THE_MODELS_OWN);
                false
            }
        }
    }

    /// One token id or several; -1 stands for none, as older files have it.
    pub fn token_ids(&mut self, key: &str) -> Vec<u32> {
        let found = match self.get(key) {
            None => return Vec::new(),
            Some(Value::Array(ids)) => ids.clone(),
            Some(one) => vec![one.clone()],
        };
        let mut ids = Vec::new();
        for id in found {
            match id.as_i64() {
                Some(-1) => {}
                Some(id) if u32::try_from(id).is_ok() => ids.push(id as u32),
                _ => self.fault(
                    key,
                    format!("expected a token's number or a list of them, found {}", short(&id)),
                    NOT_THE_MODELS_OWN,
                ),
            }
        }
        ids
    }
}

/// Whether a value is a number that says something, or has one within.
fn holds_a_number(value: &Value) -> bool {
    match value {
        Value::Number(_) => !is_neutral(value),
        Value::Array(values) => values.iter().any(Value::is_number) || values.iter().any(holds_a_number),
        Value::Object(values) => values.values().any(holds_a_number),
        _ => false,
    }
}
