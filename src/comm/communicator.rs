//! The collective operations, whatever carries them.

use std::fmt::Debug;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// The collective operations between the ranks of a job.
///
/// Operations are queued: they are carried out in the order of the calls, which must be the same on every rank. A tensor
/// that was handed over must not be touched before [`Communicator::wait`] has returned. Tensors are contiguous, on the
/// device of the communicator, fp32 or fp64 (broadcast and all_gather: also u8 and i64). After an error the communicator is of no use any
/// more: every later call gives that error again.
///
/// # Errors
/// All of them: a rank that left, died or does not answer, ranks that disagree about the order of the operations, a
/// tensor that does not fit the operation.
pub trait Communicator: Debug + Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks the job has.
    fn world_size(&self) -> usize;

    /// Where the tensors lie that it takes.
    fn device(&self) -> Device;

    /// Sums over the ranks, in place.
    fn all_reduce(&mut self, tensor: &Tensor) -> Result<()>;

    /// The tensor is `world_size` equal parts; afterwards the part of this rank holds the sum over the ranks, the others
    /// what they held or part of it.
    fn reduce_scatter(&mut self, tensor: &Tensor) -> Result<()>;

    /// The tensor is `world_size` equal parts, of which this rank gives its own; afterwards it holds all.
    fn all_gather(&mut self, tensor: &Tensor) -> Result<()>;

    /// Copies the tensor of rank `root` to all ranks.
    fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<()>;

    /// Waits until every queued operation is done here; errors of any of them come out here (or at the next call).
    fn wait(&mut self) -> Result<()>;

    /// Waits until every rank has come here.
    fn barrier(&mut self) -> Result<()>;

    /// Bytes this rank has sent so far (for figures).
    fn sent_bytes(&self) -> u64;
}

/// Gives every rank the bytes of rank 0.
///
/// # Errors
/// As [`Communicator`].
pub fn broadcast_bytes(ranks: &mut dyn Communicator, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if ranks.world_size() == 1 {
        return Ok(bytes);
    }
    let device = ranks.device();
    let length = Tensor::f_from_slice(&[bytes.len() as i64])?.f_to_device(device)?;
    ranks.broadcast(&length, 0)?;
    ranks.wait()?;
    let length = length.f_int64_value(&[0])?;
    let text = match ranks.rank() {
        0 => Tensor::f_from_slice(&bytes)?.f_to_device(device)?,
        _ => Tensor::f_zeros([length], (Kind::Uint8, device))?,
    };
    ranks.broadcast(&text, 0)?;
    ranks.wait()?;
    Ok(Vec::<u8>::try_from(text.f_to_device(Device::Cpu)?)?)
}

pub(super) fn check_root(root: usize, world_size: usize) -> Result<()> {
    if root < world_size {
        return Ok(());
    }
    Err(Error::failed("broadcast", format!("rank {root} is to send, but there are only {world_size} ranks (from 0)")))
}
