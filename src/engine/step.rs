//! One optimizer step over the global batch.

use std::collections::VecDeque;
use std::time::Instant;

use tch::Kind;

use crate::batch::PackedBatch;
use crate::comm::{Communicator, Solo};
use crate::data::{Dataset, EpochOrder, LossAverage, Share, build_batches, build_share};
use crate::engine::gather::gather;
use crate::engine::metrics::StepMetrics;
use crate::engine::non_finite::{NonFinite, SampleLoss};
use crate::engine::optim::adamw::AdamW;
use crate::engine::optim::control::{Asks, Reading, StepControl, UpdateOutcome};
use crate::engine::optim::loss_scale;
use crate::engine::optim::schedule::LrSchedule;
use crate::engine::reduce::{Reducer, touched_ids};
use crate::engine::state::TrainState;
use crate::error::{Error, Result};
use crate::model::decoder::{Decoder, Done};
use crate::model::params::{Gradients, ParamBuffer};
use crate::ops::dropout::DropoutKey;
use crate::progress::Work;

/// What an update depends on besides its samples and the run's state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSettings {
    /// Of order and dropout.
    pub seed: u64,
    /// Samples an update.
    pub global_batch: usize,
    /// Whether an epoch's order is drawn.
    pub shuffle: bool,
    /// Tokens a micro-batch may hold.
    pub micro_batch_tokens: usize,
    /// Whether blocks are run again in backward.
    pub recompute: bool,
    /// How the losses of an update are averaged.
    pub loss_average: LossAverage,
    /// Share of the adapters' inputs that is dropped.
    pub dropout: f64,
    /// The norm that gradients are clipped to; 0 clips nothing.
    pub max_grad_norm: f64,
    /// Updates of a run that are passed over because their numbers are not finite; one more is an error.
    pub max_non_finite: u64,
    /// The learning rate.
    pub schedule: LrSchedule,
}

/// The parts of a step, in the order in which each micro-batch goes through them; the last is of the step as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepPart {
    /// Packing, upload, gradients set to zero.
    Input,
    /// Embedding and blocks.
    Forward,
    /// The head over the learned rows, the loss, both with their backward.
    Head,
    /// Back through the blocks.
    Backward,
    /// The gradient's norm, the decision, AdamW, the compute copy.
    Optimizer,
}

impl std::fmt::Display for StepPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Head => "head and loss",
            Self::Backward => "backward",
            Self::Optimizer => "optimizer",
        })
    }
}

/// Everything an update reads and changes.
pub struct Trainer {
    /// What updates depend on.
    pub settings: StepSettings,
    /// The samples to learn.
    pub samples: Dataset,
    /// The frozen base with its adapters.
    pub model: Decoder,
    /// The trainable parameters.
    pub params: ParamBuffer,
    /// AdamW and its moments.
    pub optimizer: AdamW,
    /// Steps that may be begun before the outcome of the first of them is asked for: 1 on a GPU, which then always has
    /// work, none on a CPU.
    pub steps_ahead: usize,
    /// Where the run stands. `step` counts the steps that were begun; the rest is as of the last one whose outcome is
    /// known, and agrees with it after [`Self::finish`].
    pub state: TrainState,
    /// The ranks that share each update.
    pub ranks: Box<dyn Communicator>,
    /// What this rank asks of all with the next step.
    pub asks: Asks,
    /// What was asked by any rank with the steps whose outcomes are known; whoever acts on it sets it back.
    pub asked: Asks,
    order: EpochOrder,
    pub(super) grads: Gradients,
    control: StepControl,
    /// Steps begun whose outcome is not known yet, the oldest first.
    outstanding: VecDeque<Begun>,
    /// When the last outcome became known.
    last_known: Option<Instant>,
    pub(super) note: Option<String>,
    non_finite: Option<NonFinite>,
}

/// A step that was begun.
struct Begun {
    /// Counted from 1.
    step: u64,
    samples: Vec<u32>,
    started: Instant,
    /// `None` when nothing was to be learned.
    reading: Option<Reading>,
}

/// What became of the gradients of an update, the same on every rank.
enum Accumulated {
    /// They are there, summed over the ranks.
    Complete,
    /// The memory of some rank ran out, and what there is of them is of no use; with the error where it was this one's.
    OutOfMemory(Option<Error>),
}

impl Trainer {
    /// Gets ready for the step after `state`.
    pub fn new(
        settings: StepSettings,
        samples: Dataset,
        model: Decoder,
        params: ParamBuffer,
        optimizer: AdamW,
        state: TrainState,
    ) -> Result<Self> {
        let StepSettings { seed, global_batch, shuffle, max_grad_norm, schedule, .. } = settings;
        let device = params.device();
        let order = EpochOrder::new(samples.len(), global_batch, shuffle, seed);
        let grads = Gradients::new(params.layout(), device)?;
        let control = StepControl::new(schedule, max_grad_norm, state.loss_scale, state.updates, device)?;
        Ok(Self {
            settings,
            samples,
            model,
            params,
            optimizer,
            steps_ahead: usize::from(device.is_cuda()),
            state,
            ranks: Box::new(Solo),
            asks: Asks::default(),
            asked: Asks::default(),
            order,
            grads,
            control,
            outstanding: VecDeque::new(),
            last_known: None,
            note: None,
            non_finite: None,
        })
    }

    /// Does one step and gives the metrics that have become known by it: its own on a CPU, those of the step before on
    /// a GPU, which is still at work on this one.
    ///
    /// The samples it takes are consumed even if the update is skipped: for want of label tokens, because fp16
    /// overflowed, or because the loss or a gradient is not finite otherwise and the settings let that pass.
    ///
    /// # Errors
    /// A loss or gradient that is not finite where no loss scale could mend it, once more than the settings let pass; that
    /// update was not applied. [`Self::take_non_finite`] tells of it.
    pub fn step(&mut self) -> Result<Option<StepMetrics>> {
        self.step_by_part(&mut |_| Ok(()))
    }

    /// [`Self::step`], with `after` called when a part of it is done: queued at least, on a GPU.
    ///
    /// # Errors
    /// As [`Self::step`], and those of `after`.
    pub fn step_by_part(&mut self, after: &mut dyn FnMut(StepPart) -> Result<()>) -> Result<Option<StepMetrics>> {
        let started = Instant::now();
        let samples = self.next_samples();
        let reading = self.update(&samples, after)?;
        self.state.step += 1;
        self.outstanding.push_back(Begun { step: self.state.step, samples, started, reading });
        if self.outstanding.len() > self.steps_ahead { self.oldest_outcome() } else { Ok(None) }
    }

    /// Waits for the device and gives the metrics that are outstanding, if any.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn finish(&mut self) -> Result<Option<StepMetrics>> {
        self.oldest_outcome()
    }

    /// One update over samples; `None` when there is nothing in them to learn.
    fn update(&mut self, samples: &[u32], after: &mut dyn FnMut(StepPart) -> Result<()>) -> Result<Option<Reading>> {
        if samples.iter().all(|&sample| self.samples.label_tokens(sample as usize) == 0) {
            return Ok(None);
        }
        let share = Share { rank: self.ranks.rank(), world_size: self.ranks.world_size() };
        loop {
            let StepSettings { loss_average, micro_batch_tokens, .. } = self.settings;
            let batches = build_share(&self.samples, samples, loss_average, micro_batch_tokens, share);
            match self.accumulate(samples, &batches, after)? {
                Accumulated::Complete => break,
                // Nothing has been applied yet: the update begins again, on every rank.
                Accumulated::OutOfMemory(error) => self.halve_micro_batches(&batches, error)?,
            }
        }
        let outstanding = self.outstanding.len() as u64;
        let (decision, reading) = self.control.decide(self.state.updates, outstanding)?;
        self.optimizer.step(&mut self.params, &self.grads, &decision)?;
        if self.params.is_sharded() {
            gather(&mut *self.ranks, &self.params, &self.params.compute()?)?;
        }
        after(StepPart::Optimizer)?;
        Ok(Some(reading))
    }

    /// Loss, gradients and their norm over the micro-batches of this rank's share of an update, summed over the ranks.
    ///
    /// A rank whose memory runs out still hands over all that the others wait for, and so all of them learn of it.
    fn accumulate(
        &mut self,
        samples: &[u32],
        batches: &[PackedBatch],
        after: &mut dyn FnMut(StepPart) -> Result<()>,
    ) -> Result<Accumulated> {
        let dropout = self.dropout(self.state.step);
        let step = &self.state.step;
        let Self { model, grads, control, ranks, params, settings, .. } = self;
        let is_alone = ranks.world_size() == 1;
        grads.zero()?;
        control.begin(self.asks)?;
        let touched = if is_alone { Vec::new() } else { touched_ids(&self.samples, samples) };
        let mut reducer = Reducer::new(&mut **ranks, params, grads, &touched);
        let n_tokens = |packed: &PackedBatch| packed.n_tokens() as u64;
        let work = Work::begin(format!("step {}", *step + 1), "tokens", batches.iter().map(n_tokens).sum());
        let mut ran_out = None;
        for (nth, packed) in (1..).zip(batches) {
            let mut pass = || -> Result<()> {
                let mut completed = |done: Done| match nth == batches.len() {
                    true => reducer.completed(done),
                    false => Ok(()),
                };
                let batch = model.batch(packed, dropout)?;
                after(StepPart::Input)?;
                let (hidden_nd, saved) = model.forward(&batch, settings.recompute)?;
                after(StepPart::Forward)?;
                let dhidden_nd = model.head_loss(&hidden_nd, &batch, grads, &control.loss)?;
                completed(Done::Head)?;
                after(StepPart::Head)?;
                drop(hidden_nd);
                model.backward(saved, dhidden_nd, &batch, grads, &mut completed)?;
                after(StepPart::Backward)
            };
            match pass() {
                Err(error) if error.is_out_of_memory() => {
                    ran_out = Some(error);
                    break;
                }
                passed => passed?,
            }
            work.advance(n_tokens(packed));
        }
        if ran_out.is_some() {
            if is_alone {
                return Ok(Accumulated::OutOfMemory(ran_out));
            }
            control.note_out_of_memory()?;
        }
        // The norm of a shard is a part of the whole, and is summed; gradients that are whole have the same one everywhere.
        let is_sharded = params.is_sharded();
        reducer.finish((!is_sharded).then_some(&control.shared))?;
        control.take_norm(&params.shard().of_whole(grads.flat())?)?;
        if is_sharded {
            ranks.all_reduce(&control.shared)?;
            ranks.wait()?;
        }
        let is_complete = is_alone || !control.is_out_of_memory()?;
        Ok(if is_complete { Accumulated::Complete } else { Accumulated::OutOfMemory(ran_out) })
    }

    /// What the user should know of the last step, once.
    pub fn take_note(&mut self) -> Option<String> {
        self.note.take()
    }

    /// The samples that the next step will take.
    pub fn next_samples(&mut self) -> Vec<u32> {
        self.order.step_samples(self.state.step)
    }

    /// What happened in the last step whose numbers were not finite, once.
    pub fn take_non_finite(&mut self) -> Option<NonFinite> {
        self.non_finite.take()
    }

    /// The loss of each sample of a step by itself, with the parameters as they are now: the mean over its label tokens,
    /// under the dropout that it has in that step. `step` counts from 1; `samples` are the step's, in their order.
    ///
    /// Every sample goes through the model alone, so that none can touch another's numbers; the step's own loss comes
    /// from micro-batches and is their mean to rounding only.
    pub fn sample_losses(&self, step: u64, samples: &[u32]) -> Result<Vec<SampleLoss>> {
        let mut losses = self.without_losses(step, samples);
        // No two documents fit into one token.
        for packed in build_batches(&self.samples, samples, self.settings.loss_average, 1) {
            let nll = self.model.nll(&self.model.batch(&packed, self.dropout(step - 1))?)?;
            let sum = nll.f_sum(Kind::Double)?.f_double_value(&[])?;
            losses[packed.slots[0] as usize].loss = Some(sum / packed.label_tokens() as f64);
        }
        Ok(losses)
    }

    /// The samples of a step, their losses not known yet.
    fn without_losses(&self, step: u64, samples: &[u32]) -> Vec<SampleLoss> {
        let described = samples.iter().enumerate().map(|(slot, &sample)| SampleLoss {
            step,
            place: self.samples.place(sample as usize),
            slot,
            tokens: self.samples.ids(sample as usize).len(),
            label_tokens: self.samples.label_tokens(sample as usize),
            loss: None,
        });
        described.collect()
    }

    /// The dropout of the step after `step` others.
    fn dropout(&self, step: u64) -> Option<DropoutKey> {
        let StepSettings { dropout: p, seed, .. } = self.settings;
        // A run of more than 2^32 steps would repeat its masks.
        (p > 0.0).then_some(DropoutKey { p, seed, step: step as u32 })
    }

    /// Waits for the outcome of the oldest step that is outstanding, and brings the state up to it.
    fn oldest_outcome(&mut self) -> Result<Option<StepMetrics>> {
        let Some(Begun { step, samples, started, reading }) = self.outstanding.pop_front() else { return Ok(None) };
        let (lr, loss_scale) = (self.settings.schedule.lr(self.state.updates), self.state.loss_scale.factor());
        let outcome = reading.map(Reading::wait).transpose()?;
        for (asked, asks) in self.asked.iter_mut().zip(outcome.iter().flat_map(|outcome| outcome.asks)) {
            *asked += asks;
        }
        if let Some(outcome) = &outcome {
            if !outcome.is_finite && outcome.loss_scale <= loss_scale::SMALLEST {
                self.not_finite(step, outcome, &samples)?;
            }
            self.state.updates += u64::from(outcome.is_finite);
            self.state.loss_scale = outcome.next_scale;
        }
        let sum = |count: &dyn Fn(usize) -> usize| samples.iter().map(|&s| count(s as usize) as u64).sum::<u64>();
        let tokens = sum(&|sample| self.samples.ids(sample).len());
        let label_tokens = sum(&|sample| self.samples.label_tokens(sample));
        let begun = self.last_known.map_or(started, |known| known.max(started));
        let now = Instant::now();
        self.last_known = Some(now);
        let step_secs = (now - begun).as_secs_f64();
        Ok(Some(StepMetrics {
            step,
            loss: outcome.map(|o| o.loss),
            grad_norm: outcome.map(|o| o.grad_norm),
            lr,
            samples: samples.len() as u64,
            tokens,
            label_tokens,
            step_secs,
            tokens_per_s: tokens as f64 / step_secs,
            loss_scale,
            skipped: outcome.is_none_or(|o| !o.is_finite),
        }))
    }

    /// Remembers a step whose numbers are not finite and counts it.
    ///
    /// # Errors
    /// It is one more than the settings let pass.
    fn not_finite(&mut self, step: u64, outcome: &UpdateOutcome, samples: &[u32]) -> Result<()> {
        let &UpdateOutcome { loss, grad_norm, loss_scale, .. } = outcome;
        // This is told even where the device has no room or no strength left to look closer.
        let losses = self.sample_losses(step, samples).unwrap_or_else(|_| self.without_losses(step, samples));
        let found = NonFinite {
            step,
            loss,
            grad_norm,
            loss_scale,
            is_fp16: self.state.loss_scale.is_dynamic(),
            nth: self.state.non_finite + 1,
            allowed: self.settings.max_non_finite,
            steps_since: self.outstanding.len() as u64,
            samples: losses,
        };
        let found = self.non_finite.insert(found);
        if found.ends_the_run() {
            let advice = match self.state.updates {
                _ if found.is_fp16 => {
                    "fp16 is too narrow for this model or rate: model.dtype = \"bf16\", or a lower train.learning_rate"
                }
                0 => "nothing has been trained yet, so the base or the initial adapter may hold NaN: download it again",
                _ => "lower train.learning_rate or set train.max_grad_norm",
            };
            return Err(found.error(advice));
        }
        self.state.non_finite = found.nth;
        Ok(())
    }
}
