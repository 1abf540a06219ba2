//! What was measured: as JSON, and as a table.

use std::fmt::Write as _;

use serde::Serialize;
use tch::Device;

use super::Subject;
use super::ceiling::Ceiling;
use super::clock::{Parts, Update};
use super::trace::{Kernel, SHOWN, Trace};
use crate::device::Cuda;
use crate::engine::step::StepSettings;
use crate::model::flops::{Flops, TokenMix};
use crate::plan::{PartBytes, gib, memory};
use crate::run::banner::grouped;
use crate::torch::dtype;
use crate::torch::memory::AllocatorCounts;

/// Columns of a kernel's name in the table; CUDA's names are long, and the file has them whole.
const NAME_COLUMNS: usize = 90;

/// A measurement and what it was made of.
#[derive(Debug, Serialize)]
pub struct BenchReport {
    /// The version of this program.
    pub version: &'static str,
    /// Where it was made.
    pub device: MeasuredMachine,
    /// Of weights, activations and products.
    pub dtype: &'static str,
    /// The base.
    pub model: Model,
    /// The adapters.
    pub lora: Adapters,
    /// The samples.
    pub data: Data,
    /// Samples an update.
    pub global_batch: usize,
    /// Tokens a micro-batch may hold.
    pub micro_batch_tokens: usize,
    /// Whether blocks run again in backward.
    pub recompute: bool,
    /// Seed of weights, ids and their order.
    pub seed: u64,
    /// Updates before those that count.
    pub warmup: u64,
    /// Those that count.
    pub updates: Vec<Update>,
    /// Real tokens a second: the median over the updates.
    pub tokens_per_s: f64,
    /// Operations a token.
    pub flops_per_token: Flops,
    /// Their sum but for what recompute does again.
    pub flops_per_token_total: f64,
    /// That sum at the median speed, in 10^12 a second.
    pub tflops: f64,
    /// The fastest product of this machine.
    pub ceiling: Ceiling,
    /// `tflops` as a share of the ceiling's.
    pub mfu: f64,
    /// Seconds an update by part, timed apart from the updates that count.
    pub parts: Parts,
    /// Memory.
    pub memory: MemoryReport,
    /// The kernels of two further updates, where a trace was asked for.
    pub trace: Option<Trace>,
}

/// A device.
#[derive(Debug, Serialize)]
pub struct MeasuredMachine {
    /// `cpu` or `cuda`.
    pub kind: &'static str,
    /// The processor's name.
    pub name: String,
    /// Threads of a product on the CPU.
    pub threads: i32,
}

/// A base's shape.
#[derive(Debug, Serialize)]
pub struct Model {
    name: String,
    random_weights: bool,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    num_key_value_heads: i64,
    head_dim: i64,
    vocab_size: i64,
    tie_word_embeddings: bool,
    frozen_params: i64,
    trainable_params: i64,
}

/// Adapters in the names of the config.
#[derive(Debug, Serialize)]
pub struct Adapters {
    r: i64,
    dropout: f64,
    target_modules: Vec<&'static str>,
    modules_to_save: Vec<&'static str>,
}

/// What the samples of the updates that count were like.
#[derive(Debug, Serialize)]
pub struct Data {
    /// What they are.
    pub samples: String,
    /// Tokens a sample.
    pub mean_tokens: f64,
    /// Learned tokens a sample.
    pub mean_label_tokens: f64,
    /// The share of tokens that are learned, and the positions that one attends to.
    #[serde(flatten)]
    pub mix: TokenMix,
}

/// Memory as it was, and as it was expected.
#[derive(Debug, Serialize)]
pub struct MemoryReport {
    /// In use before the model was made.
    pub before_bytes: u64,
    /// The most that was in use at once, from the making of the model to the last update that counts.
    pub peak_bytes: u64,
    /// What the memory model expects above `before_bytes`, at the size of the largest micro-batch there was.
    pub predicted_bytes: i64,
    /// Tokens of that micro-batch.
    pub largest_micro_batch: usize,
    /// The same by part.
    pub predicted: Vec<PartBytes>,
    /// A GPU's allocator over the same time; `None` on a CPU.
    pub allocator: Option<AllocatorReport>,
}

/// What a GPU's allocator did besides handing memory out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AllocatorReport {
    /// Bytes that it held of the device at most, used or not.
    pub reserved_peak_bytes: u64,
    /// How often it had to give unused memory back before an allocation succeeded; each such time the device stands still.
    pub retries: u64,
}

impl AllocatorReport {
    /// From the counts before and after what was measured.
    pub(super) fn between(before: Option<AllocatorCounts>, after: Option<AllocatorCounts>) -> Option<Self> {
        let (before, after) = (before?, after?);
        let retries = after.retries.saturating_sub(before.retries);
        Some(Self { reserved_peak_bytes: after.reserved_peak_bytes, retries })
    }

    fn in_words(&self) -> String {
        let times = if self.retries == 1 { "once" } else { &format!("{} times", self.retries) };
        let reserved = gib(self.reserved_peak_bytes as i64);
        format!("{reserved} reserved by the allocator at the peak, which gave unused memory back {times}")
    }
}

/// What [`Report::new`] puts together.
pub(super) struct Measured {
    pub(super) ceiling: Ceiling,
    pub(super) warmup: u64,
    pub(super) timed: Vec<Update>,
    pub(super) parts: Parts,
    pub(super) mix: TokenMix,
    pub(super) memory: MemoryReport,
    pub(super) trace: Option<Trace>,
}

impl BenchReport {
    pub(super) fn new(subject: &Subject, settings: &StepSettings, measured: Measured) -> Self {
        let Measured { ceiling, warmup, timed, parts, mix, memory, trace } = measured;
        let Subject { shape, lora, kind, device, .. } = subject;
        let flops = Flops::a_token(shape, lora, mix, settings.recompute);
        let tokens_per_s = median(timed.iter().map(|update| update.tokens_per_s).collect());
        let tflops = flops.total() * tokens_per_s / 1e12;
        let n_samples = timed.iter().map(|update| update.samples).sum::<u64>().max(1) as f64;
        let a_sample = |count: fn(&Update) -> u64| timed.iter().map(count).sum::<u64>() as f64 / n_samples;
        Self {
            version: env!("CARGO_PKG_VERSION"),
            device: MeasuredMachine::of(*device),
            dtype: dtype::name(*kind),
            model: Model::of(subject),
            lora: Adapters {
                r: lora.r,
                dropout: lora.dropout,
                target_modules: lora.target_modules.iter().map(|p| p.name()).collect(),
                modules_to_save: lora.modules_to_save.iter().map(|t| t.name()).collect(),
            },
            data: Data {
                samples: subject.samples.clone(),
                mean_tokens: a_sample(|update| update.tokens),
                mean_label_tokens: a_sample(|update| update.label_tokens),
                mix,
            },
            global_batch: settings.global_batch,
            micro_batch_tokens: settings.micro_batch_tokens,
            recompute: settings.recompute,
            seed: settings.seed,
            warmup,
            updates: timed,
            tokens_per_s,
            flops_per_token: flops,
            flops_per_token_total: flops.total(),
            tflops,
            ceiling,
            mfu: tflops / ceiling.tflops,
            parts,
            memory,
            trace,
        }
    }

    /// The report as one line of JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and strings make JSON")
    }

    /// The report for people.
    pub fn to_table(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{}", format!("{name:<14}{value}").trim_end());
        };
        let MeasuredMachine { kind, name, threads } = &self.device;
        let threads = if *kind == "cpu" { format!(", {threads} threads") } else { String::new() };
        line("device", format!("{name}{threads}, {}; bellora {}", self.dtype, self.version));
        line("model", self.model.in_words());
        line("trained", self.lora.in_words(&self.model));
        let Data { samples, mean_tokens, mean_label_tokens, .. } = &self.data;
        line("samples", samples.clone());
        line("", format!("{mean_tokens:.1} tokens each, {mean_label_tokens:.1} of them learned"));
        let again = if self.recompute { ", blocks run again in backward" } else { "" };
        line(
            "update",
            format!(
                "{} samples in micro-batches of at most {} tokens{again}",
                self.global_batch, self.micro_batch_tokens
            ),
        );
        line("", String::new());

        let speeds = self.updates.iter().map(|update| update.tokens_per_s);
        let (slowest, fastest) = speeds.fold((f64::INFINITY, 0.0), |(a, b), x| (x.min(a), x.max(b)));
        let [median, slowest, fastest] = [self.tokens_per_s, slowest, fastest].map(|speed| grouped(speed as i64));
        let (n, warmup) = (self.updates.len(), self.warmup);
        line("tokens/s", format!("{median}  median of {n} updates after {warmup}; {slowest} to {fastest}"));
        let skipped = self.updates.iter().filter(|update| update.skipped).count();
        if skipped > 0 {
            line("", format!("{skipped} of the updates were not applied: their gradients overflowed"));
        }
        line("TFLOP/s", format!("{:.3}  at {:.3} GFLOP a token", self.tflops, self.flops_per_token_total / 1e9));
        let Ceiling { size, tflops, .. } = self.ceiling;
        line(
            "MFU",
            format!("{:.1} %  of {tflops:.3} TFLOP/s, the fastest product of {size} by {size}", 100.0 * self.mfu),
        );
        let MemoryReport { before_bytes, peak_bytes, predicted_bytes, largest_micro_batch, allocator, .. } =
            &self.memory;
        line(
            "memory",
            format!(
                "{} at the peak, {} of them from before the model; {} predicted for {largest_micro_batch} tokens",
                gib(*peak_bytes as i64),
                gib(*before_bytes as i64),
                gib(*predicted_bytes),
            ),
        );
        if let Some(allocator) = allocator {
            line("", allocator.in_words());
        }
        line("", String::new());
        let parts = self.parts.named();
        let total: f64 = parts.iter().map(|(_, secs)| secs).sum();
        for (name, secs) in parts {
            line(name, format!("{:>5.1} %  {:.1} ms an update", 100.0 * secs / total, 1e3 * secs));
        }
        let n = self.parts.updates;
        line("", format!("({n} updates apart from those above, waiting for the device after each part)"));
        if let Some(trace) = &self.trace {
            line("", String::new());
            trace_lines(trace, &mut line);
        }
        text
    }
}

/// The kernels that take longest.
fn trace_lines(trace: &Trace, line: &mut dyn FnMut(&str, String)) {
    let Trace { file, updates, n_events, secs, kernels } = trace;
    line("trace", format!("{n_events} events of {updates} updates, {:.1} ms, in {}", 1e3 * secs, file.display()));
    let per_update = |secs: f64| 1e3 * secs / *updates as f64;
    for Kernel { name, calls, secs, share } in kernels.iter().take(SHOWN) {
        let calls = *calls as f64 / *updates as f64;
        let name: String = name.chars().take(NAME_COLUMNS).collect();
        line(
            "",
            format!("{:>5.1} %  {:>9.3} ms in {calls:>7} calls an update  {name}", 100.0 * share, per_update(*secs)),
        );
    }
}

impl MeasuredMachine {
    pub(super) fn of(device: Device) -> Self {
        let threads = tch::get_num_threads();
        match (device, crate::device::cuda()) {
            (Device::Cuda(_), Cuda::Usable(gpu)) => Self { kind: "cuda", name: gpu.name.clone(), threads },
            _ => Self { kind: "cpu", name: processor(), threads },
        }
    }
}

/// The processor's name, where the system says it.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "a processor".to_string(), |(_, name)| name.trim().to_string())
}

impl Model {
    fn of(subject: &Subject) -> Self {
        let shape = &subject.shape;
        Self {
            name: subject.name.clone(),
            random_weights: subject.is_random,
            hidden_size: shape.hidden_size,
            intermediate_size: shape.intermediate_size,
            num_hidden_layers: shape.num_hidden_layers,
            num_attention_heads: shape.num_attention_heads,
            num_key_value_heads: shape.num_key_value_heads,
            head_dim: shape.head_dim,
            vocab_size: shape.vocab_size,
            tie_word_embeddings: shape.tie_word_embeddings,
            frozen_params: memory::frozen_params(shape, &subject.lora),
            trainable_params: subject.layout.n_params(),
        }
    }

    fn in_words(&self) -> String {
        let Self { name, num_hidden_layers, hidden_size, vocab_size, .. } = self;
        let weights = if self.random_weights { " with random weights" } else { "" };
        let vocabulary = grouped(*vocab_size);
        format!("{name}{weights}: {num_hidden_layers} layers, hidden {hidden_size}, vocabulary {vocabulary}")
    }
}

impl Adapters {
    fn in_words(&self, model: &Model) -> String {
        let all = model.frozen_params + model.trainable_params;
        let trained: Vec<&str> = self.target_modules.iter().chain(&self.modules_to_save).copied().collect();
        format!(
            "{} of {} parameters: rank {} on {}",
            grouped(model.trainable_params),
            grouped(all),
            self.r,
            trained.join(", ")
        )
    }
}

/// The middle value, or the mean of the two middle ones.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_those_of_the_measured_time_alone() {
        let counts = |reserved_peak_bytes, retries| Some(AllocatorCounts { reserved_peak_bytes, retries });
        let found = AllocatorReport::between(counts(1 << 30, 3), counts(5 << 30, 4)).unwrap();
        assert_eq!(found, AllocatorReport { reserved_peak_bytes: 5 << 30, retries: 1 });
        let said = found.in_words();
        assert!(said.starts_with("5.0 GiB reserved") && said.ends_with("once"), "{said}");
        assert_eq!(AllocatorReport::between(None, None), None);
    }
}
