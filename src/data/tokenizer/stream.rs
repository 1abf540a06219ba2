//! Decoding ids that come one by one.

use super::Tokenizer;
use crate::error::Result;

/// Decodes ids one by one and gives out whole characters only.
pub struct DecodeStream<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    /// The ids from the last one that was given out alone onward: decoding the next needs what went before.
    pub(super) ids: Vec<u32>,
    /// How many of them were given out.
    pub(super) n_read: usize,
}

impl DecodeStream<'_> {
    /// Takes the next id and returns the text that it completes, often empty within a character of several bytes.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.advance(false)
    }

    /// Returns what is left at the end, bytes that make no character as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        self.advance(true)
    }

    fn advance(&mut self, at_end: bool) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.n_read])?;
        let now = self.tokenizer.decode(&self.ids)?;
        if now.len() <= before.len() || (now.ends_with('\u{fffd}') && !at_end) {
            return Ok(String::new());
        }
        let new = now.get(before.len()..).unwrap_or_default().to_owned();
        self.ids.drain(..self.n_read);
        self.n_read = self.ids.len();
        Ok(new)
    }
}
