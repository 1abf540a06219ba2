//! Prompt templates: the exact strings around what a sample says.
//!
//! A prompt is `start`, the system prompt if there is one, the earlier turns, the question, `end`; the answer follows
//! and its end-of-text token closes it. Nothing is stripped and nothing is added.
//!
//! The built-in templates write a dialogue into their `### Instruction:` as
//! `Human:{question}\nAssistant:{answer}\nHuman:{question}`, and a question without history as it stands. They have no
//! place for a system prompt (the trainers they come from have none), so a row with one is refused, not changed.

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::reason::Reason;
use super::record::Record;
use super::tokenizer::PromptPart;
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

impl Template {
    /// Where, in the text of a record's prompt, the earlier answers stand, each up to and with the token that ends its turn, if the
    /// string behind it has one; `last_special` says where the last special token of a text ends.
    pub(super) fn earlier_answers(&self, record: &Record, last_special: impl Fn(&str) -> usize) -> Vec<Range<usize>> {
        let length = |around: &Around, text: &str| around[0].len() + text.len() + around[1].len();
        let system = record.system.as_deref().zip(self.system.as_ref());
        let mut at = self.start.len() + system.map_or(0, |(text, around)| length(around, text));
        let end_of_turn = last_special(&self.reply[1]);
        let answer = |(question, answer): &(String, String)| {
            let start = at + length(&self.user, question) + self.reply[0].len();
            at = start + answer.len() + self.reply[1].len();
            start..start + answer.len() + end_of_turn
        };
        record.history.iter().map(answer).collect()
    }
}
