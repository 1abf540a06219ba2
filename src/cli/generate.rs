//! `bellora generate`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;
use tch::Kind;

use crate::cli::{DtypeArgs, ModelArgs, expect_room, print, say, signals};
use crate::data::{Conversation, Prompting, Template, TemplateFile, Tokenizer, prompt_ids};
use crate::error::{Error, Fault, Result};
use crate::generate::{Sampling, generate};
use crate::log::show_progress;
use crate::plan::parts::sum;
use crate::trained::Trained;

/// Keys and values of more tokens would not fit in memory.
const MOST_NEW_TOKENS: usize = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// A run directory, an adapter's folder or a base model's folder
    source: PathBuf,
    /// The question, put into the template that the adapter was trained with
    #[arg(long, allow_hyphen_values = true, required_unless_present = "messages")]
    prompt: Option<String>,
    /// Put this system prompt before the question
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "raw")]
    system: Option<String>,
    /// Answer the conversation of this JSON file: a list of {"role", "content"}, or an object with such a list as "messages"
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    messages: Option<PathBuf>,
    /// Stop after this many tokens
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Draw from the distribution sharpened by this; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
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
    /// The template where none travels with the model: alpaca, chinese-alpaca, chat (the tokenizer's own), a .toml or .jinja file
    #[arg(long, default_value = "alpaca")]
    template: String,
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    signals::end_at_once()?;
    show_progress();
    let bad = |name: &str, what: &str, hint: &str| Err(Error::invalid(name, what).hint(hint));
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return bad("--temperature", "expected a number from 0 upwards", "leave it out to take the likeliest tokens");
    }
    if i64::try_from(args.top_k).is_err() {
        return bad("--top-k", "is more than any vocabulary has", "leave it out to draw among all tokens");
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return bad("--top-p", "expected a share above 0 and at most 1", "leave it out to draw among all tokens");
    }
    if !(1..=MOST_NEW_TOKENS).contains(&args.max_new_tokens) {
        let what = format!("expected a number from 1 to {MOST_NEW_TOKENS}");
        return bad("--max-new-tokens", &what, "leave it out for 256");
    }
    // A name that is none is said before the model is opened.
    if args.template != CHAT && !args.template.ends_with(".jinja") {
        named(Template::find(&args.template))?;
    }
    let trained = args.model.open(&args.source)?;
    let tokenizer = trained.tokenizer()?;
    let file = trained.template(&tokenizer, &|| fallback(&args.template, &tokenizer))?;
    let template = file.template.open(TemplateFile::NAME)?;
    let prompt = match &args.prompt {
        Some(prompt) if args.raw => {
            let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
            tokenizer.encode_into(prompt, file.special_tokens, &mut ids)?;
            ids
        }
        _ => {
            let place = args.messages.as_ref().map_or("--prompt".to_owned(), |path| path.display().to_string());
            prompt_ids(&place, &tokenizer, &template, file.special_tokens, &conversation(args)?)?
        }
    };
    if prompt.is_empty() {
        return bad("--prompt", "the prompt has no tokens", "write some text");
    }
    if let Some(id) = prompt.iter().find(|id| i64::from(**id) >= trained.vocab_size()) {
        let what = format!("token {id} of the prompt is beyond the model's {} rows", trained.vocab_size());
        return Err(Error::invalid(tokenizer.place(), what).hint("the tokenizer does not belong to this model"));
    }
    let (n_positions, trained_for) = (prompt.len() + args.max_new_tokens, trained.base.max_position_embeddings);
    if n_positions as i64 > trained_for {
        say(&format!(
            "warning: {} tokens of the prompt and {} new ones may go beyond the {trained_for} positions the base was \
             trained for\n",
            prompt.len(),
            args.max_new_tokens,
        ));
    }
    let device = Trained::device();
    let kind = trained.kind(args.dtype.dtype, device);
    let needed = sum(&trained.memory_model(kind, device).generation(prompt.len() as i64, n_positions as i64));
    expect_room("bellora generate", needed, device, less_memory(kind))?;
    let params = trained.params(kind, device)?;
    let model = trained.load(&params, kind, n_positions as i64)?;
    let stop_strings = if args.raw { Vec::new() } else { template.stop() };
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, top_k: args.top_k, seed: args.seed };
    let stop_ids = &file.stop_token_ids;
    generate(&model, &tokenizer, &prompt, stop_ids, &stop_strings, args.max_new_tokens, sampling, print)?;
    print("\n")
}

/// The chat template of the tokenizer's own files, by name.
const CHAT: &str = "chat";

/// The template where none travels with the model.
fn fallback(name: &str, tokenizer: &Tokenizer) -> Result<Prompting> {
    named(match name {
        CHAT => Prompting::of_tokenizer(tokenizer),
        name if name.ends_with(".jinja") => Prompting::read(Path::new(name), tokenizer),
        name => Template::find(name).map(Prompting::from),
    })
}

/// Says of a fault that it is one of the option's.
fn named<T>(found: Result<T>) -> Result<T> {
    found.map_err(|error| match error {
        Error::Invalid(faults) if faults.iter().any(|f| f.place == "data.template") => {
            let faults = faults.into_iter().map(|f| Fault { place: "--template".into(), ..f });
            Error::Invalid(faults.collect())
        }
        other => other.hint_where_none("name alpaca, chinese-alpaca, chat or the path of a template file"),
    })
}

/// What is to be answered.
fn conversation(args: &GenerateArgs) -> Result<Conversation> {
    let mut conversation = match &args.messages {
        Some(path) => read_messages(path)?,
        None => Conversation::default(),
    };
    if let Some(prompt) = &args.prompt {
        conversation.say("user", prompt);
    }
    if let Some(system) = &args.system {
        conversation.set_system(system);
    }
    Ok(conversation)
}

fn read_messages(path: &Path) -> Result<Conversation> {
    let place = path.display().to_string();
    let invalid = |what: String| {
        Error::invalid(&place, what).hint("write a list such as [{\"role\": \"user\", \"content\": \"...\"}]")
    };
    let text = std::fs::read_to_string(path).map_err(|error| invalid(format!("cannot be read: {error}")))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| invalid(format!("is not valid JSON: {error}")))?;
    let (turns, tools) = match value.get("messages") {
        Some(turns) => (turns, value.get("tools")),
        None => (&value, None),
    };
    let conversation = Conversation::of_turns(turns, "messages").map_err(|reason| invalid(reason.what))?;
    Ok(Conversation { tools: tools.cloned(), ..conversation })
}

/// How a model takes less memory.
pub(super) fn less_memory(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => {
            "give --dtype bf16, which takes half as much for the weights, raise the limit, or use a machine with more memory"
        }
        _ => "raise the limit, or use a smaller base or a machine with more memory",
    }
}
