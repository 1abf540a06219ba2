//! Tokenizers: text to ids and back, from a SentencePiece `tokenizer.model` or a `tokenizer.json`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::choice::choice;
use crate::error::{Fault, Result};
use hf::HfTokenizer;
use merge::Scratch;
use sentencepiece::{Decoding, SentencePiece};
use special::Matcher;

pub use stream::DecodeStream;

mod compare;
mod declared;
mod folder;
mod hf;
mod merge;
mod open;
mod pairs;
pub mod proto;
mod sentencepiece;
mod special;
mod stream;

choice! {
    /// What becomes of special tokens, like `</s>`, that are written in the text of a sample.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    SpecialTokens {
        /// They become their ids and split the text; each stretch between them gets its own dummy prefix.
        Special = "special",
        /// They are encoded as plain text.
        Text = "text",
    }
}

/// A file of the tokenizer's, to be kept beside an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerFile {
    /// Its name in a folder: `tokenizer.model`, `tokenizer_config.json`...
    pub name: String,
    /// Its contents, as they were read.
    pub bytes: Vec<u8>,
}

/// A stretch of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptPart<'a> {
    /// The text.
    pub text: &'a str,
    /// Whether it belongs to the template: special tokens in it are always special.
    pub of_template: bool,
}

/// A tokenizer and the special tokens it knows. It can be shared between threads.
pub struct Tokenizer {
    place: String,
    backend: Backend,
    /// Every special token, as it is found in texts.
    specials: Matcher,
    special_ids: BTreeMap<u32, String>,
    /// SentencePiece: the added tokens that are found even where special tokens are plain text.
    kept: Matcher,
    /// SentencePiece: the tokens past its pieces.
    past_pieces: BTreeMap<u32, String>,
    bos: Option<u32>,
    eos: u32,
    pad: Option<u32>,
    vocab_size: usize,
    files: Vec<TokenizerFile>,
    warnings: Vec<Fault>,
}

enum Backend {
    SentencePiece(Box<SentencePiece>),
    Hf(Box<HfTokenizer>),
}

impl Tokenizer {
    /// The ids of a text, nothing put before or after it.
    ///
    /// # Errors
    /// [`Error::Failed`] where a `tokenizer.json` has no token for the text.
    pub fn encode(&self, text: &str, special_tokens: SpecialTokens) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 2 + 8);
        self.encode_into(text, special_tokens, &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of a text; see [`Self::encode`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_into(&self, text: &str, special_tokens: SpecialTokens, ids: &mut Vec<u32>) -> Result<()> {
        self.encode_stretch(text, true, special_tokens, ids)
    }

    /// Appends the ids of a text or of a part of one; `at_start` says that nothing goes before it.
    fn encode_stretch(
        &self,
        text: &str,
        at_start: bool,
        special_tokens: SpecialTokens,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        let plain = special_tokens == SpecialTokens::Text;
        let model = match &self.backend {
            Backend::Hf(hf) => {
                ids.extend(hf.encode(text, at_start, plain)?);
                return Ok(());
            }
            Backend::SentencePiece(model) => model,
        };
        let matcher = if plain { &self.kept } else { &self.specials };
        SCRATCH.with_borrow_mut(|scratch| {
            let mut at = 0;
            while let Some(hit) = matcher.find(text, at) {
                model.encode(&text[at..hit.start], at_start && at == 0, scratch, ids);
                ids.push(hit.id);
                at = hit.end;
            }
            model.encode(&text[at..], at_start && at == 0, scratch, ids);
        });
        Ok(())
    }

    /// The ids of a text, in which special tokens count, each with the bytes of the text that it stands for. A dummy prefix stands
    /// for none, and neither do the bytes of a character before its last, where it is spelled out in bytes.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let model = match &self.backend {
            Backend::Hf(hf) => return hf.encode_with_offsets(text),
            Backend::SentencePiece(model) => model,
        };
        let mut found = Vec::with_capacity(text.len() / 2 + 8);
        let (mut scratch, mut ids, mut at) = (Scratch::default(), Vec::new(), 0);
        loop {
            let hit = self.specials.find(text, at);
            let end = hit.as_ref().map_or(text.len(), |hit| hit.start);
            ids.clear();
            model.encode(&text[at..end], at == 0, &mut scratch, &mut ids);
            let offsets = model.offsets(&text[at..end], at == 0, &ids);
            found.extend(ids.iter().zip(offsets).map(|(id, part)| (*id, at + part.start..at + part.end)));
            let Some(hit) = hit else { return Ok(found) };
            found.push((hit.id, hit.start..hit.end));
            at = hit.end;
        }
    }

    /// Appends the ids of a prompt. With [`SpecialTokens::Text`] the template's own special tokens still count; only
    /// what the sample says is plain text.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_parts(
        &self,
        parts: &[PromptPart<'_>],
        special_tokens: SpecialTokens,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let mut stretch = String::with_capacity(parts.iter().map(|part| part.text.len()).sum());
        let mut at_start = true;
        for part in parts {
            let mut at = 0;
            if special_tokens == SpecialTokens::Text && part.of_template {
                while let Some(hit) = self.specials.find(part.text, at) {
                    stretch.push_str(&part.text[at..hit.start]);
                    self.encode_stretch(&stretch, at_start, special_tokens, ids)?;
                    stretch.clear();
                    at_start = false;
                    ids.push(hit.id);
                    at = hit.end;
                }
            }
            stretch.push_str(&part.text[at..]);
        }
        self.encode_stretch(&stretch, at_start, special_tokens, ids)
    }

    /// The text of ids; special tokens leave no trace, ids that are no token are passed over.
    ///
    /// # Errors
    /// [`Error::Failed`] where the decoder of a `tokenizer.json` fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode_with(ids, false)
    }

    /// The text of ids with the special tokens written out, for people to look at.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn show(&self, ids: &[u32]) -> Result<String> {
        self.decode_with(ids, true)
    }

    fn decode_with(&self, ids: &[u32], show_special: bool) -> Result<String> {
        let model = match &self.backend {
            Backend::Hf(hf) => return hf.decode(ids, show_special),
            Backend::SentencePiece(model) => model,
        };
        let mut text = Decoding::default();
        for id in ids {
            match (self.special_ids.get(id), self.past_pieces.get(id)) {
                (Some(token), _) if show_special => text.push_str(token),
                (Some(_), _) => {}
                (None, Some(token)) => text.push_str(token),
                (None, None) => model.decode(*id, &mut text),
            }
        }
        Ok(text.finish())
    }

    /// Starts decoding ids that come one by one.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), n_read: 0 }
    }

    /// The token of an id as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        match &self.backend {
            Backend::Hf(hf) => hf.token(id),
            Backend::SentencePiece(model) => {
                model.piece(id).or_else(|| self.past_pieces.get(&id).map(String::as_str)).map(str::to_owned)
            }
        }
    }

    /// Whether a special token is written in a text.
    pub fn has_special(&self, text: &str) -> bool {
        self.specials.find(text, 0).is_some()
    }

    /// Where the last special token of a text ends; 0 where there is none.
    pub(super) fn last_special(&self, text: &str) -> usize {
        let mut end = 0;
        while let Some(hit) = self.specials.find(text, end) {
            end = hit.end;
        }
        end
    }

    /// The special tokens by id.
    pub fn special_tokens(&self) -> &BTreeMap<u32, String> {
        &self.special_ids
    }

    /// The id that goes before a prompt; `None` where the tokenizer has none or its files say that none is added.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The id that ends an answer.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The padding token's id, where there is one. Nothing here pads.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// The vocabulary's size: past the highest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The file it was read from, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// What its files hold that may not be what the user means, though it is no fault.
    pub fn warnings(&self) -> &[Fault] {
        &self.warnings
    }

    /// The files that make the same tokenizer in another folder, with those that go along with it. A bare `.model` file comes with a small
    /// `tokenizer_config.json`, so that other programs read it the same way.
    pub fn files(&self) -> &[TokenizerFile] {
        &self.files
    }

    /// A number that differs between tokenizers that may encode differently.
    pub fn fingerprint(&self) -> u128 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for file in self.files.iter().filter(|file| folder::decides_ids(&file.name)) {
            hasher.update(&(file.name.len() as u64).to_le_bytes());
            hasher.update(file.name.as_bytes());
            hasher.update(&(file.bytes.len() as u64).to_le_bytes());
            hasher.update(&file.bytes);
        }
        hasher.digest128()
    }
}
