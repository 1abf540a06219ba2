//! Adapters on disk as PEFT reads and writes them: `adapter_model.safetensors` and `adapter_config.json`.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::error::{Error, Fault, Result};
use crate::model::lora::{LoraSpec, Projection, Table};
use crate::model::params::ParamBuffer;
use crate::model::tensor_file_out::{Planned, TensorFileWriter};
use crate::model::weights::{TensorFiles, kind_of};

/// The weights of an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The configuration of an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";

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
        let map: Map<String, Value> = serde_json::from_str(&text)
            .map_err(|e| Error::invalid(path.display().to_string(), format!("is not a JSON object: {e}")))?;
        let place = path.display().to_string();
        let mut faults = Vec::new();
        let mut fault = |key: &str, what: String| faults.push(Fault::new(format!("{place}: {key}"), what));
        let get = |key: &str| map.get(key).filter(|v| !v.is_null());

        if get("peft_type").and_then(Value::as_str) != Some("LORA") {
            fault("peft_type", format!("expected \"LORA\", found {}", map.get("peft_type").unwrap_or(&Value::Null)));
        }
        for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
            if get(key).and_then(Value::as_bool) == Some(true) {
                fault(key, "is true, which is not supported".into());
            }
        }
        if let Some(bias) = get("bias").filter(|b| b.as_str() != Some("none")) {
            fault("bias", format!("expected \"none\", found {bias}"));
        }
        for key in ["rank_pattern", "alpha_pattern"] {
            if get(key).and_then(Value::as_object).is_some_and(|m| !m.is_empty()) {
                fault(key, "different ranks for different modules are not supported".into());
            }
        }
        for key in ["layers_to_transform", "layer_replication", "trainable_token_indices", "target_parameters"] {
            if get(key).is_some_and(|v| v.as_array().is_none_or(|a| !a.is_empty())) {
                fault(key, "is set, which is not supported".into());
            }
        }
        let r = get("r").and_then(Value::as_i64).filter(|r| *r >= 1);
        if r.is_none() {
            fault("r", "expected a positive integer".into());
        }
        let alpha = get("lora_alpha").and_then(Value::as_f64);
        if alpha.is_none() {
            fault("lora_alpha", "expected a number".into());
        }
        let (mut target_modules, mut modules_to_save) = (Vec::new(), Vec::new());
        match get("target_modules") {
            Some(Value::Array(names)) => {
                for name in names {
                    match name.as_str().and_then(|n| Projection::from_name(n.rsplit('.').next().unwrap_or(n))) {
                        Some(p) => target_modules.push(p),
                        None => fault("target_modules", format!("{name} is not a projection of a Llama block")),
                    }
                }
            }
            Some(Value::String(s)) if s == "all-linear" => target_modules = Projection::ALL.to_vec(),
            other => fault("target_modules", format!("expected a list of names, found {other:?}")),
        }
        for name in get("modules_to_save").and_then(Value::as_array).into_iter().flatten() {
            match name.as_str().and_then(Table::from_name) {
                Some(table) => modules_to_save.push(table),
                None => fault("modules_to_save", format!("{name} is not supported, only embed_tokens and lm_head are")),
            }
        }
        if !faults.is_empty() {
            return Err(Error::Invalid(faults));
        }
        target_modules.sort();
        target_modules.dedup();
        modules_to_save.sort();
        Ok(Self {
            lora: LoraSpec {
                r: r.unwrap_or(1),
                alpha: alpha.unwrap_or(1.0),
                dropout: get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
                use_rslora: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
                target_modules,
                modules_to_save,
            },
            base: get("base_model_name_or_path").and_then(Value::as_str).map(str::to_string),
        })
    }

    /// Writes `adapter_config.json`.
    pub fn save(&self, dir: &Path) -> Result<()> {
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
        let path = dir.join(CONFIG_FILE);
        let text = serde_json::to_string_pretty(&config).expect("a JSON value always serialises") + "\n";
        std::fs::write(&path, text).map_err(Error::io("write", &path))
    }
}

/// A whole number as PEFT writes it, without a fraction.
fn whole(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// Checks that an adapter file holds exactly the parameters of a layout, without reading them.
pub fn check(files: &TensorFiles, params: &crate::model::params::Layout) -> Vec<Fault> {
    let mut faults = Vec::new();
    for entry in params.entries() {
        match files.tensors().get(&entry.name) {
            None => faults.push(Fault::new(files.place(&entry.name), "the tensor is missing")),
            Some(t) if t.shape.iter().map(|&n| n as i64).ne(entry.shape) => {
                let what = format!("has shape {:?}, expected {:?}", t.shape, entry.shape);
                faults.push(Fault::new(files.place(&entry.name), what));
            }
            Some(t) if kind_of(t.dtype).is_none() => {
                faults.push(Fault::new(files.place(&entry.name), format!("dtype {:?} is not supported", t.dtype)));
            }
            Some(_) => {}
        }
    }
    for name in files.tensors().keys() {
        if params.index_of(name).is_none() {
            faults.push(Fault::new(files.place(name), "is not a parameter of this configuration"));
        }
    }
    faults
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

/// Writes named tensors as a safetensors file in fp32; trained tables in `table_dtype`.
pub fn save_tensors(path: &Path, named: &[(String, Tensor)], table_dtype: Dtype) -> Result<()> {
    let is_table = |name: &str| Table::ALL.iter().any(|t| name.ends_with(t.base_key()));
    let planned = named.iter().map(|(name, tensor)| Planned {
        name: name.clone(),
        dtype: if is_table(name) { table_dtype } else { Dtype::F32 },
        shape: tensor.size(),
    });
    let mut file = TensorFileWriter::create(path, planned.collect())?;
    for (name, tensor) in named {
        file.write(name, tensor)?;
    }
    file.finish()
}
