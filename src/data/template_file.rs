//! `template.json` beside an adapter: the texts and ids that it was trained with.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::prompting::{Prompting, SavedTemplate};
use super::tokenizer::{SpecialTokens, Tokenizer};
use crate::error::{Error, Result};

/// `template.json`: everything about texts and ids that an adapter was trained with and that must be the same in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFile {
    /// The exact strings, or the chat template.
    pub template: SavedTemplate,
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
    pub fn new(template: &Prompting, tokenizer: &Tokenizer, special_tokens: SpecialTokens) -> Self {
        let ids: BTreeMap<String, u32> =
            tokenizer.special_tokens().iter().map(|(&id, token)| (token.clone(), id)).collect();
        let mut stop_token_ids = vec![tokenizer.eos()];
        stop_token_ids.extend(template.stop().iter().filter_map(|text| ids.get(text)));
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        Self {
            template: template.saved(),
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
