//! Adapters on disk as PEFT reads and writes them: `adapter_model.safetensors` and `adapter_config.json`.

use std::io::Write;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};
use tch::Tensor;

use crate::error::{Error, Fault, Result};
use crate::formats::json as files;
use crate::formats::keys::{Effect, short};
use crate::formats::model_keys::ADAPTER_CONFIG;
use crate::formats::safetensors_in::TensorFiles;
use crate::formats::safetensors_out::{Planned, TensorFileWriter};
use crate::model::lora::LoraSpec;
use crate::model::params::{Layout, ParamBuffer};
use crate::model::shape::{Projection, Table};

/// The weights of an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The configuration of an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// Keys that are refused for some values only.
const JUDGED_BELOW: [&str; 3] = ["bias", "init_lora_weights", "ensure_weight_tying"];

/// Beginnings of `init_lora_weights` by which PEFT takes a part out of the base's own weights.
const CHANGES_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// A rank beyond the width of any projection is a slip.
const LARGEST_RANK: i64 = 1 << 16;

const PLAIN_LORA: &str =
    "only plain LoRA and rsLoRA are read: in PEFT, merge this adapter into its base, or train it anew";
const NOT_ITS_OWN: &str = "is this the adapter's own file? Download or export the adapter again";
const ONLY_TABLES: &str = "beside LoRA only embed_tokens and lm_head can be trained";

/// An adapter's configuration, as far as this program reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The adapters.
    pub lora: LoraSpec,
    /// The base that was trained on, as written there.
    pub base: Option<String>,
}

impl AdapterConfig {
    /// Reads `adapter_config.json` of an adapter folder.
    ///
    /// # Errors
    /// Every fault at once: kinds of adapters that this program does not compute are refused by name.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(|e| {
            Error::invalid(path.display().to_string(), format!("cannot be read: {e}"))
                .hint("an adapter is a folder with adapter_config.json and adapter_model.safetensors")
        })?;
        let place = path.display().to_string();
        let map = files::object(text.as_bytes(), &place)?;
        let mut faults = Vec::new();
        let mut fault = |key: &str, what: String, hint: &str| {
            faults.push(Fault::new(format!("{place}: {key}"), what).hint(hint));
        };
        let get = |key: &str| map.get(key).filter(|v| !v.is_null());

        if get("peft_type").and_then(Value::as_str) != Some("LORA") {
            let what = format!("expected \"LORA\", found {}", map.get("peft_type").unwrap_or(&Value::Null));
            fault("peft_type", what, "only LoRA adapters are read");
        }
        // Any other key that is set belongs to a variant of LoRA, known or yet to come, that is not computed here.
        for (key, value) in map.iter().filter(|(_, value)| is_set(value)) {
            match ADAPTER_CONFIG.find(key) {
                Some(known) if known.effect == Effect::Refused && !JUDGED_BELOW.contains(&known.name) => {
                    fault(key, format!("is {}: {} is not supported", short(value), known.note), PLAIN_LORA);
                }
                Some(_) => {}
                None => fault(key, format!("is {}, a kind of adapter that is not supported", short(value)), PLAIN_LORA),
            }
        }
        if let Some(bias) = get("bias").filter(|b| b.as_str() != Some("none")) {
            fault("bias", format!("expected \"none\", found {bias}"), PLAIN_LORA);
        }
        let how = get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if CHANGES_BASE.iter().any(|prefix| how.starts_with(prefix)) {
            fault(
                "init_lora_weights",
                format!("{how:?} changes the base's weights, which is not supported"),
                PLAIN_LORA,
            );
        }
        let r = get("r").and_then(Value::as_i64).filter(|r| (1..=LARGEST_RANK).contains(r));
        if r.is_none() {
            let what = format!("expected an integer from 1 to {LARGEST_RANK}, found {}", shown(get("r")));
            fault("r", what, NOT_ITS_OWN);
        }
        let alpha = get("lora_alpha").and_then(Value::as_f64);
        if alpha.is_none() {
            fault("lora_alpha", format!("expected a number, found {}", shown(get("lora_alpha"))), NOT_ITS_OWN);
        }
        let use_rslora = get("use_rslora").map_or(Some(false), Value::as_bool);
        if use_rslora.is_none() {
            fault("use_rslora", format!("expected true or false, found {}", shown(get("use_rslora"))), NOT_ITS_OWN);
        }
        let (mut target_modules, mut modules_to_save) = (Vec::new(), Vec::new());
        match get("target_modules") {
            Some(Value::Array(names)) => {
                for name in names {
                    match name.as_str().and_then(|n| Projection::from_name(n.rsplit('.').next().unwrap_or(n))) {
                        Some(p) => target_modules.push(p),
                        None => {
                            let what = format!("{name} is not a projection of a Llama block");
                            fault("target_modules", what, "only adapters of the seven projections are read");
                        }
                    }
                }
            }
            Some(Value::String(s)) if s == "all-linear" => target_modules = Projection::ALL.to_vec(),
            other => {
                let what = format!("expected a list of names, found {}", shown(other));
                fault("target_modules", what, "write the names that it stands for, such as [\"q_proj\", \"v_proj\"]");
            }
        }
        match get("modules_to_save") {
            None => {}
            Some(Value::Array(names)) => {
                for name in names {
                    match name.as_str().and_then(Table::from_name) {
                        Some(table) => modules_to_save.push(table),
                        None => fault("modules_to_save", format!("{name} is not supported"), ONLY_TABLES),
                    }
                }
            }
            other => fault("modules_to_save", format!("expected a list, found {}", shown(other)), ONLY_TABLES),
        }
        if !modules_to_save.is_empty() && get("ensure_weight_tying").is_some_and(is_set) {
            let what = "is set, but each trained table is a copy of its own here".to_string();
            fault("ensure_weight_tying", what, PLAIN_LORA);
        }
        if !faults.is_empty() {
            return Err(Error::Invalid(faults));
        }
        target_modules.sort();
        target_modules.dedup();
        modules_to_save.sort();
        modules_to_save.dedup();
        Ok(Self {
            lora: LoraSpec {
                r: r.unwrap_or(1),
                alpha: alpha.unwrap_or(1.0),
                dropout: get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
                use_rslora: use_rslora.unwrap_or(false),
                target_modules,
                modules_to_save,
            },
            base: get("base_model_name_or_path").and_then(Value::as_str).map(str::to_string),
        })
    }

    /// The text of `adapter_config.json`.
    pub fn to_json(&self) -> String {
        let names: Vec<&str> = self.lora.target_modules.iter().map(|p| p.name()).collect();
        let saved: Vec<&str> = self.lora.modules_to_save.iter().map(|t| t.name()).collect();
        let config = json!({
            "alpha_pattern": {},
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": whole(self.lora.alpha),
            "lora_dropout": self.lora.dropout,
            "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
            "peft_type": "LORA",
            "r": self.lora.r,
            "rank_pattern": {},
            "revision": null,
            "target_modules": names,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.lora.use_rslora,
        });
        serde_json::to_string_pretty(&config).expect("a JSON value always serialises") + "\n"
    }
}

/// Whether a value switches something on: here 0 and 1 are ranks, scales and layers like others.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

fn shown(value: Option<&Value>) -> String {
    value.map_or("nothing".to_string(), ToString::to_string)
}

/// A whole number as PEFT writes it, without a fraction.
fn whole(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// Opens the weights of an adapter folder and checks that they are exactly the parameters of a layout, without reading
/// them.
///
/// # Errors
/// Weights that are missing (those of other forms are named with the way to convert them), damaged, or of another
/// adapter.
pub fn open_weights(dir: &Path, layout: &Layout) -> Result<TensorFiles> {
    let path = dir.join(WEIGHTS_FILE);
    if !path.is_file() {
        let hint = match dir.join("adapter_model.bin").is_file() {
            true => {
                "save it again in Python, by save_pretrained(DIR, safe_serialization=True): adapter_model.bin, a pickle, \
                     is not read"
            }
            false => "an adapter is a folder with adapter_config.json and adapter_model.safetensors",
        };
        return Err(Error::invalid(path.display().to_string(), "is missing").hint(hint));
    }
    let files = TensorFiles::open(&[path])?;
    let faults = check(&files, layout);
    if faults.is_empty() { Ok(files) } else { Err(Error::Invalid(faults)) }
}

/// Checks that an adapter file holds exactly the parameters of a layout, without reading them.
fn check(files: &TensorFiles, params: &Layout) -> Vec<Fault> {
    let expected = params.entries().iter().map(|entry| (entry.name.as_str(), entry.shape.as_slice()));
    files.check(expected, |_| false, "do adapter, adapter_config.json and base belong together?")
}

/// Copies the tensors of an adapter file over the masters.
pub fn load_into(files: &TensorFiles, params: &mut ParamBuffer) -> Result<()> {
    let faults = check(files, params.layout());
    if !faults.is_empty() {
        return Err(Error::Invalid(faults));
    }
    for (index, entry) in params.layout().entries().iter().enumerate() {
        files.copy_into(&entry.name, &params.master_view(index)?)?;
    }
    params.refresh_compute()
}

/// Writes named tensors as a safetensors file in fp32; trained tables in `table_dtype`. `path` is its name in messages.
pub fn write_tensors(out: impl Write, path: &Path, named: &[(String, Tensor)], table_dtype: Dtype) -> Result<()> {
    let is_table = |name: &str| Table::ALL.iter().any(|t| name.ends_with(t.base_key()));
    let planned = named.iter().map(|(name, tensor)| Planned {
        name: name.clone(),
        dtype: if is_table(name) { table_dtype } else { Dtype::F32 },
        shape: tensor.size(),
    });
    let mut file = TensorFileWriter::new(out, path, planned.collect())?;
    for (name, tensor) in named {
        file.write(name, tensor)?;
    }
    file.finish()
}
