//! Whether a job fits into the memory that there is.

use crate::error::Result;
use crate::plan::expect_to_fit;
use crate::run::resolve_auto::copied_bytes;
use crate::run::setup::Job;
use crate::torch::memory;

impl Job {
    /// Refuses a job of which not even the longest sample fits into memory by itself, on a CPU on each of the ranks that share it.
    ///
    /// # Errors
    /// Both numbers.
    pub fn expect_room(&self, n_local_ranks: usize) -> Result<()> {
        let device = self.model.device();
        let n_beside = if device.is_cuda() { 1 } else { n_local_ranks as i64 };
        let a_step = self.model.memory_model().total(self.train.stats().max_len as i64);
        let copied = copied_bytes(&self.model.config, &self.model.layout);
        let needed = n_beside.saturating_mul(a_step).saturating_add(copied);
        let mut place = "a step of one sample".to_owned();
        if n_beside > 1 {
            place += &format!(" on each of {n_beside} ranks of this machine");
        }
        if copied > 0 {
            place += " with a checkpoint in flight";
        }
        let hint = "lower data.max_length or lora.r, set train.recompute = \"all\" or model.dtype = \"bf16\", or use fewer \
                    ranks or a machine with more memory";
        expect_to_fit(&place, needed, &memory::room(device)?, hint)
    }
}
