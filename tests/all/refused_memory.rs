//! Memory that runs out at any one allocation of a step: the step is done again with smaller micro-batches and gives the same,
//! or the run ends by name.

use bellora::engine::metrics::StepMetrics;
use bellora::error::{Error, Result};
use bellora::torch::keep_freed_memory;
use bellora::torch::memory::refuse_allocation;

use crate::ranks::on_ranks;
use crate::support::{Lab, Named, Rig, Shape, distance_of_update, snapshot, trainer};

fn lab(sets: &[&str]) -> Lab {
    keep_freed_memory();
    let all = [
        "lora.dropout=0.1",
        "lora.modules_to_save=[\"embed_tokens\", \"lm_head\"]",
        "train.global_batch=6",
        "train.warmup_steps=0",
        "train.max_grad_norm=0.5",
    ];
    Lab::new(Shape { layers: 1, ..Shape::default() }).with(&all).with(sets).with_init_adapter()
}

/// What a step came to whose `nth` allocation failed (0: none did).
struct Stepped {
    outcome: Result<StepMetrics>,
    params: Named,
    note: Option<String>,
    n_allocations: u64,
}

fn step(trainer: &mut Rig, nth: u64) -> Stepped {
    refuse_allocation(nth);
    let outcome = trainer.step();
    let n_allocations = refuse_allocation(0);
    Stepped { outcome, params: snapshot(&trainer.params), note: trainer.take_note(), n_allocations }
}

/// Two cuts of an update differ by rounding: by how much its loss, and its parameters as a share of what the update changed.
struct Bounds {
    loss: f64,
    update: f64,
}

const FP32: Bounds = Bounds { loss: 1e-6, update: 1e-4 };
/// A product in bf16 or fp16 has three digits.
const HALF: Bounds = Bounds { loss: 1e-2, update: 0.1 };

impl Bounds {
    #[track_caller]
    fn hold(&self, what: &str, ours: &Stepped, judge: &Stepped, start: &Named) {
        let (ours_loss, loss) =
            (ours.outcome.as_ref().unwrap().loss.unwrap(), judge.outcome.as_ref().unwrap().loss.unwrap());
        assert!((ours_loss / loss - 1.0).abs() <= self.loss, "{what}: loss {ours_loss} instead of {loss}");
        let [judge, start] = [&judge.params, start]
            .map(|named| named.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect());
        let off = distance_of_update(&ours.params, &judge, &start);
        assert!(off <= self.update, "{what}: off by {off:.1e} of the update");
    }
}

/// Fails each allocation of a step in turn, in a process alone.
fn refuse_each(sets: &[&str], bounds: &Bounds) {
    let lab = lab(sets);
    let fresh = || trainer(lab.config(&[]));
    let mut undisturbed = fresh();
    let start = snapshot(&undisturbed.params);
    let judge = step(&mut undisturbed, 0);
    let mut n_repeated = 0;
    for nth in 1..=judge.n_allocations {
        let what = format!("{sets:?}, allocation {nth} of {}", judge.n_allocations);
        let ours = step(&mut fresh(), nth);
        match (&ours.outcome, &ours.note) {
            (Ok(_), Some(note)) => {
                assert!(note.contains("out of memory in step 1"), "{what}: {note}");
                n_repeated += 1;
                bounds.hold(&what, &ours, &judge, &start);
            }
            (Ok(_), None) => panic!("{what}: nothing was refused"),
            (Err(error), _) => assert!(error.is_out_of_memory(), "{what}: {error}"),
        }
    }
    println!(
        "{sets:?}: {n_repeated} of {} allocations that fail cost a repetition, the others end by name",
        judge.n_allocations
    );
    // What is asked for outside of the micro-batches: for the norm, the decision and the optimizer.
    assert!(n_repeated * 10 >= judge.n_allocations * 8, "{n_repeated} of {}", judge.n_allocations);
}

#[test]
fn every_allocation_of_a_step_may_fail() {
    refuse_each(&[], &FP32);
    refuse_each(&["model.dtype=\"bf16\""], &HALF);
    refuse_each(&["model.dtype=\"fp16\""], &HALF);
}

/// Fails each allocation of a step in turn, on the ranks by turns.
fn refuse_each_on_ranks(n_ranks: usize, shard: bool) {
    let lab = lab(&[&format!("train.shard={shard}")]);
    let undisturbed = on_ranks(&lab, n_ranks, |_, trainer| (snapshot(&trainer.params), step(trainer, 0)));
    let n_allocations = undisturbed[0].1.n_allocations;
    let mut n_repeated = 0;
    for nth in 1..=n_allocations {
        let refused_rank = nth as usize % n_ranks;
        let what =
            format!("{n_ranks} ranks, shard = {shard}, allocation {nth} of {n_allocations} on rank {refused_rank}");
        let all = on_ranks(&lab, n_ranks, |rank, trainer| step(trainer, if rank == refused_rank { nth } else { 0 }));
        for (rank, (ours, (start, judge))) in all.iter().zip(&undisturbed).enumerate() {
            match (&ours.outcome, &ours.note) {
                (Ok(_), Some(note)) => {
                    assert!(
                        note.contains(&format!("out of memory in step 1 on rank {refused_rank}")),
                        "{what}: {note}"
                    );
                    FP32.hold(&format!("{what}, seen by rank {rank}"), ours, judge, start);
                    n_repeated += u64::from(rank == 0);
                }
                // Ranks whose samples need fewer allocations have none of this number.
                (Ok(_), None) => assert!(
                    ours.n_allocations < nth || all[refused_rank].outcome.is_err(),
                    "{what}: nothing was refused"
                ),
                (Err(error), _) if rank == refused_rank => assert!(error.is_out_of_memory(), "{what}: {error}"),
                (Err(error), _) => {
                    assert!(matches!(error, Error::Lost(_)), "{what}: rank {rank} says {error}");
                    assert!(all[refused_rank].outcome.is_err(), "{what}: rank {rank} says {error}");
                }
            }
        }
    }
    println!(
        "{n_ranks} ranks, shard = {shard}: {n_repeated} of {n_allocations} allocations that fail cost a repetition"
    );
    assert!(n_repeated * 10 >= n_allocations * 7, "{n_repeated} of {n_allocations}");
}

#[test]
fn every_allocation_of_a_step_may_fail_on_one_of_several_ranks() {
    for n_ranks in [2, 3] {
        for shard in [false, true] {
            refuse_each_on_ranks(n_ranks, shard);
        }
    }
}
