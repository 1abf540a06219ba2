//! What a run begins with: its job, its place, and the process that it lives in.

use std::path::PathBuf;
use std::sync::Arc;

use crate::checkpoint::state::Record;
use crate::disk::Disk;
use crate::error::Error;
use crate::run::lock::RunLock;
use crate::run::requests::Requests;
use crate::run::setup::Job;

/// What a run is given beside its config.
#[derive(Debug)]
pub struct Host {
    /// Where it writes.
    pub disk: Arc<dyn Disk>,
    /// What is asked of it while it goes on.
    pub requests: Requests,
    /// Told how far the run is, where somebody watches it.
    pub tell: Option<fn(&str)>,
    /// Ranks of the job that share this machine's memory, this one included.
    pub n_local_ranks: usize,
}

/// A run that may begin.
pub(super) struct Start {
    pub(super) job: Job,
    pub(super) dir: PathBuf,
    /// Of the folder that is there; a new one has none yet.
    pub(super) lock: Option<RunLock>,
    /// The checkpoint to go on from, with what it says.
    pub(super) from: Option<(PathBuf, Record)>,
    /// What the user should know.
    pub(super) notes: Vec<String>,
    /// Newer checkpoints that were passed over.
    pub(super) damaged: Vec<(PathBuf, Error)>,
}
