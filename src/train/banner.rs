//! What a run says of itself before its first step.

use std::fmt::Write as _;

use crate::config::Auto;
use crate::error::Result;
use crate::plan::{self, Memory};
use crate::train::setup::Job;

/// Describes a job: base, parameters, samples, updates, memory, and the first sample with its learned part marked.
pub fn lines(job: &Job) -> Result<Vec<String>> {
    let model = &job.model;
    let settings = &model.config.train;
    let trainable = model.layout.n_params();
    let all = trainable + plan::frozen_params(&model.base, &model.lora);
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
    let Memory { weights, trainable, activations } = estimate(job);
    lines.push(format!(
        "memory      about {} (weights {}, trainable {}, activations at most {}; micro-batches of up to {} tokens)",
        size(weights + trainable + activations),
        size(weights),
        size(trainable),
        size(activations),
        grouped(model.micro_batch_tokens() as i64),
    ));
    if !job.train.is_empty() {
        lines.push("first sample, with what is learned between ⟦ and ⟧:".to_string());
        lines.push(first_sample(job)?);
    }
    Ok(lines)
}

/// The job's memory by part.
pub fn estimate(job: &Job) -> Memory {
    let model = &job.model;
    let recompute = model.config.train.recompute == Auto::Is(crate::config::Recompute::All);
    let stats = job.train.stats();
    let update = (model.config.train.global_batch * stats.max_len) as i64;
    let largest = (model.micro_batch_tokens() as i64).min(stats.tokens as i64).min(update);
    let element = model.kind().elt_size_in_bytes() as i64;
    plan::memory(&model.base, &model.lora, &model.layout, largest, element, recompute)
}

fn first_sample(job: &Job) -> Result<String> {
    let (ids, n_prompt) = (job.train.ids(0), job.train.n_prompt(0));
    let tokenizer = &job.model.tokenizer;
    let mut text = String::new();
    let (prompt, learned) = ids.split_at(n_prompt.min(ids.len()));
    let _ = write!(text, "{}⟦{}⟧", tokenizer.show(prompt)?, tokenizer.show(learned)?);
    Ok(text)
}

fn shown<T>(value: Auto<T>, name: impl Fn(T) -> &'static str) -> &'static str {
    match value {
        Auto::Auto => "auto",
        Auto::Is(value) => name(value),
    }
}

/// A number with its digits in groups of three.
fn grouped(n: i64) -> String {
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

/// Bytes as people read them.
fn size(bytes: i64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)) }
}
