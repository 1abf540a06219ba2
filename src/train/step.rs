//! One optimizer step over the global batch.

use crate::checkpoint::state::RunState;
use crate::config::{Auto, Recompute};
use crate::data::{EpochOrder, build_batches};
use crate::error::{Error, Result};
use crate::eval::input;
use crate::log::StepMetrics;
use crate::model::llama::Llama;
use crate::model::params::{Gradients, ParamBuffer};
use crate::ops::dropout::DropoutKey;
use crate::optim::adamw::AdamW;
use crate::optim::clip;
use crate::train::setup::Job;

/// Everything an update reads and changes.
pub struct Trainer {
    /// The job.
    pub job: Job,
    /// The frozen base with its adapters.
    pub model: Llama,
    /// The trainable parameters.
    pub params: ParamBuffer,
    /// AdamW and its moments.
    pub optimizer: AdamW,
    /// Where the run stands.
    pub state: RunState,
    order: EpochOrder,
    grads: Gradients,
}

impl Trainer {
    /// Gets ready for the step after `state`.
    pub fn new(job: Job, model: Llama, params: ParamBuffer, optimizer: AdamW, state: RunState) -> Result<Self> {
        let settings = &job.model.config;
        let order =
            EpochOrder::new(job.train.len(), settings.train.global_batch, settings.data.shuffle, settings.train.seed);
        let grads = Gradients::new(params.layout(), params.master().device())?;
        Ok(Self { job, model, params, optimizer, state, order, grads })
    }

    /// Does one step. The samples it takes are consumed even if the update is skipped: for want of label tokens, or
    /// because fp16 overflowed.
    ///
    /// # Errors
    /// A loss or gradient that is not finite where no loss scale could mend it.
    pub fn step(&mut self) -> Result<StepMetrics> {
        let started = std::time::Instant::now();
        let settings = &self.job.model.config.train;
        let samples = self.order.step_samples(self.state.step);
        let batches = build_batches(
            &self.job.train,
            &samples,
            self.job.model.loss_average(),
            self.job.model.micro_batch_tokens(),
        );
        let lr = self.job.schedule.lr(self.state.updates);
        let loss_scale = self.state.loss_scale.factor();
        let recompute = settings.recompute == Auto::Is(Recompute::All);

        self.grads.zero()?;
        let mut loss = 0.0;
        for packed in &batches {
            let batch = self.model.batch(input(packed), self.dropout())?;
            let (hidden_nd, saved) = self.model.forward(&batch, recompute)?;
            let (batch_loss, dhidden_nd) = self.model.head_loss(&hidden_nd, &batch, &self.grads, loss_scale)?;
            drop(hidden_nd);
            self.model.backward(saved, dhidden_nd, &batch, &self.grads)?;
            loss += batch_loss;
        }
        let norm = clip::norm(self.grads.flat())? / loss_scale;

        let is_finite = loss.is_finite() && norm.is_finite();
        if !is_finite && !self.state.loss_scale.is_dynamic() {
            return Err(self.not_finite(loss, norm, &samples));
        }
        let skipped = batches.is_empty() || !is_finite;
        if !skipped {
            let coefficient = clip::coefficient(norm, settings.max_grad_norm);
            let update = self.state.updates + 1;
            self.optimizer.step(&mut self.params, &mut self.grads, lr, update, coefficient / loss_scale)?;
            self.state.updates = update;
        }
        if !batches.is_empty() {
            self.state.loss_scale.update(is_finite);
        }
        self.state.step += 1;

        let tokens: usize = samples.iter().map(|&s| self.job.train.ids(s as usize).len()).sum();
        let step_secs = started.elapsed().as_secs_f64();
        Ok(StepMetrics {
            step: self.state.step,
            loss: (!batches.is_empty()).then_some(loss),
            grad_norm: (!batches.is_empty()).then_some(norm),
            lr,
            samples: samples.len() as u64,
            tokens: tokens as u64,
            label_tokens: batches.iter().map(|b| b.label_tokens as u64).sum(),
            step_secs,
            tokens_per_s: tokens as f64 / step_secs,
            loss_scale,
            skipped,
        })
    }

    fn dropout(&self) -> Option<DropoutKey> {
        let p = self.job.model.lora.dropout;
        // A run of more than 2^32 steps would repeat its masks.
        (p > 0.0).then_some(DropoutKey { p, seed: self.job.model.config.train.seed, step: self.state.step as u32 })
    }

    fn not_finite(&self, loss: f64, norm: f64, samples: &[u32]) -> Error {
        let what = format!("loss {loss}, gradient norm {norm}: not finite; the step was not applied");
        let first: Vec<String> = samples.iter().take(3).map(|&s| self.job.train.place(s as usize)).collect();
        Error::failed(format!("step {}", self.state.step + 1), what).hint(format!(
            "{}; the step's samples begin with {}; the newest checkpoint is from before this step",
            match self.state.updates {
                0 => "nothing has been trained yet, so the base or the initial adapter may hold NaN: download it again",
                _ => "lower train.learning_rate or set train.max_grad_norm",
            },
            first.join(", ")
        ))
    }
}
