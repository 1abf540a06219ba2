//! The life of a run: its steps, its checkpoints, its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tch::{Device, Kind};

use crate::checkpoint::folder::{remove_whole, sweep_incomplete};
use crate::checkpoint::retention::Keep;
use crate::checkpoint::saver::Saver;
use crate::checkpoint::state::Evaluated;
use crate::comm::{Communicator, broadcast_bytes};
use crate::config::{Auto, Config};
use crate::disk::{Disk, Nowhere, make_folder, put_file, sync_parent};
use crate::engine::metrics::StepMetrics;
use crate::engine::step::Trainer;
use crate::error::{Error, Fault, Result, shell_quoted};
use crate::eval::evaluate;
use crate::log::{EvalMetrics, LogSettings, RunLog};
use crate::run::banner;
use crate::run::folder::adapter_of_step;
use crate::run::folder::{CHECKPOINTS_DIR, CONFIG_FILE, finished_adapter, keep_old_metrics, refuse_taken_output};
use crate::run::lock::RunLock;
use crate::run::requests::{Agreed, Requests};
use crate::run::resume_position::ResumePosition;
use crate::run::setup::Job;
use crate::run::start::{Host, Start};

/// How a call that should train ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunOutcome {
    /// The last update is done and the adapter is written.
    Trained,
    /// There was nothing to do: the run had finished before.
    AlreadyFinished,
}

/// A run that goes on.
pub(super) struct Run<'a> {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) requests: &'a Requests,
    pub(super) tell: Option<fn(&str)>,
    pub(super) job: Job,
    pub(super) trainer: Trainer,
    pub(super) log: RunLog,
    pub(super) saver: Saver,
    /// The step of the newest checkpoint that is whole.
    pub(super) saved_step: u64,
    /// The step of the newest checkpoint that was begun.
    pub(super) begun_step: u64,
    /// The step whose checkpoint was asked for by a signal and is not whole yet.
    pub(super) asked_step: Option<u64>,
    pub(super) evaluated: Option<Evaluated>,
    /// Whether the present step is to be evaluated still.
    pub(super) evaluation_is_due: bool,
    /// The step that this process began with, and what it had sent to other ranks by then.
    began: (u64, u64),
    _lock: Option<RunLock>,
}

impl<'a> Run<'a> {
    /// Loads the model and opens the folder's logs.
    pub(super) fn open(start: Start, host: &'a Host, mut ranks: Box<dyn Communicator>) -> Result<Self> {
        let Start { job, dir, lock, from, notes, damaged } = start;
        let is_leader = ranks.rank() == 0;
        // One rank writes for all.
        let disk = if is_leader { Arc::clone(&host.disk) } else { Arc::new(Nowhere) as Arc<dyn Disk> };
        let (checkpoint, record) = from.unzip();
        let mut standing = ResumePosition::read(&job, checkpoint.as_deref())?;
        let evaluation_is_due = record.as_ref().is_some_and(|record| record.evaluation_is_due);
        let evaluation_is_due = standing.follow_rank_0(&mut *ranks, evaluation_is_due)?;
        let trainer = standing.trainer(&job, ranks)?;
        // What comes before has changed nothing that could be lost.
        host.requests.wait_for_the_step();

        let begins_again = lock.is_some() && checkpoint.is_none();
        let mut lock = match lock {
            None if is_leader => {
                make_folder(&*disk, &dir)?;
                let lock = RunLock::take(&dir)?;
                // Another process may have been faster.
                refuse_taken_output(&job.model.config)?;
                Some(lock)
            }
            lock => lock,
        };
        let stale = lock.as_mut().and_then(|lock| lock.stale.take());
        if let Some(lock) = &mut lock {
            lock.sign();
        }
        let checkpoints = dir.join(CHECKPOINTS_DIR);
        sweep_incomplete(&*disk, &dir)?;
        sweep_incomplete(&*disk, &checkpoints)?;
        let settings = &job.model.config.train;
        let log_settings = LogSettings {
            last_step: trainer.state.step,
            last_lines: record.as_ref().map(|record| record.metrics_lines),
            total_steps: job.total_steps,
            log_every: settings.log_every,
            is_silent: !is_leader,
        };
        if let Some(adapter) = finished_adapter(&dir) {
            // Its run goes on: it is no longer the final one.
            let aside = adapter_of_step(&dir, trainer.state.step);
            if aside.exists() {
                remove_whole(&*disk, &aside)?;
            }
            disk.rename(&adapter, &aside).map_err(Error::io("rename", &adapter))?;
            sync_parent(&*disk, &aside)?;
        }
        write_config(&*disk, &job.model.config, &dir)?;
        let is_begun_again = begins_again && is_leader;
        let old_metrics = if is_begun_again { keep_old_metrics(&*disk, &dir)? } else { None };
        let mut log = RunLog::open(&disk, &dir, log_settings)?;
        log.banner(&banner::lines(&job)?)?;
        for warning in warnings(&job) {
            log.warn(&warning)?;
        }
        if let Some(stale) = stale {
            log.note(&format!(
                "{stale} had this run before and ended without a word: it was killed, or the machine was"
            ))?;
        }
        if let Some(why) = lock.as_ref().and_then(|lock| lock.missing.as_ref()) {
            log.warn(&format!("{} cannot be locked ({why}): see that no other process uses it", dir.display()))?;
        }
        for (path, error) in &damaged {
            log.warn(&format!("{} is damaged and was passed over: {error}", path.display()))?;
        }
        if is_begun_again {
            let kept = old_metrics.map(|(name, n_lines)| format!("; {n_lines} lines of metrics so far are in {name}"));
            log.warn(&format!(
                "there is no checkpoint to go on from, so the run begins again{}",
                kept.unwrap_or_default()
            ))?;
        }
        for note in &notes {
            log.note(note)?;
        }
        let step = trainer.state.step;
        let world_size = trainer.ranks.world_size();
        if world_size > 1 {
            let sharded = if trainer.params.is_sharded() { ", and the optimizer's state" } else { "" };
            log.note(&format!("{world_size} ranks share each update{sharded}"))?;
        }
        if step > 0 {
            log.note(&format!("goes on from step {step} of {}", job.total_steps))?;
        }
        let keep =
            Keep { newest: settings.keep_checkpoints, best: settings.keep_best, steps: settings.keep_steps.clone() };
        let mut run = Self {
            began: (step, trainer.ranks.sent_bytes()),
            saver: Saver::new(Arc::clone(&disk), checkpoints, keep),
            dir,
            disk,
            requests: &host.requests,
            tell: host.tell,
            job,
            trainer,
            log,
            saved_step: step,
            begun_step: step,
            asked_step: None,
            evaluated: record.as_ref().and_then(|record| record.evaluated),
            evaluation_is_due,
            _lock: lock,
        };
        if run.job.model.device().is_cuda() {
            run.try_largest_micro_batch()?;
        }
        Ok(run)
    }

    /// Holds the memory model against this GPU, and has its allocator take what the run will need, whoever chose the size.
    fn try_largest_micro_batch(&mut self) -> Result<()> {
        let model = &self.job.model;
        let expected = model.memory_model();
        let probed = self.trainer.try_largest(&|tokens| expected.expected(tokens), model.config.data.max_length)?;
        self.log.banner(&banner::probed(&probed))?;
        self.take_note()
    }

    pub(super) fn run_to_end(mut self) -> Result<RunOutcome> {
        let ended = self.steps().and_then(|()| self.end());
        // Whatever ended the run, a checkpoint in flight becomes whole, or the user learns why it did not.
        if let (Err(_), Some((step, Err(error)))) = (&ended, self.saver.wait()) {
            self.log.warn(&format!("the checkpoint of step {step} was not written: {error}"))?;
        }
        ended.map(|()| RunOutcome::Trained)
    }

    fn steps(&mut self) -> Result<()> {
        if self.evaluation_is_due {
            self.after_step()?;
        }
        while self.trainer.state.step < self.job.total_steps {
            let asked = self.asked();
            if let Some(signal) = asked.stop {
                return Err(self.interrupted(signal)?);
            }
            // Before the first step there is nothing to save: the request waits.
            if self.trainer.state.step > 0 && asked.save {
                self.requests.save_is_done();
                self.save_as_asked()?;
            }
            self.trainer.asks = self.requests.counts();
            let stepped = self.step();
            self.log_step(stepped)?;
            self.take_note()?;
            let outcome = self.saver.poll();
            self.was_saved(outcome)?;
            self.after_step()?;
        }
        self.wait_for_the_saver()
    }

    fn end(&mut self) -> Result<()> {
        self.record_traffic()?;
        self.write_adapter()?;
        self.log.flush()
    }

    /// Logs what the ranks had to tell each other, evaluations and checkpoints included.
    fn record_traffic(&mut self) -> Result<()> {
        let ((first, before), ranks) = (self.began, &self.trainer.ranks);
        let (rank, n_steps) = (ranks.rank(), self.trainer.state.step - first);
        if ranks.world_size() == 1 || n_steps == 0 {
            return Ok(());
        }
        let mb = (ranks.sent_bytes() - before) as f64 / n_steps as f64 / 1e6;
        self.log.record(&format!("rank {rank} sent {mb:.6} MB a step to the others"))
    }

    /// Does a step and tells whoever watches how far it is.
    fn step(&mut self) -> Result<Option<StepMetrics>> {
        let Some(tell) = self.tell else { return self.trainer.step() };
        let step = self.trainer.state.step + 1;
        tell(&format!("step {step}"));
        self.trainer.step_by_part(&mut |part| {
            tell(&format!("step {step}, after {part}"));
            Ok(())
        })
    }

    pub(super) fn is_leader(&self) -> bool {
        self.trainer.ranks.rank() == 0
    }

    /// What this process was asked; with other ranks, what all of them know by now that any of them was.
    fn asked(&mut self) -> Agreed {
        match self.trainer.ranks.world_size() {
            1 => Agreed::of(&self.requests.counts()),
            _ => Agreed::of(&std::mem::take(&mut self.trainer.asked)),
        }
    }

    /// Evaluates and saves where the present step asks for it.
    ///
    /// In this order: what comes after the last checkpoint is lost to a run that is killed there, but for the adapter.
    fn after_step(&mut self) -> Result<()> {
        let settings = &self.job.model.config.train;
        let step = self.trainer.state.step;
        let due = |every: u64| every > 0 && (step == self.job.total_steps || step.is_multiple_of(every));
        let saves = due(settings.checkpoint_every) || settings.keep_steps.contains(&step);
        if due(settings.eval_every) || self.evaluation_is_due {
            self.evaluation_is_due = true;
            match self.evaluate() {
                Err(Error::Interrupted { signal, .. }) => return Err(self.interrupted(signal as usize)?),
                outcome => outcome?,
            }
            self.evaluation_is_due = false;
        }
        if saves { self.save() } else { Ok(()) }
    }

    /// Logs what has become known of a step, good or bad.
    fn log_step(&mut self, stepped: Result<Option<StepMetrics>>) -> Result<()> {
        let non_finite = self.trainer.take_non_finite();
        if let Some(found) = &non_finite {
            self.keep_samples(found)?;
        }
        let Some(metrics) = stepped? else { return Ok(()) };
        self.log.step(&metrics)?;
        match non_finite {
            Some(found) => self.log.warn(&found.warning()),
            None if metrics.skipped => self.log.note(&format!("step {} was skipped", metrics.step)),
            None => Ok(()),
        }
    }

    /// Logs what the trainer had to change, and has the run's config say it.
    fn take_note(&mut self) -> Result<()> {
        let Some(note) = self.trainer.take_note() else { return Ok(()) };
        self.log.warn(&note)?;
        let config = &mut self.job.model.config;
        let tokens = self.trainer.settings.micro_batch_tokens.max(config.data.max_length);
        config.train.micro_batch_tokens = Auto::Is(tokens);
        write_config(&*self.disk, config, &self.dir)
    }

    /// Waits until every step that was begun is done and logged, and the state is that of the last of them.
    pub(super) fn finish_steps(&mut self) -> Result<()> {
        let stepped = self.trainer.finish();
        self.log_step(stepped)
    }

    fn evaluate(&mut self) -> Result<()> {
        self.finish_steps()?;
        let Some(validation) = &self.job.validation else { return Ok(()) };
        let started = Instant::now();
        let trainer = &mut self.trainer;
        let tokens = trainer.settings.micro_batch_tokens;
        let result = evaluate(&trainer.model, validation, tokens, &mut *trainer.ranks, &self.requests.stop)?;
        let step = self.trainer.state.step;
        let eval_loss = Some(result.eval_loss).filter(|loss| loss.is_finite());
        self.evaluated = Some(Evaluated { step, eval_loss });
        self.log.eval(&EvalMetrics {
            step,
            eval_loss: result.eval_loss,
            perplexity: result.perplexity,
            samples: result.samples,
            label_tokens: result.label_tokens,
            eval_secs: started.elapsed().as_secs_f64(),
        })
    }

    /// Saves what there is and says how to go on.
    fn interrupted(&mut self, signal: usize) -> Result<Error> {
        self.finish_steps()?;
        self.wait_for_the_saver()?;
        let step = self.trainer.state.step;
        // Rank 0 knows which of its files are whole; all take part in a save.
        let is_unsaved = self.saved_step < step || self.evaluation_is_due;
        if broadcast_bytes(&mut *self.trainer.ranks, vec![u8::from(is_unsaved)])? == [1] {
            self.save()?;
            if let Some((_, Err(error))) = self.saver.wait() {
                return Ok(error);
            }
        }
        let done = match step {
            0 => "no step was done".to_string(),
            step => format!("step {step} is saved"),
        };
        let note = format!("{done}; go on with: bellora resume {}", shell_quoted(&self.dir));
        self.log.record(&note)?;
        self.log.flush()?;
        Ok(Error::Interrupted { signal: signal as i32, note })
    }
}

/// What the user should know before a run starts, though it is no fault.
pub fn warnings(job: &Job) -> Vec<String> {
    let mut warnings: Vec<String> = job.warnings().map(Fault::in_one_line).collect();
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

/// Writes the resolved config: a folder holds a whole one or none.
fn write_config(disk: &dyn Disk, config: &Config, dir: &Path) -> Result<()> {
    put_file(disk, &dir.join(CONFIG_FILE), config.to_toml().as_bytes())
}
