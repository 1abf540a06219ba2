//! Where a run stands: its parameters, moments and position, from a checkpoint, from its start, or from rank 0.

use std::path::Path;

use tch::{Device, Kind};

use crate::checkpoint::load;
use crate::checkpoint::state::{ComputedOn, RunState};
use crate::comm::broadcast_bytes;
use crate::device::{Cuda, cuda};
use crate::error::{Error, Result};
use crate::optim::adamw::{AdamW, AdamWConfig};
use crate::optim::scaler::LossScale;
use crate::train::setup::Job;
use crate::train::step::Trainer;

/// A job's trainer as it stood at a checkpoint, or at the start of the run.
///
/// # Errors
/// A checkpoint or a base that cannot be read.
pub(super) fn trainer_at(job: &Job, checkpoint: Option<&Path>) -> Result<Trainer> {
    let settings = &job.model.config.train;
    let mut params = job.model.initial_params()?;
    let adamw = AdamWConfig { betas: settings.betas, eps: settings.eps, weight_decay: settings.weight_decay };
    let optimizer = AdamW::new(adamw, &params)?;
    let state = match checkpoint {
        Some(dir) => {
            let moments = optimizer.named_moments(params.layout())?;
            load::load(dir, &mut params, &moments)?.state
        }
        None => {
            let scale = match job.model.kind() {
                Kind::Half => LossScale::dynamic(),
                _ => LossScale::none(),
            };
            RunState::start(scale, job.identity())
        }
    };
    let model = job.model.load(&params)?;
    Trainer::new(job.step_settings(), job.train.clone(), model, params, optimizer, state)
}

/// What decides how a job's sums are rounded on this machine.
pub(super) fn computed_on(job: &Job) -> ComputedOn {
    let device = match (job.model.device(), cuda()) {
        (Device::Cuda(_), Cuda::Usable(gpu)) => gpu.name.clone(),
        _ => "cpu".to_owned(),
    };
    ComputedOn { device, threads: tch::get_num_threads() }
}

/// Gives every rank the parameters, the moments and the position of rank 0, and whether an evaluation is due there.
///
/// # Errors
/// Another base or other samples than those of rank 0.
pub(super) fn stand_where_rank_0_does(trainer: &mut Trainer, evaluation_is_due: bool) -> Result<bool> {
    if trainer.ranks.world_size() == 1 {
        return Ok(evaluation_is_due);
    }
    let own = trainer.state.identity.clone();
    let text = serde_json::to_vec(&(&trainer.state, evaluation_is_due)).expect("numbers and strings make JSON");
    let text = broadcast_bytes(&mut *trainer.ranks, text)?;
    let (state, evaluation_is_due): (RunState, bool) = serde_json::from_slice(&text)
        .map_err(|error| Error::failed("rank 0", format!("says where the run stands in other words: {error}")))?;
    if state.identity != own {
        let what = if state.identity.base == own.base { "other samples" } else { "another base" };
        let place = format!("rank {}", trainer.ranks.rank());
        return Err(Error::failed(place, format!("has {what} than rank 0"))
            .hint("give all machines the same files under the same names"));
    }
    trainer.ranks.broadcast(trainer.params.master(), 0)?;
    for moment in trainer.optimizer.moments() {
        trainer.ranks.broadcast(moment, 0)?;
    }
    trainer.ranks.wait()?;
    trainer.stand_at(state)?;
    Ok(evaluation_is_due)
}
