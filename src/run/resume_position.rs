//! Where a run stands: its parameters, moments and position, from a checkpoint, from its start, or from rank 0.

use std::path::Path;

use tch::Device;

use crate::checkpoint::load;
use crate::checkpoint::state::{ComputedOn, Identity};
use crate::comm::{Communicator, broadcast_bytes};
use crate::device::{Cuda, cuda};
use crate::engine::optim::adamw::{AdamW, AdamWConfig};
use crate::engine::optim::loss_scale::LossScale;
use crate::engine::state::TrainState;
use crate::engine::step::Trainer;
use crate::error::{Error, Result};
use crate::model::params::ParamBuffer;
use crate::run::setup::Job;
use crate::torch::memory;

/// What a run stands at: its parameters and moments, all of them, and its position.
pub(super) struct ResumePosition {
    params: ParamBuffer,
    optimizer: AdamW,
    state: TrainState,
    identity: Identity,
}

impl ResumePosition {
    /// As it was at a checkpoint, or at the start of the run.
    ///
    /// # Errors
    /// A checkpoint or a base that cannot be read.
    pub(super) fn read(job: &Job, checkpoint: Option<&Path>) -> Result<Self> {
        let settings = &job.model.config.train;
        let mut params = job.model.initial_params()?;
        let adamw = AdamWConfig { betas: settings.betas, eps: settings.eps, weight_decay: settings.weight_decay };
        let optimizer = AdamW::new(adamw, &params)?;
        let state = match checkpoint {
            Some(dir) => {
                let moments = optimizer.named_moments(params.layout())?;
                load::load(dir, &mut params, &moments)?.state
            }
            None => TrainState::start(LossScale::of(job.model.kind())),
        };
        // What a checkpoint says of this was held against it before; one of an older format says less.
        Ok(Self { params, optimizer, state, identity: job.identity() })
    }

    /// Takes on, on every rank, what rank 0 stands at, and whether an evaluation is due there.
    ///
    /// # Errors
    /// Another base or other samples than those of rank 0.
    pub(super) fn follow_rank_0(&mut self, ranks: &mut dyn Communicator, evaluation_is_due: bool) -> Result<bool> {
        if ranks.world_size() == 1 {
            return Ok(evaluation_is_due);
        }
        let text = serde_json::to_vec(&(&self.state, &self.identity, evaluation_is_due))
            .expect("numbers and strings make JSON");
        let text = broadcast_bytes(ranks, text)?;
        let (state, identity, evaluation_is_due): (TrainState, Identity, bool) = serde_json::from_slice(&text)
            .map_err(|error| Error::failed("rank 0", format!("says where the run stands in other words: {error}")))?;
        if identity != self.identity {
            let what = if identity.base == self.identity.base { "other samples" } else { "another base" };
            let place = format!("rank {}", ranks.rank());
            return Err(Error::failed(place, format!("has {what} than rank 0"))
                .hint("give all machines the same files under the same names"));
        }
        self.state = state;
        let master = self.params.master();
        let moments = self.optimizer.moments().map(|(_, moment)| moment);
        // At the start of a run all moments are zero.
        for flat in master.into_iter().chain(moments.into_iter().filter(|_| self.state.step > 0)) {
            ranks.broadcast(flat, 0)?;
        }
        ranks.wait()?;
        self.params.refresh_compute()?;
        Ok(evaluation_is_due)
    }

    /// Loads the model and goes on from here. Where the optimizer is sharded, only this rank's part of it stays.
    ///
    /// # Errors
    /// A base that cannot be read.
    pub(super) fn trainer(self, job: &Job, ranks: Box<dyn Communicator>) -> Result<Trainer> {
        let Self { mut params, mut optimizer, state, identity: _ } = self;
        if job.model.shards() {
            let shard = params.layout().shard(ranks.rank(), ranks.world_size());
            optimizer.keep(&shard)?;
            params.keep(shard)?;
            memory::release_cached(params.device())?;
        }
        let model = job.model.load(&params)?;
        let mut trainer = Trainer::new(job.step_settings(), job.train.clone(), model, params, optimizer, state)?;
        trainer.ranks = ranks;
        Ok(trainer)
    }
}

/// What decides how a job's sums are rounded on this machine.
pub(super) fn computed_on(job: &Job) -> ComputedOn {
    let device = match (job.model.device(), cuda()) {
        (Device::Cuda(_), Cuda::Usable(gpu)) => gpu.name.clone(),
        _ => "cpu".to_owned(),
    };
    ComputedOn { device, threads: tch::get_num_threads(), ranks: job.model.n_ranks }
}
