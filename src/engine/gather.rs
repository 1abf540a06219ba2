//! What each rank holds a part of, given to all: the parameters after an update, and numbers.

use tch::{Device, Kind, Tensor};

use crate::comm::Communicator;
use crate::error::Result;
use crate::model::params::{Bucket, ParamBuffer};

/// Has every rank give its shard of a flat buffer to all.
pub(super) fn gather(ranks: &mut dyn Communicator, params: &ParamBuffer, flat: &Tensor) -> Result<()> {
    for Bucket { range, .. } in params.layout().buckets() {
        // Half-precision numbers go as the bytes that they are.
        ranks.all_gather(&flat.f_narrow(0, range.start, range.end - range.start)?.f_view_dtype(Kind::Uint8)?)?;
    }
    ranks.wait()
}

/// Has every rank know a number of each, 0-d i64. Every rank must call this together.
pub(super) fn gather_number(ranks: &mut dyn Communicator, number: &Tensor) -> Result<Vec<i64>> {
    let all = Tensor::f_zeros([ranks.world_size() as i64], (Kind::Int64, number.device()))?;
    all.f_get(ranks.rank() as i64)?.f_copy_(number)?;
    ranks.all_gather(&all)?;
    ranks.wait()?;
    Ok(Vec::try_from(all.f_to_device(Device::Cpu)?)?)
}
