//! `tokenizer.json` files, through Hugging Face's `tokenizers`.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::special::{Added, Declared};
use crate::error::{Error, Result};

/// A loaded `tokenizer.json`.
pub(super) struct HfTokenizer {
    /// Finds special tokens in texts.
    special: Tokenizer,
    /// The same, but special tokens are plain text to it; made when first asked for.
    plain: OnceLock<Box<Tokenizer>>,
    /// The tokens added to the vocabulary, in the file and beside it.
    added: BTreeMap<u32, AddedToken>,
    /// Past the highest id in use.
    n_ids: u32,
}

impl HfTokenizer {
    /// Reads the file and adds the tokens that the files beside it declare.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that `tokenizers` does not read, that encodes at random (dropout), or that
    /// disagrees with the files beside it about an id.
    pub(super) fn new(bytes: &[u8], declared: &Declared, place: &str) -> Result<Self> {
        let invalid = |what: String| Error::invalid(place, what);
        let damaged = |what: &dyn std::fmt::Display| {
            invalid(format!("is not a tokenizer.json: {what}")).hint("the file is damaged or of an unknown version")
        };
        let json: Value = serde_json::from_slice(bytes).map_err(|error| damaged(&error))?;
        // `tokenizers` 0.23 panics on some files that say what it does not expect.
        let mut tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes))
            .map_err(|_| damaged(&"the tokenizers library cannot read it"))?
            .map_err(|error| damaged(&error))?;
        if json.pointer("/model/dropout").and_then(Value::as_f64).is_some_and(|dropout| dropout > 0.0) {
            return Err(invalid("has dropout in its model: texts would be encoded at random".into())
                .hint("set model.dropout to null in the file"));
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let (text, id) = (token["content"].as_str().unwrap_or_default(), token["id"].as_u64());
            let given = tokenizer.token_to_id(text).map(u64::from);
            if given != id {
                let what = format!("numbers `{text}` as {}, which leaves holes in its vocabulary", token["id"]);
                return Err(invalid(what).hint("number the added tokens without holes after the model's vocabulary"));
            }
        }
        // A file may keep settings of a pipeline that cut or padded; here samples are cut by data.truncation alone.
        tokenizer.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        tokenizer.with_padding(None);

        for token in &declared.added {
            let known = tokenizer.token_to_id(&token.text);
            if known.is_none() {
                tokenizer
                    .add_special_tokens([AddedToken::from(token.text.as_str(), true)
                        .lstrip(token.lstrip)
                        .rstrip(token.rstrip)])
                    .map_err(|error| invalid(error.to_string()))?;
            }
            let id = tokenizer.token_to_id(&token.text);
            if let (Some(declared), Some(id)) = (token.id, id)
                && declared != id
            {
                let what = format!("gives token `{}` the id {id}, the files beside it {declared}", token.text);
                return Err(invalid(what).hint("the tokenizer's files do not belong together: download them again"));
            }
        }
        let added = tokenizer.get_added_tokens_decoder().into_iter().collect();
        let n_ids = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        Ok(Self { special: tokenizer, plain: OnceLock::new(), added, n_ids })
    }

    pub(super) fn n_ids(&self) -> u32 {
        self.n_ids
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.special.token_to_id(token)
    }

    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.special.id_to_token(id)
    }

    /// The special tokens, as the matcher takes them.
    pub(super) fn specials(&self) -> impl Iterator<Item = (Added, u32)> {
        self.added.iter().filter(|(_, token)| token.special).map(|(&id, token)| {
            let added =
                Added { lstrip: token.lstrip, rstrip: token.rstrip, ..Added::special(&token.content, Some(id)) };
            (added, id)
        })
    }

    /// What the post-processor puts before a text.
    pub(super) fn prefix(&self, place: &str) -> Result<Vec<u32>> {
        // `tokenizers` 0.23 panics on a post-processor that names a token the vocabulary lacks.
        let encode = |special| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.special.encode_fast("a", special)))
                .map_err(|_| broken(place, &"its post-processor names a token that is not in its vocabulary"))?
                .map_err(|error| broken(place, &error))
        };
        let (bare, full) = (encode(false)?, encode(true)?);
        let at = full.get_ids().windows(bare.len().max(1)).position(|window| window == bare.get_ids()).unwrap_or(0);
        Ok(full.get_ids()[..at].to_vec())
    }

    pub(super) fn encode(&self, text: &str, plain: bool) -> Result<Vec<u32>> {
        let tokenizer = if plain {
            self.plain.get_or_init(|| {
                let mut tokenizer = self.special.clone();
                tokenizer.set_encode_special_tokens(true);
                Box::new(tokenizer)
            })
        } else {
            &self.special
        };
        let encoding = tokenizer.encode_fast(text, false).map_err(|error| broken("tokenizer.json", &error))?;
        Ok(encoding.get_ids().to_vec())
    }

    pub(super) fn decode(&self, ids: &[u32], show_special: bool) -> Result<String> {
        self.special.decode(ids, !show_special).map_err(|error| broken("tokenizer.json", &error))
    }
}

fn broken(place: &str, error: &dyn std::fmt::Display) -> Error {
    Error::invalid(place, format!("cannot encode or decode a text: {error}"))
        .hint("the file is damaged or made by hand: download the model's own tokenizer files again")
}
