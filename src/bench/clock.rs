//! The clock: whole updates undisturbed, and the parts of a step.

use std::time::Instant;

use serde::Serialize;
use tch::Device;

use crate::engine::metrics::StepMetrics;
use crate::engine::step::{StepPart, Trainer};
use crate::error::Result;
use crate::torch::memory::synchronize;

/// An update that was timed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Update {
    /// Samples it took.
    pub samples: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Those of them that were learned.
    pub label_tokens: u64,
    /// From the outcome of the update before to its own.
    pub secs: f64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// The loss; `None` when nothing was to be learned.
    pub loss: Option<f64>,
    /// Whether it was left out, its gradients not being finite.
    pub skipped: bool,
}

/// Does `n` updates as a training does, without waiting for the device within them. `each` hears how many are done.
pub(super) fn time_updates(trainer: &mut Trainer, n: u64, device: Device, each: &dyn Fn(usize)) -> Result<Vec<Update>> {
    let mut updates = Vec::new();
    synchronize(device)?;
    let mut known = Instant::now();
    let mut note = |metrics: Option<StepMetrics>| {
        // On a GPU an outcome becomes known while the next update is at work already.
        let Some(metrics) = metrics else { return };
        let secs = known.elapsed().as_secs_f64();
        known = Instant::now();
        let StepMetrics { samples, tokens, label_tokens, loss, skipped, .. } = metrics;
        updates.push(Update { samples, tokens, label_tokens, secs, tokens_per_s: tokens as f64 / secs, loss, skipped });
        each(updates.len());
    };
    for _ in 0..n {
        note(trainer.step()?);
    }
    note(trainer.finish()?);
    Ok(updates)
}

/// Seconds an update, by part.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Parts {
    /// Updates over which this is the mean.
    pub updates: u64,
    /// Packing, upload, gradients set to zero.
    pub input_secs: f64,
    /// Embedding and blocks.
    pub forward_secs: f64,
    /// The head over the learned rows, the loss, their backward.
    pub head_secs: f64,
    /// Back through the blocks.
    pub backward_secs: f64,
    /// The gradient's norm, clipping, AdamW, the compute copy.
    pub optimizer_secs: f64,
}

impl Parts {
    /// Each part's name and seconds.
    pub fn named(&self) -> [(&'static str, f64); 5] {
        [
            ("input", self.input_secs),
            ("forward", self.forward_secs),
            ("head and loss", self.head_secs),
            ("backward", self.backward_secs),
            ("optimizer", self.optimizer_secs),
        ]
    }
}

/// Does `n` updates and waits for the device at the end of every part of each.
pub(super) fn time_parts(trainer: &mut Trainer, n: u64, device: Device) -> Result<Parts> {
    let mut parts = Parts { updates: n, ..Parts::default() };
    synchronize(device)?;
    let mut last = Instant::now();
    let mut after = |part: StepPart| -> Result<()> {
        synchronize(device)?;
        let secs = match part {
            StepPart::Input => &mut parts.input_secs,
            StepPart::Forward => &mut parts.forward_secs,
            StepPart::Head => &mut parts.head_secs,
            StepPart::Backward => &mut parts.backward_secs,
            StepPart::Optimizer => &mut parts.optimizer_secs,
        };
        *secs += last.elapsed().as_secs_f64() / n as f64;
        last = Instant::now();
        Ok(())
    };
    for _ in 0..n {
        trainer.step_by_part(&mut after)?;
    }
    trainer.finish()?;
    Ok(parts)
}
