//! The rotary settings of a `config.json`.

use serde_json::{Map, Value};

use super::{ANOTHER_BASE, ConfigFile, NOT_THE_MODELS_OWN};
use crate::formats::keys::{is_neutral, short};
use crate::ops::rope::RopeScaling;

/// The settings that each kind of scaling reads.
const EVERY: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
const LLAMA3: [&str; 4] = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];

impl ConfigFile<'_> {
    /// Rotary settings: `rope_parameters` (newer) or `rope_theta` with `rope_scaling` (older).
    pub fn rope(&mut self, max_positions: i64) -> (f64, RopeScaling) {
        // Where both are given the older one counts, as in Transformers.
        let key = ["rope_scaling", "rope_parameters"].into_iter().find(|key| self.get(key).is_some());
        let key = key.unwrap_or("rope_scaling");
        let settings = match self.get(key).cloned() {
            None => Map::new(),
            Some(Value::Object(settings)) => settings,
            Some(other) => {
                self.fault(key, format!("expected an object, found {other}"), NOT_THE_MODELS_OWN);
                Map::new()
            }
        };
        let newer = self.get("rope_parameters").and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        let top = self.float_in(self.map, "rope_theta", Some(newer.unwrap_or(10_000.0)));
        let theta = self.float_in(&settings, "rope_theta", Some(top));
        for map in [&settings, self.map] {
            let partial = self.float_in(map, "partial_rotary_factor", Some(1.0));
            if partial != 1.0 {
                let what = format!("heads that rotate in part ({partial}) are not supported");
                self.fault("partial_rotary_factor", what, "choose a base whose heads rotate wholly");
            }
        }
        if let (Some(older), Some(newer)) = (self.get("rope_scaling"), self.get("rope_parameters"))
            && kind(older) != kind(newer)
        {
            let what = format!("says {}, and rope_parameters says {}; the former is taken", short(older), short(newer));
            self.warn("rope_scaling", what, "");
        }
        let names = ["rope_type", "type"].map(|name| settings.get(name).filter(|kind| !kind.is_null()));
        if let [Some(first), Some(second)] = names
            && first != second
        {
            let what = format!("has rope_type = {first} and type = {second}: which one is meant?");
            self.fault(key, what, NOT_THE_MODELS_OWN);
        }
        let default = Value::from("default");
        let rope_type = names[0].or(names[1]).unwrap_or(&default);
        let (scaling, read) = match rope_type.as_str() {
            Some("default") => (RopeScaling::None, &[][..]),
            // Divided by 1, positions stay what they are.
            Some("linear") if settings.get("factor").and_then(Value::as_f64) == Some(1.0) => {
                (RopeScaling::None, &[][..])
            }
            Some("llama3") => (self.llama3(key, &settings, max_positions), &LLAMA3[..]),
            other => {
                let what =
                    format!("the rotary scaling {rope_type} is not supported, only \"default\" and \"llama3\" are");
                let hint = match other {
                    Some("dynamic") => {
                        "it changes nothing up to max_position_embeddings: remove the entry from config.json if no text \
                         is longer"
                    }
                    _ => ANOTHER_BASE,
                };
                self.fault(key, what, hint);
                return (theta, RopeScaling::None);
            }
        };
        let others = settings.iter().filter(|(name, value)| {
            !EVERY.contains(&name.as_str()) && !read.contains(&name.as_str()) && !is_neutral(value)
        });
        for (name, value) in others {
            self.unknown_key(&format!("{key}.{name}"), value);
        }
        (theta, scaling)
    }

    fn llama3(&mut self, key: &str, settings: &Map<String, Value>, max_positions: i64) -> RopeScaling {
        let factor = self.float_in(settings, "factor", None);
        let low_freq_factor = self.float_in(settings, "low_freq_factor", None);
        let high_freq_factor = self.float_in(settings, "high_freq_factor", None);
        let original = self.float_in(settings, "original_max_position_embeddings", Some(max_positions as f64));
        let both_given = settings.contains_key("low_freq_factor") && settings.contains_key("high_freq_factor");
        if both_given && low_freq_factor >= high_freq_factor {
            let what =
                format!("low_freq_factor = {low_freq_factor} is not below high_freq_factor = {high_freq_factor}");
            self.fault(key, what, NOT_THE_MODELS_OWN);
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: original }
    }
}

/// The kind of scaling that settings name.
fn kind(settings: &Value) -> &str {
    let name = |name| settings.get(name).and_then(Value::as_str);
    name("rope_type").or_else(|| name("type")).unwrap_or("default")
}
