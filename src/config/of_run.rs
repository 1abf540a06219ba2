//! The config of a run that is there already, and the places that a command writes to.

use std::path::{Path, PathBuf};

use super::{Config, Dtype, Faults, FileKeys, raw, read, resolve};
use crate::error::{Error, Fault, Result};

/// Why the places of a config that are written cannot be, each with the line on which it is named.
#[derive(Debug, Clone, Default)]
pub(super) struct Unwritable {
    pub(super) output: Option<(usize, Fault)>,
    pub(super) cache_dir: Option<(usize, Fault)>,
    /// Whether the folder of tokens is the user's own wish now: neither the default nor what a run once took.
    pub(super) cache_is_wished: bool,
}

impl Unwritable {
    /// What a command that writes may not pass over, each with the line that it is on.
    pub(super) fn as_faults(&self) -> impl Iterator<Item = (usize, Fault)> {
        self.output.iter().chain(self.cache_dir.iter().filter(|_| self.cache_is_wished)).cloned()
    }
}

impl Config {
    /// Reads the config of a run's folder, with `--set` overrides. The run is where its folder is, wherever it was started.
    ///
    /// # Errors
    /// As [`Config::load`]; a `--set` of `train.output`.
    pub fn load_run(run_dir: &Path, sets: &[String]) -> Result<Self> {
        let (raw, mut faults) = Self::raw_of_run(run_dir, sets)?;
        let mut config = resolve::resolve(raw, FileKeys::Required, &mut faults);
        config.unwritable.cache_is_wished = sets.iter().any(|set| key_of_set(set) == "data.cache_dir");
        faults.into_result(config)
    }

    /// Reads the config of a run's folder for an evaluation of what was trained. Where it names validation files, the training
    /// samples are not asked for; the adapter that the run started from never is.
    ///
    /// # Errors
    /// As [`Config::load_run`].
    pub fn load_run_to_evaluate(run_dir: &Path, sets: &[String]) -> Result<Self> {
        let (mut raw, mut faults) = Self::raw_of_run(run_dir, sets)?;
        raw.remove("model.init_adapter");
        let has_files = raw.get("data.validation").is_some_and(|given| given.value != raw::Value::List(Vec::new()));
        let file_keys = if has_files { FileKeys::WithoutTraining } else { FileKeys::Required };
        if has_files {
            raw.remove("data.train");
        }
        let config = resolve::resolve(raw, file_keys, &mut faults);
        faults.into_result(config)
    }

    fn raw_of_run(run_dir: &Path, sets: &[String]) -> Result<(raw::Raw, Faults)> {
        let path = run_dir.join("config.toml");
        let mut faults = Faults::default();
        let mut raw = raw::read(&read(&path)?, &path.display().to_string(), &mut faults)?;
        raw.apply_sets(sets, &mut faults);
        if let Some(set) = sets.iter().find(|set| key_of_set(set) == "train.output" && !names(set, run_dir)) {
            let what = format!("a run stays in its folder, which is {}", run_dir.display());
            let hint = "move the folder and name its new place; or start another run, with model.init_adapter = this run's adapter";
            faults.add(usize::MAX, Fault::new(format!("--set {set}"), what).hint(hint));
        }
        raw.put("train.output", run_dir.display().to_string());
        Ok((raw, faults))
    }

    /// Refuses a run's folder in which nothing can be written, and such a folder of tokens that the user asked for.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn refuse_unwritable(&self) -> Result<()> {
        let faults: Vec<Fault> = self.unwritable.as_faults().map(|(_, fault)| fault).collect();
        if faults.is_empty() { Ok(()) } else { Err(Error::Invalid(faults)) }
    }

    /// The folder of tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] where nothing can be written there and the user asked for that folder.
    pub fn cache_dir(&self) -> Result<CacheDir<'_>> {
        let Unwritable { cache_dir, cache_is_wished, .. } = &self.unwritable;
        let hint = "tokens are made anew each time; name a folder that can be written: --set data.cache_dir=DIR";
        match cache_dir {
            Some((_, fault)) if *cache_is_wished => Err(Error::Invalid(vec![fault.clone()])),
            fault => Ok(CacheDir {
                folder: &self.data.cache_dir,
                max_bytes: self.data.cache_max_bytes(),
                is_required: *cache_is_wished,
                unwritable: fault.clone().map(|(_, fault)| fault.hint(hint)),
            }),
        }
    }
}

/// A folder in which tokens are kept.
#[derive(Debug)]
pub struct CacheDir<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// Bytes that everything in it may take.
    pub max_bytes: u64,
    /// Whether the user asked for it, so that a fault there is a fault of the command.
    pub is_required: bool,
    /// Why nothing can be written there, where that costs time alone.
    pub unwritable: Option<Fault>,
}

/// Whether the value of a `--set` argument is this folder, however it is written.
fn names(argument: &str, folder: &Path) -> bool {
    let value = argument.split_once('=').map_or("", |(_, value)| value.trim().trim_matches(['"', '\'']));
    let real = |path: &Path| path.canonicalize().ok();
    real(Path::new(value)).is_some_and(|named| Some(named) == real(folder))
}

/// The key of a `--set` argument.
fn key_of_set(argument: &str) -> &str {
    argument.split_once('=').map_or(argument, |(key, _)| key).trim()
}

/// What a run's own config says of its model, read without looking for the files that it names: they may have moved.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelOfRun {
    /// The base the run was trained on.
    pub base: Option<PathBuf>,
    /// The dtype it computed in.
    pub dtype: Option<Dtype>,
    /// Keys of the base's `config.json` that it passed over.
    pub allow_config_keys: Vec<String>,
}

impl ModelOfRun {
    /// Reads a run's `config.toml`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that cannot be read or is no TOML.
    pub fn load(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let hint = "the run wrote this file: put back what it was";
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::invalid(&place, format!("cannot be read: {error}")).hint(hint))?;
        let table: toml::Table = toml::from_str(&text)
            .map_err(|error| Error::invalid(&place, format!("not valid TOML: {}", error.message())).hint(hint))?;
        let value = |key: &str| table.get("model")?.get(key)?.as_str();
        let dtype = value("dtype").and_then(|word| word.parse().ok());
        let allowed = table.get("model").and_then(|model| model.get("allow_config_keys")?.as_array());
        let allow_config_keys =
            allowed.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect();
        Ok(Self { base: value("base").map(PathBuf::from), dtype, allow_config_keys })
    }
}
