//! What a run keeps on the disk as it goes on: its checkpoints, the samples of steps that went wrong, its adapter.

use std::time::Instant;

use safetensors::Dtype;

use crate::checkpoint::folder::replace_whole;
use crate::checkpoint::save::{Adapter, Snapshot};
use crate::checkpoint::saver;
use crate::checkpoint::state::{Extent, Record};
use crate::config;
use crate::disk::put_file;
use crate::engine::non_finite::NonFinite;
use crate::error::{Error, Result};
use crate::run::folder::ADAPTER_DIR;
use crate::run::requests::forget_saves;
use crate::run::resume_position::computed_on;
use crate::run::training_loop::Run;

/// How who watches a run is told that a checkpoint of so many bytes is being written, and that it is written no more.
pub const SAVES: &str = "writes a checkpoint of bytes:";
/// See [`SAVES`].
pub const SAVED: &str = "wrote a checkpoint";

impl Run<'_> {
    /// Begins to write a checkpoint of the present step. Training waits for the copy, and for an earlier checkpoint that
    /// is still being written.
    pub(super) fn save(&mut self) -> Result<()> {
        self.finish_steps()?;
        self.trainer.compare_with_other_ranks()?;
        self.wait_for_the_saver()?;
        let started = Instant::now();
        let is_leader = self.is_leader();
        let (adapter, moments) = (self.adapter()?, self.trainer.copied_moments(is_leader)?);
        self.begun_step = self.trainer.state.step;
        let (Some(adapter), Some(moments)) = (adapter, moments) else { return Ok(()) };
        let trainer = &self.trainer;
        let mut record = Record::new(
            trainer.state.clone(),
            self.job.identity(),
            Extent { steps_per_epoch: self.job.steps_per_epoch, total_steps: self.job.total_steps },
            computed_on(&self.job),
            self.job.model.config.values_to_keep(),
        );
        record.metrics_lines = self.log.n_lines();
        record.evaluated = self.evaluated;
        record.evaluation_is_due = self.evaluation_is_due;
        let snapshot = Snapshot { adapter, moments, record };
        // Metrics first: a checkpoint never knows of a step whose line could still be lost.
        let log = self.log.durable();
        if let Some(tell) = self.tell {
            tell(&format!("{SAVES} {}", snapshot.n_bytes()));
        }
        self.saver.begin(snapshot, move || log.sync())?;
        let copy_secs = started.elapsed().as_secs_f64();
        self.log.record(&format!("checkpoint of step {}: copied in {copy_secs:.3} s", self.begun_step))
    }

    pub(super) fn save_as_asked(&mut self) -> Result<()> {
        self.finish_steps()?;
        // Steps that were begun meanwhile carried the same request.
        forget_saves(&mut self.trainer.asked);
        let step = self.trainer.state.step;
        if self.begun_step < step {
            self.save()?;
        }
        self.asked_step = Some(step);
        self.tell_if_asked(self.saved_step)
    }

    fn tell_if_asked(&mut self, saved_step: u64) -> Result<()> {
        match self.asked_step.take_if(|asked| *asked == saved_step) {
            Some(step) => self.log.note(&format!("step {step} is saved, as asked by SIGUSR1")),
            None => Ok(()),
        }
    }

    /// The adapter as it is now, on the rank that writes.
    fn adapter(&mut self) -> Result<Option<Adapter>> {
        let is_leader = self.is_leader();
        let tensors = self.trainer.copied_params(is_leader)?;
        let model = &self.job.model;
        Ok(tensors.map(|tensors| Adapter { config: model.adapter_config(), tensors, beside: model.files_beside() }))
    }

    pub(super) fn wait_for_the_saver(&mut self) -> Result<()> {
        let outcome = self.saver.wait();
        self.was_saved(outcome)
    }

    /// Tells what became of a checkpoint. One that a disk would not take costs the save, not the run.
    pub(super) fn was_saved(&mut self, outcome: Option<saver::SaveOutcome>) -> Result<()> {
        let Some((step, saved)) = outcome else { return Ok(()) };
        if let Some(tell) = self.tell {
            tell(SAVED);
        }
        match saved {
            Ok(saved) => {
                self.saved_step = step;
                let mb = saved.bytes as f64 / 1e6;
                self.log
                    .record(&format!("checkpoint of step {step}: {mb:.1} MB written in {:.3} s", saved.write_secs))?;
                self.tell_if_asked(step)?;
                match saved.not_pruned {
                    Some(error) => self.log.warn(&format!("old checkpoints could not be deleted: {error}")),
                    None => Ok(()),
                }
            }
            Err(error @ Error::Io { .. }) => {
                let whole = match self.saved_step {
                    0 => "none is whole yet".to_owned(),
                    step => format!("the newest that is whole is of step {step}"),
                };
                self.log.warn(&format!(
                    "the checkpoint of step {step} could not be written: {error} ({}); {whole}; training goes on",
                    error.advice()
                ))
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn write_adapter(&mut self) -> Result<()> {
        self.finish_steps()?;
        self.trainer.compare_with_other_ranks()?;
        let Some(adapter) = self.adapter()? else { return Ok(()) };
        let table_dtype = match self.job.model.config.train.save_dtype {
            config::Dtype::Fp32 => Dtype::F32,
            config::Dtype::Bf16 => Dtype::BF16,
            config::Dtype::Fp16 => Dtype::F16,
        };
        let dir = self.dir.join(ADAPTER_DIR);
        replace_whole(&*self.disk, &dir, |folder| adapter.write(folder, table_dtype))?;
        self.log.note(&format!("adapter written to {}", dir.display()))
    }

    /// Writes the samples of a step that is not finite into a file of their own.
    pub(super) fn keep_samples(&mut self, found: &NonFinite) -> Result<()> {
        let path = self.dir.join(format!("non_finite-step-{:08}.jsonl", found.step));
        match put_file(&*self.disk, &path, found.to_json_lines().as_bytes()) {
            Ok(()) => self.log.note(&format!("the samples of step {} are in {}", found.step, path.display())),
            // The step's own fault matters more.
            Err(error) => self.log.warn(&format!("the samples of step {} were not kept: {error}", found.step)),
        }
    }
}
