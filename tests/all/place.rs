//! A folder with everything a small job needs, for tests that call the program.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value, json};

/// The case of the golden files that jobs are made of: a base stored in bf16, a tokenizer, an adapter, ten rows.
pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/attention_rslora_uneven")
}

/// A folder with `base/`, `tokenizer/`, `adapter/`, `rows.jsonl` and a config; it goes when it is dropped.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    /// `section.key` and its value in TOML.
    keys: BTreeMap<String, String>,
}

/// How a call of the program ended and what it wrote.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// The same, of a call that is expected to end well.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// The same, of a call that is expected to be refused with a message that holds all of `words`.
    #[track_caller]
    pub(crate) fn refused(self, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(2), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in:\n{}", self.stderr);
        }
        self
    }
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap(), keys: BTreeMap::new() };
        for folder in ["base", "tokenizer"] {
            copy_folder(&golden().join(folder), &place.path(folder));
        }
        copy_folder(&golden().join("init_adapter"), &place.path("adapter"));
        std::fs::copy(golden().join("data.jsonl"), place.path("rows.jsonl")).unwrap();
        place.with(&[
            ("model.base", "\"base\""),
            ("model.tokenizer", "\"tokenizer\""),
            ("model.dtype", "\"fp32\""),
            ("lora.r", "6"),
            ("lora.alpha", "9"),
            ("lora.dropout", "0"),
            ("lora.target_modules", "[\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]"),
            ("lora.use_rslora", "true"),
            ("data.train", "\"rows.jsonl\""),
            ("data.max_length", "256"),
            ("data.cache_dir", "\"cache\""),
            ("train.output", "\"run\""),
            ("train.global_batch", "4"),
            ("train.max_steps", "2"),
        ])
    }

    /// Sets keys of the config, their values in TOML.
    pub(crate) fn with(mut self, keys: &[(&str, &str)]) -> Self {
        self.keys.extend(keys.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.keys.remove(key).unwrap();
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        let path = self.path(name);
        if path.is_dir() { std::fs::remove_dir_all(path).unwrap() } else { std::fs::remove_file(path).unwrap() }
    }

    pub(crate) fn rename(&self, from: &str, to: &str) {
        std::fs::rename(self.path(from), self.path(to)).unwrap();
    }

    /// Changes keys of a JSON file; null takes a key away.
    pub(crate) fn edit_json(&self, name: &str, changes: &Value) {
        let mut map: Map<String, Value> = serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            match value {
                Value::Null => map.remove(key),
                value => map.insert(key.clone(), value.clone()),
            };
        }
        self.write(name, Value::Object(map).to_string());
    }

    /// Changes the header of a safetensors file, and the data behind it.
    pub(crate) fn edit_tensors(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
        let bytes = std::fs::read(self.path(name)).unwrap();
        let (len, rest) = bytes.split_at(8);
        let (header, data) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
        let (mut header, mut data) = (serde_json::from_slice(header).unwrap(), data.to_vec());
        change(&mut header, &mut data);
        let header = Value::Object(header).to_string();
        self.write(name, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat());
    }

    /// Writes `c.toml` of the keys.
    pub(crate) fn write_config(&self) {
        let mut text = String::new();
        for section in ["model", "lora", "data", "train"] {
            text.push_str(&format!("[{section}]\n"));
            for (key, value) in &self.keys {
                if let Some(name) = key.strip_prefix(&format!("{section}.")) {
                    text.push_str(&format!("{name} = {value}\n"));
                }
            }
        }
        self.write("c.toml", text);
    }

    /// The program, called in this folder, with a home of its own.
    pub(crate) fn bellora(&self, arguments: &[&str]) -> Command {
        let mut process = Command::new(env!("CARGO_BIN_EXE_bellora"));
        process.args(arguments).current_dir(self.dir.path()).stdin(Stdio::null());
        process.env("HOME", self.path("home")).env_remove("XDG_CACHE_HOME").env("OMP_NUM_THREADS", "1");
        process
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.bellora(arguments).output().unwrap().into()
    }

    /// Every file and folder, with the contents of files.
    pub(crate) fn tree(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.dir.path().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let contents = std::fs::read(&path).unwrap_or_default();
                if path.is_dir() {
                    folders.push(path.clone());
                }
                found.insert(path.strip_prefix(self.dir.path()).unwrap().to_path_buf(), contents);
            }
        }
        found
    }
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The entry of a tensor in a safetensors header.
pub(crate) fn tensor(dtype: &str, shape: &[usize], from: usize, to: usize) -> Value {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": [from, to] })
}
