//! The life of a run: its directory, its steps, its checkpoints, its end.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use safetensors::Dtype;
use tch::{Device, Kind};

use crate::checkpoint::manifest::{MANIFEST_FILE, Newest, newest_good, replace_whole, sweep_incomplete, verify};
use crate::checkpoint::save::{self, Adapter};
use crate::checkpoint::state::RunState;
use crate::checkpoint::{load, retention};
use crate::config::{self, Auto, Config};
use crate::data::TemplateFile;
use crate::error::{Error, Fault, Result};
use crate::eval::evaluate;
use crate::log::{EvalMetrics, LogSettings, RunLog, StepMetrics};
use crate::model::adapter_file;
use crate::optim::adamw::{AdamW, AdamWConfig};
use crate::optim::scaler::LossScale;
use crate::train::banner;
use crate::train::setup::Job;
use crate::train::step::Trainer;

/// The run's own resolved config.
pub const CONFIG_FILE: &str = "config.toml";
/// The folder of the final adapter.
pub const ADAPTER_DIR: &str = "adapter";
/// The folder of the checkpoints.
pub const CHECKPOINTS_DIR: &str = "checkpoints";
/// The numbers of every step.
const METRICS_FILE: &str = "metrics.jsonl";

/// How a call that should train ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The last update is done and the adapter is written.
    Trained,
    /// There was nothing to do: the run had finished before.
    AlreadyFinished,
}

/// Starts a run in its output folder; with `resume` goes on with the run that is there, if any.
///
/// `stop` holds the number of a signal that asked to stop, or 0; the present step is finished and saved first.
///
/// # Errors
/// [`Error::Invalid`] before any file is created; [`Error::Interrupted`] after a signal.
pub fn train(config: Config, resume: bool, stop: &AtomicUsize) -> Result<Outcome> {
    let run_dir = config.train.output.clone();
    if !holds_run(&run_dir) {
        refuse_taken_output(&config)?;
        return Run::open(config, &run_dir, Start::Fresh, stop)?.run_to_end(stop);
    }
    if !resume {
        refuse_taken_output(&config)?;
    }
    let theirs = Config::load(&run_dir.join(CONFIG_FILE), &[])?;
    let differences: Vec<Fault> = config
        .differences(&theirs)
        .into_iter()
        .map(|d| Fault::new(d.key, format!("is {} here, but the run was started with {}", d.ours, d.theirs)))
        .collect();
    if !differences.is_empty() {
        return Err(Error::Invalid(differences)
            .hint(format!("these define the run: set them back, or start another run than {}", run_dir.display())));
    }
    go_on(keep_settled(config, &theirs), &run_dir, stop)
}

/// Goes on with the run of a directory, from its newest good checkpoint.
///
/// # Errors
/// As [`train`].
pub fn resume(run_dir: &Path, stop: &AtomicUsize) -> Result<Outcome> {
    if !holds_run(run_dir) {
        let what = format!("holds no run: there is no {CONFIG_FILE}");
        return Err(Error::invalid(run_dir.display().to_string(), what)
            .hint("name the folder that train.output named, or start one by `bellora train CONFIG`"));
    }
    let mut config = Config::load(&run_dir.join(CONFIG_FILE), &[])?;
    // The folder may have been moved since.
    config.train.output = run_dir.to_path_buf();
    go_on(config, run_dir, stop)
}

/// Refuses an output folder that holds a run already, or what a run would write over.
pub fn refuse_taken_output(config: &Config) -> Result<()> {
    let dir = &config.train.output;
    if holds_run(dir) {
        let what = format!("{} holds a run already", dir.display());
        return Err(Error::invalid("train.output", what).hint(format!(
            "go on with it by `bellora resume {}` or `--resume`, or choose another folder: --set train.output=OTHER",
            dir.display()
        )));
    }
    for name in [ADAPTER_DIR, CHECKPOINTS_DIR, METRICS_FILE] {
        // A run that was killed before it wrote its config leaves empty metrics.
        if std::fs::symlink_metadata(dir.join(name)).is_ok_and(|found| !found.is_file() || found.len() > 0) {
            let what = format!("{} holds {name}, but no {CONFIG_FILE} of a run", dir.display());
            return Err(Error::invalid("train.output", what)
                .hint(format!("choose another folder: --set train.output=OTHER; or move {name} away")));
        }
    }
    Ok(())
}

/// Whether a folder holds a run.
pub fn holds_run(dir: &Path) -> bool {
    dir.join(CONFIG_FILE).is_file()
}

/// The folder of a run's final adapter, if it is there.
pub fn finished_adapter(run_dir: &Path) -> Option<PathBuf> {
    Some(run_dir.join(ADAPTER_DIR)).filter(|dir| dir.is_dir())
}

/// Keeps what the run settled for `auto`, unless the user now says otherwise.
fn keep_settled(mut config: Config, theirs: &Config) -> Config {
    fn keep<T: Copy + PartialEq>(ours: &mut Auto<T>, theirs: Auto<T>) {
        if *ours == Auto::Auto {
            *ours = theirs;
        }
    }
    keep(&mut config.model.dtype, theirs.model.dtype);
    keep(&mut config.model.device, theirs.model.device);
    keep(&mut config.train.micro_batch_tokens, theirs.train.micro_batch_tokens);
    keep(&mut config.train.recompute, theirs.train.recompute);
    config
}

fn go_on(config: Config, run_dir: &Path, stop: &AtomicUsize) -> Result<Outcome> {
    if let Some(adapter) = finished_adapter(run_dir) {
        verify_adapter(&adapter)?;
        return Ok(Outcome::AlreadyFinished);
    }
    let found = newest_good(&run_dir.join(CHECKPOINTS_DIR))?;
    if found.good.is_none() && !found.damaged.is_empty() {
        return Err(none_is_whole(&found, run_dir));
    }
    Run::open(config, run_dir, Start::From(found), stop)?.run_to_end(stop)
}

/// Holds an adapter that a run wrote against its manifest. Files beside it that nobody reads (a README) do not count.
///
/// # Errors
/// As [`verify`].
pub fn verify_adapter(dir: &Path) -> Result<()> {
    let is_read = |fault: &Fault| {
        let name = Path::new(&fault.place).file_name().unwrap_or_default().to_string_lossy();
        let known = [adapter_file::WEIGHTS_FILE, adapter_file::CONFIG_FILE, TemplateFile::NAME, MANIFEST_FILE];
        known.contains(&&*name) || name.contains("token")
    };
    match verify(dir) {
        Err(Error::Invalid(mut faults)) => {
            faults.retain(is_read);
            if faults.is_empty() {
                return Ok(());
            }
            let manifest = dir.join(MANIFEST_FILE);
            Err(Error::Invalid(faults).hint_where_none(&format!(
                "copy the folder again from where it was whole; if it was changed on purpose, remove {}",
                manifest.display()
            )))
        }
        other => other.map(drop),
    }
}

/// Checkpoints that are all damaged: to start over would throw the run's metrics away, so that is left to the user.
fn none_is_whole(found: &Newest, run_dir: &Path) -> Error {
    let mut faults = Vec::new();
    for (path, error) in &found.damaged {
        match error.faults() {
            [] => faults.push(Fault::new(path.display().to_string(), error.to_string())),
            known => faults.extend_from_slice(known),
        }
    }
    let dir = run_dir.join(CHECKPOINTS_DIR).display().to_string();
    faults.push(
        Fault::new(&dir, "holds no checkpoint that is whole")
            .hint(format!("mend one from a copy, or start over: move {dir} away, or name another train.output")),
    );
    Error::Invalid(faults)
}

/// Where a run begins.
enum Start {
    /// In a folder that holds none.
    Fresh,
    /// Where its checkpoints say.
    From(Newest),
}

struct Run {
    dir: PathBuf,
    job: Job,
    trainer: Trainer,
    log: RunLog,
    /// The step of the newest checkpoint.
    saved_step: u64,
}

impl Run {
    /// Checks the job, loads the model and opens the folder's logs.
    fn open(config: Config, dir: &Path, start: Start, stop: &AtomicUsize) -> Result<Self> {
        let cache = config.data.cache_dir.clone();
        let job = Job::inspect(config, Some(&cache))?;
        not_stopped(stop)?;
        let settings = &job.model.config.train;
        let mut params = job.model.initial_params()?;
        let adamw = AdamWConfig { betas: settings.betas, eps: settings.eps, weight_decay: settings.weight_decay };
        let optimizer = AdamW::new(adamw, &params)?;
        let scale = match job.model.kind() {
            Kind::Half => LossScale::dynamic(),
            _ => LossScale::none(),
        };
        let mut state = RunState::start(scale, job.identity());
        let mut damaged = Vec::new();
        if let Start::From(found) = start {
            damaged = found.damaged;
            if let Some((_, checkpoint)) = found.good {
                let moments = optimizer.named_moments(params.layout())?;
                let loaded = load::load(&checkpoint, &mut params, &moments)?;
                same_identity(&loaded, &state, dir)?;
                state = loaded;
            }
        }
        let model = job.model.load(&params)?;
        not_stopped(stop)?;

        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        sweep_incomplete(dir)?;
        sweep_incomplete(&dir.join(CHECKPOINTS_DIR))?;
        let log_settings = LogSettings {
            last_step: state.step,
            last_lines: None,
            total_steps: job.total_steps,
            log_every: settings.log_every,
        };
        let mut log = RunLog::open(&crate::disk::LocalDisk::shared(), dir, log_settings)?;
        write_config(&job.model.config, dir)?;
        log.banner(&banner::lines(&job)?)?;
        for warning in warnings(&job) {
            log.warn(&warning)?;
        }
        for (path, error) in &damaged {
            log.warn(&format!("{} is damaged and was passed over: {error}", path.display()))?;
        }
        if state.step > 0 {
            log.note(&format!("goes on from step {} of {}", state.step, job.total_steps))?;
        }
        let saved_step = state.step;
        let trainer = Trainer::new(job.step_settings(), job.train.clone(), model, params, optimizer, state)?;
        let mut run = Self { dir: dir.to_path_buf(), job, trainer, log, saved_step };
        if run.job.model.micro_batch_is_solved {
            run.try_largest_micro_batch()?;
        }
        Ok(run)
    }

    /// Holds the memory model against this GPU, and has its allocator take what the run will need.
    fn try_largest_micro_batch(&mut self) -> Result<()> {
        let model = &self.job.model;
        let probed = self.trainer.try_largest(&model.memory_model(), model.config.data.max_length)?;
        self.log.banner(&probed.lines())?;
        self.take_note()
    }

    fn run_to_end(mut self, stop: &AtomicUsize) -> Result<Outcome> {
        let total = self.job.total_steps;
        let settings = self.job.model.config.train.clone();
        while self.trainer.state.step < total {
            let signal = stop.load(Ordering::SeqCst);
            if signal != 0 {
                return Err(self.interrupted(signal)?);
            }
            let metrics = self.trainer.step()?;
            self.log_step(metrics)?;
            self.take_note()?;
            let step = self.trainer.state.step;
            let due = |every: u64| every > 0 && (step == total || step.is_multiple_of(every));
            // In this order: what comes after the last checkpoint is lost to a run that is killed there, but for the
            // adapter.
            if due(settings.eval_every) {
                self.evaluate()?;
            }
            if due(settings.checkpoint_every) {
                self.save()?;
            }
        }
        self.write_adapter()?;
        self.log.flush()?;
        Ok(Outcome::Trained)
    }

    fn log_step(&mut self, metrics: Option<StepMetrics>) -> Result<()> {
        let Some(metrics) = metrics else { return Ok(()) };
        self.log.step(&metrics)?;
        if metrics.skipped {
            self.log.note(&format!("step {} was skipped", metrics.step))?;
        }
        Ok(())
    }

    /// Logs what the trainer had to change, and has the run's config say it.
    fn take_note(&mut self) -> Result<()> {
        let Some(note) = self.trainer.take_note() else { return Ok(()) };
        self.log.warn(&note)?;
        let config = &mut self.job.model.config;
        let tokens = self.trainer.settings.micro_batch_tokens.max(config.data.max_length);
        config.train.micro_batch_tokens = Auto::Is(tokens);
        write_config(config, &self.dir)
    }

    /// Waits until every step that was begun is done and logged, and the state is that of the last of them.
    fn settle(&mut self) -> Result<()> {
        let metrics = self.trainer.finish()?;
        self.log_step(metrics)
    }

    fn evaluate(&mut self) -> Result<()> {
        self.settle()?;
        let Some(validation) = &self.job.validation else { return Ok(()) };
        let started = std::time::Instant::now();
        let result = evaluate(&self.trainer.model, validation, self.trainer.settings.micro_batch_tokens)?;
        self.log.eval(&EvalMetrics {
            step: self.trainer.state.step,
            eval_loss: result.eval_loss,
            perplexity: result.perplexity,
            samples: result.samples,
            label_tokens: result.label_tokens,
            eval_secs: started.elapsed().as_secs_f64(),
        })
    }

    fn save(&mut self) -> Result<()> {
        // Metrics first: a checkpoint never knows of a step whose line could still be lost.
        self.settle()?;
        self.log.flush()?;
        let trainer = &self.trainer;
        let checkpoints = self.dir.join(CHECKPOINTS_DIR);
        std::fs::create_dir_all(&checkpoints).map_err(Error::io("create", &checkpoints))?;
        let moments = trainer.optimizer.named_moments(trainer.params.layout())?;
        let model = &self.job.model;
        let adapter = Adapter {
            config: &model.adapter_config(),
            tensors: &trainer.params.named()?,
            beside: &model.files_beside(),
        };
        save::save(&checkpoints, &adapter, &moments, &trainer.state)?;
        self.saved_step = trainer.state.step;
        retention::prune(&checkpoints, self.saved_step, model.config.train.keep_checkpoints)?;
        Ok(())
    }

    fn write_adapter(&mut self) -> Result<()> {
        self.settle()?;
        let model = &self.job.model;
        let table_dtype = match model.config.train.save_dtype {
            config::SaveDtype::Fp32 => Dtype::F32,
            config::SaveDtype::Bf16 => Dtype::BF16,
            config::SaveDtype::Fp16 => Dtype::F16,
        };
        let adapter = Adapter {
            config: &model.adapter_config(),
            tensors: &self.trainer.params.named()?,
            beside: &model.files_beside(),
        };
        let dir = self.dir.join(ADAPTER_DIR);
        replace_whole(&dir, |tmp| adapter.write(tmp, table_dtype))?;
        self.log.note(&format!("adapter written to {}", dir.display()))
    }

    /// Saves what there is and says how to go on.
    fn interrupted(&mut self, signal: usize) -> Result<Error> {
        self.settle()?;
        if self.saved_step < self.trainer.state.step {
            self.save()?;
        }
        let done = match self.trainer.state.step {
            0 => "no step was done".to_string(),
            step => format!("step {step} is saved"),
        };
        let note = format!("{done}; go on with: bellora resume {}", self.dir.display());
        self.log.note(&note)?;
        self.log.flush()?;
        Ok(Error::Interrupted { signal: signal as i32, note })
    }
}

/// Ends the start of a run when a signal has asked for it; the run's folder is as it was.
fn not_stopped(stop: &AtomicUsize) -> Result<()> {
    match stop.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Error::Interrupted { signal: signal as i32, note: "the training had not begun".into() }),
    }
}

/// What the user should know before a run starts, though it is no fault.
pub fn warnings(job: &Job) -> Vec<String> {
    let mut warnings = Vec::new();
    let (kind, is_cpu) = (job.model.kind(), job.model.device() == Device::Cpu);
    if kind == Kind::Half && is_cpu {
        warnings
            .push("fp16 on a CPU is several times slower than fp32: dtype = \"bf16\" or \"fp32\" is quicker".into());
    }
    #[cfg(target_arch = "x86_64")]
    if kind == Kind::BFloat16 && is_cpu && !std::arch::is_x86_feature_detected!("avx512bf16") {
        warnings.push("this CPU has no bf16 products, so bf16 is slow here: dtype = \"fp32\" is quicker".into());
    }
    let (max_length, trained_for) = (job.model.config.data.max_length as i64, job.model.base.max_position_embeddings);
    if max_length > trained_for {
        warnings.push(format!(
            "data.max_length = {max_length} is beyond the {trained_for} positions the base was trained for"
        ));
    }
    warnings
}

fn same_identity(loaded: &RunState, here: &RunState, dir: &Path) -> Result<()> {
    let mut faults = Vec::new();
    for (what, key, ours, theirs) in [
        ("the base model", "model.base", &here.identity.base, &loaded.identity.base),
        ("the training data", "data.train", &here.identity.data, &loaded.identity.data),
    ] {
        if ours != theirs {
            faults.push(
                Fault::new(key, format!("{what} is not what the run in {} was started with", dir.display()))
                    .hint("put the files back as they were, or start a new run"),
            );
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Invalid(faults)) }
}

/// Writes the resolved config; in one rename, so that a folder holds a whole one or none.
fn write_config(config: &Config, dir: &Path) -> Result<()> {
    let (path, tmp) = (dir.join(CONFIG_FILE), dir.join(".config.toml.tmp"));
    std::fs::write(&tmp, config.to_toml()).map_err(Error::io("write", &tmp))?;
    std::fs::rename(&tmp, &path).map_err(Error::io("rename", &tmp))
}
