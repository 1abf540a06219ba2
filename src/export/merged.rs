//! The adapter merged into the base: an ordinary model directory.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::folder::{NewFolder, write_whole};
use crate::data::{Prompting, Template, TemplateFile};
use crate::disk::LocalDisk;
use crate::error::{Error, Result, not_stopped};
use crate::formats::json as files;
use crate::formats::model_keys::{CONFIG, GENERATION_CONFIG};
use crate::formats::safetensors_in::TensorFiles;
use crate::formats::safetensors_out::{Planned, TensorFileWriter};
use crate::model::lora::LoraSpec;
use crate::model::params::{lora_key, table_key};
use crate::model::shape::{Projection, Table};
use crate::progress::Work;
use crate::torch::number::WithNumber;
use crate::trained::{OpenedAdapter, Trained};

/// A file of the merged model holds at most this much.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes `W + s B A` for every adapted projection, trained tables in place of the base's, and the rest as it is.
///
/// Sums are computed in fp32 and stored in the base's dtype. A tied base whose embed or head was trained comes out
/// untied. One tensor is in memory at a time. `stop` holds the number of a signal that asked to stop, or 0.
///
/// # Errors
/// An output folder that is taken; a write that fails, a signal (nothing is left then).
pub fn export_merged(trained: &Trained, out: &Path, stop: &AtomicUsize) -> Result<()> {
    let adapter = super::expect_possible(trained, out)?;
    let lora = &adapter.config.lora;
    let is_tied = trained.base.tie_word_embeddings && lora.modules_to_save.is_empty();
    let tokenizer = trained.tokenizer()?;
    let merge = Merge { trained, adapter, lora };
    write_whole(&LocalDisk, out, |folder| {
        let shards = shards(merge.planned(is_tied)?);
        let names = file_names(shards.len());
        let work = Work::begin("merging", "tensors", shards.iter().map(|shard| shard.len() as u64).sum());
        for (planned, name) in shards.iter().zip(&names) {
            folder.write(name, |file| {
                let path = file.path().to_path_buf();
                let mut tensors = TensorFileWriter::new(file, &path, planned.clone())?;
                for tensor in planned {
                    not_stopped(stop, super::STOPPED)?;
                    merge.write(&mut tensors, &tensor.name)?;
                    work.advance(1);
                }
                tensors.finish()
            })?;
        }
        if shards.len() > 1 {
            write_json(folder, "model.safetensors.index.json", &index(&shards, &names))?;
        }
        let template = trained.template(&tokenizer, &|| Ok(Prompting::from(Template::alpaca())))?;
        write_config(trained, is_tied, &template, folder)?;
        write_generation_config(trained, &template, folder)?;
        for file in tokenizer.files() {
            folder.put(&file.name, &file.bytes)?;
        }
        if let Some(from) = trained.folders().map(|dir| dir.join(TemplateFile::NAME)).find(|path| path.is_file()) {
            folder.copy(&from)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Bytes of memory that the export takes at its peak: the largest tensor with what it is made of.
pub fn merged_bytes(trained: &Trained) -> i64 {
    let lora = trained.lora();
    let fp32 = |shape: [i64; 2]| 4 * shape.iter().product::<i64>();
    // The weight, the product, and the product times the scale.
    let adapted = lora.target_modules.iter().map(|projection| 3 * fp32(projection.shape(&trained.base)));
    // The table, and the same in the base's dtype.
    let table = 2 * fp32([trained.vocab_size(), trained.base.hidden_size]);
    let tables = Table::ALL.into_iter().filter(|table| lora.trains(*table)).map(|_| table);
    adapted.chain(tables).max().unwrap_or_default() + PROCESS_BYTES
}

/// What the process takes besides tensors.
const PROCESS_BYTES: i64 = 64 << 20;

struct Merge<'a> {
    trained: &'a Trained,
    adapter: &'a OpenedAdapter,
    lora: &'a LoraSpec,
}

impl Merge<'_> {
    /// Every tensor of the merged model, in the base's dtypes.
    fn planned(&self, is_tied: bool) -> Result<Vec<Planned>> {
        let mut planned = Vec::new();
        for (name, located) in self.trained.base_files.tensors() {
            let table = Table::ALL.into_iter().find(|t| t.base_key() == name);
            if name.ends_with("rotary_emb.inv_freq")
                || (table == Some(Table::Head) && self.trained.base.tie_word_embeddings)
            {
                continue;
            }
            let mut shape: Vec<i64> = located.shape.iter().map(|&n| n as i64).collect();
            if table.is_some() {
                shape[0] = self.trained.vocab_size();
            }
            planned.push(Planned { name: name.clone(), dtype: located.dtype, shape });
        }
        if self.trained.base.tie_word_embeddings && !is_tied {
            let embed = planned.iter().find(|p| p.name == Table::Embed.base_key()).cloned();
            let embed = embed.ok_or_else(|| Error::failed(Table::Embed.base_key(), "is not in the base"))?;
            planned.push(Planned { name: Table::Head.base_key().into(), ..embed });
        }
        Ok(planned)
    }

    fn write(&self, file: &mut TensorFileWriter<impl Write>, name: &str) -> Result<()> {
        let base = &self.trained.base_files;
        if let Some(table) = Table::ALL.into_iter().find(|t| t.base_key() == name) {
            if self.lora.trains(table) {
                return file.write(name, &load(&self.adapter.files, &table_key(table))?);
            }
            let source = if self.trained.base.tie_word_embeddings { Table::Embed } else { table };
            return file.write_bytes(name, base.bytes(source.base_key())?);
        }
        match self.adapted(name) {
            None => file.write_bytes(name, base.bytes(name)?),
            Some((layer, projection)) => {
                let a = load(&self.adapter.files, &lora_key(projection, layer, "lora_A"))?;
                let b = load(&self.adapter.files, &lora_key(projection, layer, "lora_B"))?;
                let mut merged = load(base, name)?;
                let _ = merged.f_add_(&b.f_mm(&a)?.f_times(self.lora.scale())?)?;
                file.write(name, &merged)
            }
        }
    }

    /// The adapted projection whose weight a tensor is.
    fn adapted(&self, name: &str) -> Option<(usize, Projection)> {
        let layers = 0..self.trained.base.num_hidden_layers;
        let layer = name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok()?;
        let is_it = |p: &&Projection| p.weight(layer) == name;
        let projection = self.lora.target_modules.iter().find(is_it)?;
        layers.contains(&layer).then_some((layer, *projection))
    }
}

fn load(files: &TensorFiles, name: &str) -> Result<Tensor> {
    files.load(name, Kind::Float, Device::Cpu)
}

/// Cuts the tensors into files of at most [`SHARD_BYTES`].
fn shards(planned: Vec<Planned>) -> Vec<Vec<Planned>> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in planned {
        if bytes > 0 && bytes + tensor.n_bytes() > SHARD_BYTES {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += tensor.n_bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards
}

fn file_names(n: usize) -> Vec<String> {
    match n {
        1 => vec!["model.safetensors".to_string()],
        n => (1..=n).map(|i| format!("model-{i:05}-of-{n:05}.safetensors")).collect(),
    }
}

fn index(shards: &[Vec<Planned>], names: &[String]) -> Value {
    let total: u64 = shards.iter().flatten().map(Planned::n_bytes).sum();
    let mut map = Map::new();
    for (shard, file) in shards.iter().zip(names) {
        for tensor in shard {
            map.insert(tensor.name.clone(), json!(file));
        }
    }
    json!({ "metadata": { "total_size": total }, "weight_map": map })
}

/// The base's `config.json` with the vocabulary and tying of the merged model, and the ends of its texts.
fn write_config(trained: &Trained, is_tied: bool, template: &TemplateFile, folder: &mut NewFolder<'_>) -> Result<()> {
    let mut config = read_object(&trained.base_dir.join(CONFIG.file))?;
    config.insert("vocab_size".into(), json!(trained.vocab_size()));
    config.insert("tie_word_embeddings".into(), json!(is_tied));
    say_ends(&mut config, template);
    write_json(folder, CONFIG.file, &Value::Object(config))
}

/// The `generation_config.json` of the adapter or the base, where there is one, with the ends of the merged model's texts.
fn write_generation_config(trained: &Trained, template: &TemplateFile, folder: &mut NewFolder<'_>) -> Result<()> {
    let name = GENERATION_CONFIG.file;
    let Some(path) = trained.folders().map(|dir| dir.join(name)).find(|path| path.is_file()) else { return Ok(()) };
    let mut config = read_object(&path)?;
    say_ends(&mut config, template);
    write_json(folder, name, &Value::Object(config))
}

/// Puts the tokens that were trained to begin and to end a text into a config. The end comes first in the list, before the
/// template's stop tokens and those of the base, at which programs went on stopping so far.
fn say_ends(config: &mut Map<String, Value>, template: &TemplateFile) {
    let theirs = match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) if !id.is_null() => vec![id.clone()],
        _ => Vec::new(),
    };
    let mut ids: Vec<Value> = Vec::new();
    let trained = std::iter::once(&template.eos_token_id).chain(&template.stop_token_ids).map(|id| json!(id));
    // Older files write -1 where there is none.
    for id in trained.chain(theirs.into_iter().filter(Value::is_u64)) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    let ids = if let [only] = ids.as_slice() { only.clone() } else { Value::Array(ids) };
    config.insert("eos_token_id".into(), ids);
    if let Some(bos) = template.bos_token_id {
        config.insert("bos_token_id".into(), json!(bos));
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    files::object(&bytes, &path.display().to_string())
}

fn write_json(folder: &mut NewFolder<'_>, name: &str, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).expect("a JSON value always serialises") + "\n";
    folder.put(name, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    #[test]
    fn large_models_are_cut_into_files_with_an_index() {
        let tensor = |name: &str| Planned { name: name.into(), dtype: Dtype::F32, shape: vec![400_000_000] };
        let shards = shards(["a", "b", "c", "d", "e", "f", "g"].map(tensor).to_vec());
        let sizes: Vec<usize> = shards.iter().map(Vec::len).collect();
        assert_eq!(sizes, [3, 3, 1]);
        let names = file_names(3);
        let index = index(&shards, &names);
        assert_eq!(index["weight_map"]["d"], "model-00002-of-00003.safetensors");
        assert_eq!(index["metadata"]["total_size"], 7 * 1_600_000_000u64);
    }
}
