//! Prompt templates: the exact strings around what a sample says.
//!
//! A prompt is `start`, the system prompt if there is one, the earlier turns, the question, `end`; the answer follows
//! and its end-of-text token closes it. Nothing is stripped and nothing is added.
//!
//! The built-in templates write a dialogue into their `### Instruction:` as
//! `Human:{question}\nAssistant:{answer}\nHuman:{question}`, and a question without history as it stands. They have no
//! place for a system prompt (the trainers they come from have none), so a row with one is refused, not changed.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::reason::Reason;
use super::record::Record;
use super::tokenizer::{PromptPart, SpecialTokens, Tokenizer};
use crate::error::{Error, Result};

/// What stands before and after a text.
pub type Around = [String; 2];

/// A template's strings, used byte for byte.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// `alpaca`, `chinese-alpaca`, or the name of the user's file.
    pub name: String,
    /// Before everything.
    pub start: String,
    /// Around a system prompt; `None` where there is no place for one.
    pub system: Option<Around>,
    /// Around a question within a dialogue.
    pub user: Around,
    /// Around the question of a sample without history.
    pub only_user: Around,
    /// Around an earlier answer.
    pub reply: Around,
    /// After the last question: the answer follows.
    pub end: String,
    /// Texts at which generation stops, beside the end-of-text token.
    pub stop: Vec<String>,
}

/// The file a user writes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateToml {
    #[serde(default)]
    start: String,
    system: Option<Around>,
    user: Around,
    only_user: Option<Around>,
    reply: Around,
    end: Option<String>,
    #[serde(default)]
    stop: Vec<String>,
}

const SENTENCE: &str =
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.";

impl Template {
    /// The template of the reference job: blank lines around the instruction and before the answer.
    pub fn alpaca() -> Self {
        Self::built_in("alpaca", "\n\n### Instruction:\n\n", "\n\n### Response:\n\n")
    }

    /// The template of the Chinese-Alpaca trainers: it ends in a space, on the line of the answer.
    pub fn chinese_alpaca() -> Self {
        Self::built_in("chinese-alpaca", "\n\n### Instruction:\n", "\n\n### Response: ")
    }

    fn built_in(name: &str, before: &str, after: &str) -> Self {
        let around = |before: &str, after: &str| [before.to_owned(), after.to_owned()];
        Self {
            name: name.into(),
            start: format!("{SENTENCE}{before}"),
            system: None,
            user: around("Human:", ""),
            only_user: around("", ""),
            reply: around("\nAssistant:", "\n"),
            end: after.into(),
            stop: Vec::new(),
        }
    }

    /// Takes a built-in template's name or the path of a template file.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that is not built in, a file that is missing or says something else.
    pub fn find(name: &str) -> Result<Self> {
        match name {
            "alpaca" => Ok(Self::alpaca()),
            "chinese-alpaca" => Ok(Self::chinese_alpaca()),
            _ if Path::new(name).extension().is_some_and(|extension| extension == "toml") => {
                Self::read(Path::new(name))
            }
            _ => Err(Error::invalid("data.template", format!("`{name}` is no template"))
                .hint("built in are `alpaca` and `chinese-alpaca`; for your own give the path of a .toml file")),
        }
    }

    /// Reads a user's template file (TOML):
    ///
    /// ```toml
    /// start  = ""                                        # optional: before everything
    /// system = ["<|im_start|>system\n", "<|im_end|>\n"]     # optional: before and after a system prompt
    /// user   = ["<|im_start|>user\n", "<|im_end|>\n"]       # before and after a question
    /// reply  = ["<|im_start|>assistant\n", "<|im_end|>\n"]  # before and after an earlier answer
    /// end    = "<|im_start|>assistant\n"                    # optional: before the answer to come (else reply's first)
    /// stop   = ["<|im_end|>"]                            # optional: where generation stops, beside the end of text
    /// ```
    ///
    /// `only_user` may give other strings around a question that has no history. The end-of-text token is never
    /// written here: it follows the learned answer by itself.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that is missing or says something else.
    pub fn read(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::invalid(&place, format!("the template file cannot be read: {error}")))?;
        let toml: TemplateToml = toml::from_str(&text).map_err(|error| {
            Error::invalid(&place, format!("is no template: {}", error.to_string().trim_end())).hint(
                "a template has user = [before, after] and reply = [before, after]; it may have start, system, \
                 only_user, end and stop",
            )
        })?;
        if toml.stop.iter().any(String::is_empty) {
            return Err(Error::invalid(&place, "`stop` holds an empty string: generation would stop at once"));
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self {
            name,
            start: toml.start,
            system: toml.system,
            only_user: toml.only_user.unwrap_or_else(|| toml.user.clone()),
            user: toml.user,
            end: toml.end.unwrap_or_else(|| toml.reply[0].clone()),
            reply: toml.reply,
            stop: toml.stop,
        })
    }

    /// The prompt of a record, in stretches of the template's and of the record's text; the answer is not in it.
    ///
    /// # Errors
    /// Where the record has a system prompt and the template no place for it.
    pub fn prompt<'a>(&'a self, record: &'a Record) -> std::result::Result<Vec<PromptPart<'a>>, Reason> {
        let mut parts = Vec::with_capacity(5 + 6 * record.history.len());
        let own = |text: &'a String| PromptPart { text, of_template: true };
        let mut around = |strings: &'a Around, text: &'a String| {
            parts.extend([own(&strings[0]), PromptPart { text, of_template: false }, own(&strings[1])]);
        };
        match (&record.system, &self.system) {
            (Some(system), Some(strings)) => around(strings, system),
            (None, _) => {}
            (Some(_), None) => {
                return Err(Reason::new(format!(
                    "has a system prompt, but template `{}` has no place for one",
                    self.name
                ))
                .hint("remove it from the rows, or use a template file with `system`"));
            }
        }
        for (question, answer) in &record.history {
            around(&self.user, question);
            around(&self.reply, answer);
        }
        around(if record.history.is_empty() { &self.only_user } else { &self.user }, &record.question);
        parts.insert(0, own(&self.start));
        parts.push(own(&self.end));
        Ok(parts)
    }
}

/// `template.json`: everything about texts and ids that an adapter was trained with and that must be the same in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFile {
    /// The exact strings.
    pub template: Template,
    /// How special tokens in a sample's text were encoded.
    pub special_tokens: SpecialTokens,
    /// The id before every prompt, if any.
    pub bos_token_id: Option<u32>,
    /// The id after every answer.
    pub eos_token_id: u32,
    /// The padding token's id, if any.
    pub pad_token_id: Option<u32>,
    /// Every special token with its id.
    pub special_token_ids: BTreeMap<String, u32>,
    /// The ids at which generation stops: the end of text, and stop strings that are one token.
    pub stop_token_ids: Vec<u32>,
    /// The vocabulary's size, added tokens included.
    pub vocab_size: usize,
}

impl TemplateFile {
    /// The file's name beside an adapter.
    pub const NAME: &'static str = "template.json";

    /// Binds a template to the tokenizer it is used with.
    pub fn new(template: &Template, tokenizer: &Tokenizer, special_tokens: SpecialTokens) -> Self {
        let ids: BTreeMap<String, u32> =
            tokenizer.special_tokens().iter().map(|(&id, token)| (token.clone(), id)).collect();
        let mut stop_token_ids = vec![tokenizer.eos()];
        stop_token_ids.extend(template.stop.iter().filter_map(|text| ids.get(text)));
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        Self {
            template: template.clone(),
            special_tokens,
            bos_token_id: tokenizer.bos(),
            eos_token_id: tokenizer.eos(),
            pad_token_id: tokenizer.pad(),
            special_token_ids: ids,
            stop_token_ids,
            vocab_size: tokenizer.vocab_size(),
        }
    }

    /// The file's contents.
    pub fn to_json(&self) -> String {
        let mut json = serde_json::to_string_pretty(self).expect("strings and numbers make JSON");
        json.push('\n');
        json
    }

    /// Reads `template.json` from an adapter's folder; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that cannot be read or says something else.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(Self::NAME);
        if !path.exists() && !path.is_symlink() {
            return Ok(None);
        }
        let place = path.display().to_string();
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Error::invalid(&place, format!("cannot be read: {error}")))?;
        serde_json::from_str(&text).map(Some).map_err(|error| {
            Error::invalid(&place, format!("is no template: {error}")).hint("export the adapter again")
        })
    }
}
