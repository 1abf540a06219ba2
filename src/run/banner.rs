//! What a run says of itself before its first step.

use std::fmt::Write as _;

use crate::choice::Choice;
use crate::config::Auto;
use crate::engine::probe::Probed;
use crate::error::Result;
use crate::plan::memory::frozen_params;
use crate::plan::parts::sum;
use crate::plan::{MemoryPart, gib};
use crate::run::resolve_auto::copied_bytes;
use crate::run::setup::Job;

/// Describes a job: base, parameters, samples, updates, memory, and the first sample with its learned part marked.
pub fn lines(job: &Job) -> Result<Vec<String>> {
    let model = &job.model;
    let settings = &model.config.train;
    let trainable = model.layout.n_params();
    let all = trainable + frozen_params(&model.base, &model.lora);
    let stats = job.train.stats();
    let mut lines = vec![
        format!(
            "base        {} ({} layers, hidden {})",
            model.config.model.base.display(),
            model.base.num_hidden_layers,
            model.base.hidden_size
        ),
        format!(
            "trainable   {} of {} parameters ({:.2} %), {} on {}",
            grouped(trainable),
            grouped(all),
            100.0 * trainable as f64 / all as f64,
            shown(model.config.model.dtype, |d| d.as_str()),
            shown(model.config.model.device, |d| d.as_str()),
        ),
    ];
    lines.extend(model.device_note.iter().map(|note| format!("device      {note}")));
    lines.push(
        format!(
            "data        {} samples, {} tokens, {} learned ({} of {} rows dropped, {} cut, {} bad, {} with special tokens{})",
            grouped(stats.samples as i64),
            grouped(stats.tokens as i64),
            grouped(stats.label_tokens as i64),
            stats.dropped,
            stats.rows,
            stats.cut,
            stats.bad_rows,
            stats.rows_with_special_tokens,
            if stats.from_cache { "; from the token cache" } else { "" },
        ),
    );
    lines.extend(stats.dropped_places.iter().map(|place| format!("  dropped   {place}: longer than data.max_length")));
    lines.extend(stats.bad_row_faults.iter().map(|fault| format!("  bad row   {fault}")));
    if stats.with_nothing_to_learn > 0 {
        lines.push(format!("            {} samples have nothing left to learn", stats.with_nothing_to_learn));
    }
    if !stats.passed_over.is_empty() {
        let keys = stats.passed_over.iter().map(|(key, rows)| format!("{key:?} in {}", grouped(*rows as i64)));
        lines.push(format!(
            "            keys that say nothing here, and rows that have them: {}",
            keys.collect::<Vec<_>>().join(", ")
        ));
    }
    if stats.with_no_answer > 0 {
        lines.push(format!("            {} rows have an empty answer: its end alone is learned", stats.with_no_answer));
    }
    if let Some(validation) = &job.validation {
        let stats = validation.stats();
        lines.push(format!(
            "validation  {} samples, {} learned tokens",
            stats.samples,
            grouped(stats.label_tokens as i64)
        ));
    }
    lines.push(format!(
        "updates     {} of {} samples ({} an epoch), warmup {}, peak learning rate {}",
        grouped(job.total_steps as i64),
        settings.global_batch,
        grouped(job.steps_per_epoch as i64),
        job.schedule.warmup,
        settings.learning_rate,
    ));
    lines.push(memory_line(job));
    let copied = copied_bytes(&model.config, &model.layout);
    if copied > 0 {
        let copied = gib(copied);
        lines.push(format!("            and {copied} while a checkpoint is written: what is saved is copied first"));
    }
    if !job.train.is_empty() {
        lines.push("first sample, with what is learned between ⟦ and ⟧:".to_string());
        lines.push(first_sample(job)?);
    }
    Ok(lines)
}

/// The memory that a step needs at its peak, and what for.
fn memory_line(job: &Job) -> String {
    let tokens = largest_micro_batch(job);
    let parts = job.model.memory_model().by_part(tokens);
    let of = |which: &[MemoryPart]| sum(&parts.iter().filter(|p| which.contains(&p.part)).copied().collect::<Vec<_>>());
    let weights = of(&[MemoryPart::FrozenWeights]);
    let trained = of(&[MemoryPart::Masters, MemoryPart::Gradients, MemoryPart::Moments, MemoryPart::ComputeCopy]);
    format!(
        "memory      about {} at the peak of a step (weights {}, trainable {}, micro-batches {}: up to {} tokens)",
        gib(sum(&parts)),
        gib(weights),
        gib(trained),
        gib(sum(&parts) - weights - trained),
        grouped(tokens),
    )
}

/// Tokens of the largest micro-batch that the job can have.
fn largest_micro_batch(job: &Job) -> i64 {
    let stats = job.train.stats();
    let update = (job.model.config.train.global_batch * stats.max_len) as i64;
    (job.model.micro_batch_tokens() as i64).min(stats.tokens as i64).min(update)
}

fn first_sample(job: &Job) -> Result<String> {
    let ids = job.train.ids(0);
    let tokenizer = &job.model.tokenizer;
    let mut text = String::new();
    let mut at = 0;
    for span in job.train.spans(0) {
        let _ = write!(text, "{}⟦{}⟧", tokenizer.show(&ids[at..span.start])?, tokenizer.show(&ids[span.clone()])?);
        at = span.end;
    }
    text.push_str(&tokenizer.show(&ids[at..])?);
    Ok(text)
}

fn shown<T>(value: Auto<T>, name: impl Fn(T) -> &'static str) -> &'static str {
    match value {
        Auto::Auto => "auto",
        Auto::Is(value) => name(value),
    }
}

/// A number with its digits in groups of three.
pub fn grouped(n: i64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// What was predicted and what was found of a micro-batch that was tried, side by side.
pub(super) fn probed(probed: &Probed) -> Vec<String> {
    let mut lines = vec![format!("memory      of a micro-batch of {} tokens, predicted and real", probed.tokens)];
    let all = probed.found.iter().copied().chain([probed.peak()]);
    lines.extend(all.map(|f| format!("  {:<20} {:>10} {:>10}", f.name, gib(f.predicted), gib(f.real))));
    lines
}
