//! A record to a sample: the ids of prompt and answer, and where the answer begins.

use serde::{Deserialize, Serialize};

use super::reason::Reason;
use super::record::Record;
use super::template::Template;
use super::tokenizer::{SpecialTokens, Tokenizer};
use crate::error::{Error, Result};

/// What becomes of a sample longer than `max_length` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// It is left out, before the order of samples is made.
    Drop,
    /// It is cut, the end-of-text token with it, and keeps its place even where nothing is left to learn.
    Cut,
    /// It is an error.
    Error,
}

/// How records become samples.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// Makes the ids.
    pub tokenizer: &'a Tokenizer,
    /// Makes the prompt.
    pub template: &'a Template,
    /// What becomes of special tokens in a record's text.
    pub special_tokens: SpecialTokens,
    /// Tokens a sample may have.
    pub max_length: usize,
    /// What becomes of a sample that has more.
    pub truncation: Truncation,
}

/// An encoded sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoded {
    /// Tokens of the prompt; the labels over them are -100. All further tokens are learned.
    pub n_prompt: u32,
    /// Tokens it had before any cut.
    pub full_length: usize,
    /// Whether a special token is written in the record's text.
    pub has_special: bool,
    /// Whether the answer is empty or blank, so that little more than the end of the text is learned.
    pub has_no_answer: bool,
    /// Whether the row asks to have an earlier answer learned too.
    pub asks_for_earlier: bool,
}

/// Why a record makes no sample.
#[derive(Debug)]
pub enum Failure {
    /// The row is bad.
    Row(Reason),
    /// Something else failed.
    Other(Error),
}

impl Encoder<'_> {
    /// Appends a record's ids to `ids`: the prompt with the token that begins a text, then the answer, encoded by
    /// itself, with the token that ends one. A sample to be dropped (or refused) leaves `ids` as it was.
    ///
    /// # Errors
    /// [`Failure::Row`] for a record that does not fit the template.
    pub fn encode(&self, record: &Record, ids: &mut Vec<u32>) -> std::result::Result<Encoded, Failure> {
        let start = ids.len();
        let parts = self.template.prompt(record).map_err(Failure::Row)?;
        ids.extend(self.tokenizer.bos());
        let answered = self.tokenizer.encode_parts(&parts, self.special_tokens, ids).and_then(|()| {
            let n_prompt = ids.len() - start;
            self.tokenizer.encode_into(&record.answer, self.special_tokens, ids)?;
            ids.push(self.tokenizer.eos());
            Ok(n_prompt)
        });
        let n_prompt = answered.map_err(Failure::Other)?;
        let full_length = ids.len() - start;
        if full_length > self.max_length {
            let kept = if self.truncation == Truncation::Cut { self.max_length } else { 0 };
            ids.truncate(start + kept);
        }
        let n_prompt = n_prompt.min(ids.len() - start);
        let n_prompt = u32::try_from(n_prompt)
            .map_err(|_| Failure::Row(Reason::new("is longer than four thousand million tokens")))?;
        let mut texts = record.history.iter().flat_map(|(question, answer)| [question, answer]).chain(&record.system);
        let has_special = texts.any(|text| self.tokenizer.has_special(text))
            || self.tokenizer.has_special(&record.question)
            || self.tokenizer.has_special(&record.answer);
        let has_no_answer = record.answer.trim().is_empty();
        Ok(Encoded { n_prompt, full_length, has_special, has_no_answer, asks_for_earlier: record.asks_for_earlier })
    }
}

/// The ids of a prompt to be answered, with the token that begins a text.
///
/// # Errors
/// [`Error::Invalid`] for a record that does not fit the template.
pub fn prompt_ids(
    tokenizer: &Tokenizer,
    template: &Template,
    special_tokens: SpecialTokens,
    record: &Record,
) -> Result<Vec<u32>> {
    let parts = template.prompt(record).map_err(|reason| Error::invalid("prompt", reason.what).hint(reason.hint))?;
    let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    tokenizer.encode_parts(&parts, special_tokens, &mut ids)?;
    Ok(ids)
}
