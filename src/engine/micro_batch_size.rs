//! How large micro-batches may be: tried before the first step, and made smaller when memory runs out on any rank.

use tch::Kind;

use crate::batch::PackedBatch;
use crate::engine::gather::gather_number;
use crate::engine::probe::{Predict, Probed, Trial, probe};
use crate::engine::step::{StepSettings, Trainer};
use crate::error::{Error, Result};
use crate::torch::memory;
use crate::torch::number::filled;

/// What a rank needs of the size of micro-batches after it was tried.
enum Wanted {
    /// There was room enough.
    Nothing,
    /// No more than so many tokens.
    AtMost(usize),
    /// There is no room for one sample.
    Impossible,
}

/// What follows for all ranks: the least that any of them needs, and which of them that is.
enum Agreement {
    AllHaveRoom,
    AtMost { rank: usize, tokens: usize },
    Impossible { rank: usize },
}

const NO_ROOM_FOR_ONE: &str = "set train.recompute = \"all\", or lower data.max_length or lora.r";

impl Trainer {
    /// Tries a micro-batch of the greatest size that an update can have before the first step, halving it while memory runs out
    /// on any rank. Every rank must call this together.
    ///
    /// # Errors
    /// Not even one document of `max_length` fits.
    pub fn try_largest(&mut self, predict: Predict<'_>, max_length: usize) -> Result<Probed> {
        let device = self.params.device();
        loop {
            let StepSettings { micro_batch_tokens, global_batch, recompute, dropout, .. } = self.settings;
            // A longer sample is alone, and no update has more.
            let most = global_batch.div_ceil(self.ranks.world_size()).saturating_mul(max_length);
            let tokens = micro_batch_tokens.clamp(max_length, most.max(max_length));
            let trial = Trial { tokens, max_length, recompute, dropout };
            let outcome = probe(&self.model, &mut self.grads, predict, trial, device);
            let wanted = match &outcome {
                Err(error) if error.is_out_of_memory() && tokens / 2 < max_length => Wanted::Impossible,
                Err(error) if error.is_out_of_memory() => Wanted::AtMost(tokens / 2),
                Err(_) => return outcome,
                Ok(_) => Wanted::Nothing,
            };
            let (rank, at_most) = match self.agree(wanted)? {
                Agreement::AllHaveRoom => return outcome,
                Agreement::Impossible { rank } => {
                    let error = outcome.err().map_or_else(|| "see its own log".to_owned(), |error| error.to_string());
                    let what = format!(
                        "a micro-batch of one sample of {max_length} tokens does not fit{}: {error}",
                        self.named(rank)
                    );
                    return Err(Error::failed("memory", what).hint(NO_ROOM_FOR_ONE));
                }
                Agreement::AtMost { rank, tokens } => (rank, tokens),
            };
            self.settings.micro_batch_tokens = at_most;
            self.note = Some(format!(
                "out of memory{} on trial with a micro-batch of {tokens} tokens: they hold {at_most} at most",
                self.named(rank)
            ));
        }
    }

    /// Makes the micro-batches of an update smaller that did not fit into the memory of some rank, on all ranks and for the
    /// rest of the run. `error` is that of this rank, if it was this one's.
    pub(super) fn halve_micro_batches(&mut self, batches: &[PackedBatch], error: Option<Error>) -> Result<()> {
        let tokens = batches.iter().map(|batch| batch.n_tokens()).max().unwrap_or_default();
        let wanted = match error {
            None => Wanted::Nothing,
            Some(_) if batches.iter().all(|batch| batch.slots.len() == 1) => Wanted::Impossible,
            Some(_) => Wanted::AtMost(tokens / 2),
        };
        let step = self.state.step + 1;
        match self.agree(wanted)? {
            // No rank said so but by a defect: the update is begun again as it was.
            Agreement::AllHaveRoom => {}
            Agreement::Impossible { rank } => {
                let why = match error {
                    Some(error) => format!("of {tokens} tokens at a time: {error}"),
                    None => "at a time: see its own log".to_owned(),
                };
                let what = format!("out of memory{} with one sample {why}", self.named(rank));
                return Err(Error::failed(format!("step {step}"), what).hint(NO_ROOM_FOR_ONE));
            }
            Agreement::AtMost { rank, tokens } => {
                self.settings.micro_batch_tokens = tokens;
                self.note = Some(format!(
                    "out of memory in step {step}{}: from here on micro-batches hold {tokens} tokens at most; the run is the \
                     same to rounding, no longer bit for bit",
                    self.named(rank)
                ));
            }
        }
        Ok(())
    }

    /// Has all ranks take the size that the one with the least room can. Every rank must call this together.
    fn agree(&mut self, wanted: Wanted) -> Result<Agreement> {
        let device = self.params.device();
        memory::release_cached(device)?;
        let number = match wanted {
            Wanted::Nothing => i64::MAX,
            Wanted::AtMost(tokens) => tokens as i64,
            Wanted::Impossible => 0,
        };
        let numbers = gather_number(&mut *self.ranks, &filled(&[], number, (Kind::Int64, device))?)?;
        let least = numbers.into_iter().enumerate().min_by_key(|(_, number)| *number);
        Ok(match least {
            None | Some((_, i64::MAX)) => Agreement::AllHaveRoom,
            Some((rank, 0)) => Agreement::Impossible { rank },
            Some((rank, tokens)) => Agreement::AtMost { rank, tokens: tokens as usize },
        })
    }

    /// Names a rank where there are several.
    fn named(&self, rank: usize) -> String {
        if self.ranks.world_size() == 1 { String::new() } else { format!(" on rank {rank}") }
    }
}
