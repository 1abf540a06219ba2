//! The lengths of samples without their text: what speed and memory depend on.

use std::path::Path;

use serde::Deserialize;

use super::order::permutation;
use crate::error::{Error, Result};

/// What a file of lengths must say in `format`.
const FORMAT: &str = "bellora lengths 1";

/// The lengths of BELLE's samples; `data/README.md` says how they were counted.
const BELLE: &str = include_str!("../../data/lengths/belle.json");

/// A sample's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Length {
    /// All tokens.
    pub tokens: u32,
    /// Those that are learned; fewer than `tokens`, for no token comes before the first.
    pub learned: u32,
}

/// The lengths of some samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lengths {
    /// What they are the lengths of, for people.
    pub about: String,
    /// One a sample, ascending.
    samples: Vec<Length>,
}

/// A file of lengths.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LengthsFile {
    format: String,
    about: String,
    /// `[tokens, learned, samples of this length]`.
    lengths: Vec<[i64; 3]>,
}

/// More than any data set on which speed is measured; beyond it a number is a slip.
const MOST_SAMPLES: i64 = 10_000_000;
/// The longest sample that a config may ask for.
const MOST_TOKENS: i64 = 1 << 20;

impl Lengths {
    /// The lengths of BELLE's samples: 175 tokens on average, of which 102 are learned.
    ///
    /// # Errors
    /// None, as long as the file that is built in is whole.
    pub fn belle() -> Result<Self> {
        Self::parse(BELLE, "the lengths that are built in")
    }

    /// Equal lengths, all of it learned (but the first token, which never is).
    ///
    /// # Errors
    /// A length that no sample can have.
    pub fn equal(tokens: u32) -> Result<Self> {
        if !(2..=MOST_TOKENS).contains(&i64::from(tokens)) {
            return Err(Error::invalid("--lengths", format!("expected 2 to {MOST_TOKENS} tokens, found {tokens}"))
                .hint("a sample has a token to learn and one before it"));
        }
        let about = format!("samples of {tokens} tokens, all learned");
        Ok(Self { about, samples: vec![Length { tokens, learned: tokens - 1 }] })
    }

    /// What an argument says: a number of tokens, or the path of a file.
    ///
    /// # Errors
    /// As [`Lengths::equal`] and [`Lengths::read`].
    pub fn of_argument(text: &str) -> Result<Self> {
        match text.parse::<u32>() {
            Ok(tokens) => Self::equal(tokens),
            Err(_) => Self::read(Path::new(text)),
        }
    }

    /// Reads a file of lengths.
    ///
    /// # Errors
    /// A file that cannot be read or is not of this form, with the first entry at fault.
    pub fn read(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::invalid(&place, format!("the lengths cannot be read: {error}"))
                .hint("name a file of lengths (data/README.md has its form), or a number for samples of equal length")
        })?;
        Self::parse(&text, &place)
    }

    fn parse(text: &str, place: &str) -> Result<Self> {
        let form = format!(
            "its form is {{\"format\": \"{FORMAT}\", \"about\": \"...\", \"lengths\": [[tokens, learned, samples], ...]}}"
        );
        let file: LengthsFile = serde_json::from_str(text)
            .map_err(|error| Error::invalid(place, format!("is not a file of lengths: {error}")).hint(&form))?;
        if file.format != FORMAT {
            return Err(Error::invalid(place, format!("has the format {:?}, not {FORMAT:?}", file.format)).hint(&form));
        }
        let mut samples = Vec::new();
        for (at, [tokens, learned, count]) in file.lengths.into_iter().enumerate() {
            let expected = match () {
                () if !(2..=MOST_TOKENS).contains(&tokens) => format!("expected 2 to {MOST_TOKENS} tokens"),
                () if !(0..tokens).contains(&learned) => "expected fewer learned tokens than tokens".to_string(),
                () if !(1..=MOST_SAMPLES - samples.len() as i64).contains(&count) => {
                    format!("expected at least one sample, and at most {MOST_SAMPLES} in all")
                }
                () => {
                    let length = Length { tokens: tokens as u32, learned: learned as u32 };
                    samples.extend(std::iter::repeat_n(length, count as usize));
                    continue;
                }
            };
            let place = format!("{place}: lengths[{at}]");
            return Err(Error::invalid(place, format!("{expected}, found [{tokens}, {learned}, {count}]")).hint(&form));
        }
        if !samples.iter().any(|length| length.learned > 0) {
            return Err(Error::invalid(place, "has no sample with anything to learn").hint(&form));
        }
        samples.sort_unstable();
        Ok(Self { about: file.about, samples })
    }

    /// One length a sample, ascending.
    pub fn samples(&self) -> &[Length] {
        &self.samples
    }

    /// The mean number of tokens.
    pub fn mean_tokens(&self) -> f64 {
        self.mean(|length| length.tokens)
    }

    /// The mean number of learned tokens.
    pub fn mean_learned(&self) -> f64 {
        self.mean(|length| length.learned)
    }

    fn mean(&self, number: impl Fn(&Length) -> u32) -> f64 {
        self.samples.iter().map(|length| f64::from(number(length))).sum::<f64>() / self.samples.len() as f64
    }

    /// The tokens of the longest sample.
    pub fn longest(&self) -> usize {
        self.samples.last().map_or(0, |length| length.tokens as usize)
    }

    /// Draws `n` lengths: all of them in an order that the seed defines, then all again in another, and so on.
    pub fn draw(&self, n: usize, seed: u64) -> Vec<Length> {
        let rounds = n.div_ceil(self.samples.len()) as u64;
        let order = (0..rounds).flat_map(|round| permutation(self.samples.len(), seed, round));
        order.take(n).map(|sample| self.samples[sample as usize]).collect()
    }
}
