//! A row to a sample: its ids, and which of them are learned.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::chat::{Answers, ChatTemplate};
use super::conversation::{ASSISTANT, Conversation, role};
use super::prompting::Prompting;
use super::reason::Reason;
use super::record::Record;
use super::rows::RowFile;
use super::template::Template;
use super::tokenizer::{SpecialTokens, Tokenizer};
use crate::choice::choice;
use crate::error::{Error, Result};

choice! {
    /// What becomes of a sample longer than `max_length` tokens.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    Truncation {
        /// It is left out, before the order of samples is made.
        Drop = "drop",
        /// It is cut, the end-of-text token with it, and keeps its place even where nothing is left to learn.
        Cut = "cut",
        /// It is an error.
        Error = "error",
    }
}

/// How rows become samples.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// Makes the ids.
    pub tokenizer: &'a Tokenizer,
    /// Makes the text.
    pub template: &'a Prompting,
    /// Which answers are learned.
    pub answers: Answers,
    /// What becomes of special tokens in a row's text.
    pub special_tokens: SpecialTokens,
    /// Tokens a sample may have.
    pub max_length: usize,
    /// What becomes of a sample that has more.
    pub truncation: Truncation,
}

/// An encoded sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The spans of its tokens that are learned, ascending; the labels over all others are -100.
    pub spans: Vec<[u32; 2]>,
    /// Tokens it had before any cut.
    pub full_length: usize,
    /// What else is told of its row.
    pub told: Told,
}

/// What is counted of a row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Whether a special token is written in its own text.
    pub has_special: bool,
    /// Whether the last answer is empty or blank, so that little more than the end of the text is learned.
    pub has_no_answer: bool,
    /// Whether it asks to have an earlier answer learned, where the last alone is.
    pub asks_for_earlier: bool,
    /// Whether the template leaves out some of its text.
    pub lacks_text: bool,
    /// Its keys that say nothing here and are passed over.
    pub passed_over: Vec<String>,
}

/// Why a row makes no sample.
#[derive(Debug)]
pub enum Failure {
    /// The row is bad.
    Row(Reason),
    /// Something else failed.
    Other(Error),
}

impl Encoder<'_> {
    /// Appends the ids of a row of a file. A sample to be dropped (or refused) leaves `ids` as it was.
    ///
    /// # Errors
    /// [`Failure::Row`] for a row that cannot be read or does not fit the template.
    pub(super) fn encode_row(
        &self,
        rows: &RowFile,
        row: usize,
        ids: &mut Vec<u32>,
    ) -> std::result::Result<Encoded, Failure> {
        match self.template {
            Prompting::Strings(template) => self.encode(template, &rows.record(row).map_err(Failure::Row)?, ids),
            Prompting::Chat(template) => {
                self.encode_chat(template, &rows.conversation(row).map_err(Failure::Row)?, ids)
            }
        }
    }

    /// Appends a record's ids: the prompt with the token that begins a text, then the answer, encoded by itself, with the token
    /// that ends one.
    ///
    /// # Errors
    /// [`Failure::Row`] for a record that does not fit the template.
    fn encode(
        &self,
        template: &Template,
        record: &Record,
        ids: &mut Vec<u32>,
    ) -> std::result::Result<Encoded, Failure> {
        let start = ids.len();
        let parts = template.prompt(record).map_err(Failure::Row)?;
        ids.extend(self.tokenizer.bos());
        let mut spans = Vec::new();
        let mut answered = || {
            if self.answers == Answers::All && !record.history.is_empty() {
                let text: String = parts.iter().map(|part| part.text).collect();
                let learned = template.earlier_answers(record, |text| self.tokenizer.last_special(text));
                spans = push_text(self.tokenizer, &text, &learned, start, ids)?;
            } else {
                self.tokenizer.encode_parts(&parts, self.special_tokens, ids)?;
            }
            spans.push(ids.len() - start..0);
            self.tokenizer.encode_into(&record.answer, self.special_tokens, ids)?;
            ids.push(self.tokenizer.eos());
            Ok(())
        };
        answered().map_err(Failure::Other)?;
        if let Some(last) = spans.last_mut() {
            last.end = ids.len() - start;
        }
        let mut texts = record.history.iter().flat_map(|(question, answer)| [question, answer]).chain(&record.system);
        let told = Told {
            has_special: texts.any(|text| self.tokenizer.has_special(text))
                || self.tokenizer.has_special(&record.question)
                || self.tokenizer.has_special(&record.answer),
            has_no_answer: record.answer.trim().is_empty(),
            asks_for_earlier: record.asks_for_earlier && self.answers == Answers::Last,
            lacks_text: false,
            passed_over: record.passed_over.clone(),
        };
        self.cut(spans, start, told, ids)
    }

    /// Appends a conversation's ids: the whole text that the template makes, encoded at once.
    fn encode_chat(
        &self,
        template: &ChatTemplate,
        conversation: &Conversation,
        ids: &mut Vec<u32>,
    ) -> std::result::Result<Encoded, Failure> {
        let start = ids.len();
        let rendered = template.learned(conversation, self.answers).map_err(Failure::Row)?;
        let spans = push_text(self.tokenizer, &rendered.text, &rendered.learned, start, ids).map_err(Failure::Other)?;
        let contents =
            || conversation.messages.iter().filter_map(|message| Some((role(message), message["content"].as_str()?)));
        let last_answer = contents().rfind(|(role, _)| *role == ASSISTANT);
        let told = Told {
            has_special: contents().any(|(_, text)| self.tokenizer.has_special(text)),
            has_no_answer: last_answer.is_some_and(|(_, text)| text.trim().is_empty()),
            asks_for_earlier: conversation.asks_for_earlier && self.answers == Answers::Last,
            lacks_text: rendered.lacks_text,
            passed_over: conversation.passed_over.clone(),
        };
        self.cut(spans, start, told, ids)
    }

    /// Cuts or leaves out what is too long.
    fn cut(
        &self,
        spans: Vec<Range<usize>>,
        start: usize,
        told: Told,
        ids: &mut Vec<u32>,
    ) -> std::result::Result<Encoded, Failure> {
        let full_length = ids.len() - start;
        if full_length > self.max_length {
            let kept = if self.truncation == Truncation::Cut { self.max_length } else { 0 };
            ids.truncate(start + kept);
        }
        let length = ids.len() - start;
        u32::try_from(full_length)
            .map_err(|_| Failure::Row(Reason::new("is longer than four thousand million tokens")))?;
        let spans = spans.into_iter().map(|span| [span.start.min(length) as u32, span.end.min(length) as u32]);
        Ok(Encoded { spans: spans.collect(), full_length, told })
    }
}

/// Appends the ids of a whole text, and gives the spans of tokens, from `start` on, that stand for the learned parts of it: a token is
/// learned if it overlaps one.
fn push_text(
    tokenizer: &Tokenizer,
    text: &str,
    learned: &[Range<usize>],
    start: usize,
    ids: &mut Vec<u32>,
) -> Result<Vec<Range<usize>>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    for (id, part) in tokenizer.encode_with_offsets(text)? {
        let at = ids.len() - start;
        ids.push(id);
        let overlaps =
            |span: &Range<usize>| part.start < span.end && (part.end > span.start || part.start >= span.start);
        if learned.iter().any(overlaps) {
            match spans.last_mut() {
                Some(last) if last.end == at => last.end = at + 1,
                _ => spans.push(at..at + 1),
            }
        }
    }
    Ok(spans)
}

/// The ids of a conversation to be answered. With strings the token that begins a text goes first; a chat template writes it itself.
///
/// # Errors
/// [`Error::Invalid`] at `place` for a conversation that does not fit the template.
pub fn prompt_ids(
    place: &str,
    tokenizer: &Tokenizer,
    template: &Prompting,
    special_tokens: SpecialTokens,
    conversation: &Conversation,
) -> Result<Vec<u32>> {
    let refused = |reason: Reason| Error::invalid(place, reason.what).hint(reason.hint);
    match template {
        Prompting::Strings(template) => {
            let record = conversation.asked().map_err(refused)?;
            let parts = template.prompt(&record).map_err(refused)?;
            let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
            tokenizer.encode_parts(&parts, special_tokens, &mut ids)?;
            Ok(ids)
        }
        Prompting::Chat(_) if conversation.messages.last().is_some_and(|last| role(last) == ASSISTANT) => Err(refused(
            Reason::new("the messages end with an answer").hint("let them end with what is to be answered"),
        )),
        Prompting::Chat(template) => {
            let text = template.prompt(conversation).map_err(refused)?;
            tokenizer.encode(&text, SpecialTokens::Special)
        }
    }
}
