//! `bellora generate`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::print;
use crate::data::{Record, Template, prompt_ids};
use crate::error::{Error, Result};
use crate::generate::{Sampling, generate};
use crate::trained::Trained;

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// A run directory, an adapter's folder or a base model's folder
    source: PathBuf,
    /// The question, put into the template that the adapter was trained with
    #[arg(long)]
    prompt: String,
    /// Stop after this many tokens
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Draw from the distribution sharpened by this; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Draw among the likeliest tokens that make up this share of probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Draw among this many of the likeliest tokens; 0 is all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Continue the prompt as it stands, without a template
    #[arg(long)]
    raw: bool,
    /// The template where none travels with the model: alpaca, chinese-alpaca or a .toml file
    #[arg(long, default_value = "alpaca")]
    template: String,
    /// The base model [default: the one the adapter names]
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
}

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let bad = |name: &str, what: &str| Err(Error::invalid(name, what.to_string()));
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return bad("--temperature", "expected a number from 0 upwards");
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return bad("--top-p", "expected a share above 0, at most 1");
    }
    if args.max_new_tokens == 0 {
        return bad("--max-new-tokens", "expected at least 1");
    }
    let trained = Trained::open(&args.source, args.base.as_deref())?;
    let tokenizer = trained.tokenizer()?;
    let file = trained.template(&tokenizer, &Template::find(&args.template)?)?;
    let prompt = if args.raw {
        let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
        tokenizer.encode_into(&args.prompt, file.special_tokens, &mut ids)?;
        ids
    } else {
        prompt_ids(&tokenizer, &file.template, file.special_tokens, &Record::question(&args.prompt))?
    };
    if let Some(id) = prompt.iter().find(|id| i64::from(**id) >= trained.vocab_size()) {
        let what = format!("token {id} is beyond the model's {} rows", trained.vocab_size());
        return Err(Error::invalid("--prompt", what).hint("the tokenizer does not belong to this model"));
    }
    let kind = trained.kind();
    let params = trained.params(kind)?;
    let model = trained.load(&params, kind, (prompt.len() + args.max_new_tokens) as i64)?;
    let stop_strings: &[String] = if args.raw { &[] } else { &file.template.stop };
    let sampling =
        Sampling { temperature: args.temperature, top_p: args.top_p, top_k: args.top_k, seed: args.seed };
    let stop_ids = &file.stop_token_ids;
    generate(&model, &tokenizer, &prompt, stop_ids, stop_strings, args.max_new_tokens, sampling, print)?;
    print("\n")
}
