//! The collectives: on a GPU by NCCL, with one rank that is alone; on a CPU between two ranks over TCP.

use std::sync::Arc;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use crate::comm::{Communicator, Nccl, Place, Rendezvous, Tcp, fresh_token};
use crate::error::{Error, Result};
use crate::selftest::judge::{Row, largest_error};
use crate::torch::number::{WithNumber, range};

/// How long the ranks wait for each other.
const WAIT: Duration = Duration::from_secs(60);

/// Elements of each tensor: several pieces of a TCP operation.
const N: i64 = 140_000;

/// Tries every operation. Whole numbers are added up, so that every result is exact.
pub(super) fn try_all(device: Device) -> Vec<Row> {
    let found = on_all_ranks(device);
    found.unwrap_or_else(|error| vec![Row::without_result("collectives", Kind::Float, error.to_string())])
}

fn on_all_ranks(device: Device) -> Result<Vec<Row>> {
    let world_size = if device.is_cuda() { 1 } else { 2 };
    let token = fresh_token()?.into_bytes();
    let rendezvous = Rendezvous::listen(Place::LOOPBACK, world_size, &token, WAIT)?;
    let address = rendezvous.address().to_string();
    let on_rank = |rank: usize| -> Result<Vec<Row>> {
        let tcp = Tcp::join(&Place {
            rank,
            world_size,
            address: address.clone(),
            interface: Place::LOOPBACK,
            token: token.clone(),
            deadline: WAIT,
            timeout: WAIT,
            link_timeout: WAIT,
            came: Arc::default(),
        })?;
        match device {
            Device::Cuda(_) => trial(&mut Nccl::new(tcp, device, WAIT)?),
            _ => trial(&mut { tcp }),
        }
    };
    let of_each = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || on_rank(rank))).collect();
        let ended = |rank: std::thread::ScopedJoinHandle<'_, _>| {
            rank.join().unwrap_or_else(|panic| Err(Error::of_panic("a rank", &*panic)))
        };
        ranks.into_iter().map(ended).collect::<Result<Vec<Vec<Row>>>>()
    })?;
    rendezvous.finish()?;
    // The last rank is the one that did not draw up what is sent to all.
    Ok(of_each.into_iter().next_back().unwrap_or_default())
}

fn trial(ranks: &mut dyn Communicator) -> Result<Vec<Row>> {
    let (rank, n_ranks, device) = (ranks.rank() as i64, ranks.world_size() as i64, ranks.device());
    let numbers = range(0, N, (Kind::Float, device))?;
    let times = |factor: i64| -> Result<Tensor> { numbers.f_times(factor) };
    // Rank r brings r + 1 times the numbers.
    let [summed, scattered, gathered, sent] = [times(rank + 1)?, times(rank + 1)?, times(rank + 1)?, times(rank + 1)?];
    let bytes = gathered.f_modulo(251)?.f_to_kind(Kind::Uint8)?;
    let own = |tensor: &Tensor, of: i64| tensor.f_narrow(0, of * (N / n_ranks), N / n_ranks);
    let whole = |part: &dyn Fn(i64) -> Result<Tensor>| -> Result<Tensor> {
        Ok(Tensor::f_cat(&(0..n_ranks).map(part).collect::<Result<Vec<_>>>()?, 0)?)
    };
    let sum = times(n_ranks * (n_ranks + 1) / 2)?;
    let all_parts = whole(&|of| Ok(own(&times(of + 1)?, of)?))?;
    let all_bytes = all_parts.f_modulo(251)?.f_to_kind(Kind::Uint8)?;

    ranks.all_reduce(&summed)?;
    ranks.reduce_scatter(&scattered)?;
    ranks.all_gather(&gathered)?;
    ranks.all_gather(&bytes)?;
    ranks.broadcast(&sent, 0)?;
    ranks.wait()?;
    ranks.barrier()?;
    let row = |name: &str, ours: &Tensor, judge: &Tensor| -> Result<Row> {
        Ok(Row::new(&format!("collectives {name}"), Kind::Float, largest_error(ours, judge)?, 0.0))
    };
    Ok(vec![
        row("all_reduce", &summed, &sum)?,
        row("reduce_scatter", &own(&scattered, rank)?, &own(&sum, rank)?)?,
        row("all_gather", &gathered, &all_parts)?,
        row("all_gather of bytes", &bytes, &all_bytes)?,
        row("broadcast", &sent, &numbers)?,
    ])
}
