//! One rank alone: there is nobody to talk to.

use tch::{Device, Tensor};

use super::communicator::{Communicator, check_root};
use crate::error::Result;

/// The communicator of a run of one rank: every sum is already there.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn all_reduce(&mut self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn reduce_scatter(&mut self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn all_gather(&mut self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn broadcast(&mut self, _: &Tensor, root: usize) -> Result<()> {
        check_root(root, 1)
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }

    fn sent_bytes(&self) -> u64 {
        0
    }
}
