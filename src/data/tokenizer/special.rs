//! Special tokens: what the JSON files beside a tokenizer declare, and finding such tokens in a text.

use std::collections::BTreeMap;

use serde_json::Value;

use super::TokenizerFile;
use crate::error::{Error, Fault, Result};

/// A token that the tokenizer's files add to the vocabulary or name as special.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) text: String,
    /// The id its file gives it; `None` for a token that is only named and so takes the next free id if it is new.
    pub(super) id: Option<u32>,
    /// False only where `added_tokens_decoder` says so: such a token is found in texts in either mode.
    pub(super) special: bool,
    /// Whether it swallows the white space before it, and after it.
    pub(super) lstrip: bool,
    pub(super) rstrip: bool,
}

impl Added {
    pub(super) fn special(text: impl Into<String>, id: Option<u32>) -> Self {
        Self { text: text.into(), id, special: true, lstrip: false, rstrip: false }
    }
}

/// What `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say.
#[derive(Debug, Default)]
pub(super) struct Declared {
    /// Every token of theirs once; those with an id first, by id, then the others in the order they were named.
    pub(super) added: Vec<Added>,
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    pub(super) pad: Option<String>,
    /// `add_bos_token`, where it is said.
    pub(super) add_bos: Option<bool>,
}

/// The names under which the files keep single special tokens, in the order in which new ones take their ids.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Declared {
    /// Reads the declaring files among `files`; `place` is the tokenizer's folder, for messages.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that is not JSON, a token with two ids or an id with two tokens.
    pub(super) fn read(files: &[TokenizerFile], place: &str) -> Result<Self> {
        let config = object(files, "tokenizer_config.json", place)?;
        let map = object(files, "special_tokens_map.json", place)?;
        let numbered = object(files, "added_tokens.json", place)?;
        let mut reader = Reader { by_text: BTreeMap::new(), faults: Vec::new(), place };

        if let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) {
            for (key, token) in decoder {
                match (key.parse::<u32>(), text_of(token)) {
                    (Ok(id), Some(text)) => reader.add(numbered_token(text, id, token), "tokenizer_config.json"),
                    _ => reader.fault("tokenizer_config.json", format!("added_tokens_decoder has a bad entry `{key}`")),
                }
            }
        }
        for (text, id) in &numbered {
            match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) => reader.add(Added::special(text, Some(id)), "added_tokens.json"),
                None => reader.fault("added_tokens.json", format!("the id of `{text}` is not a whole number")),
            }
        }

        // A config of the newer kind, with its own list of added tokens, goes before the map; the older kind after it.
        let order = if config.contains_key("added_tokens_decoder") { [&config, &map] } else { [&map, &config] };
        let named = |key: &str| order.iter().find_map(|file| file.get(key).and_then(text_of));
        let lists = ["additional_special_tokens", "extra_special_tokens"]
            .iter()
            .flat_map(|key| order.iter().filter_map(|file| file.get(*key)))
            .flat_map(|value| match value {
                Value::Array(tokens) => tokens.iter().filter_map(text_of).collect::<Vec<_>>(),
                Value::Object(tokens) => tokens.values().filter_map(text_of).collect(),
                _ => Vec::new(),
            });
        let mut new: Vec<Added> = Vec::new();
        for text in NAMED.iter().filter_map(|key| named(key)).chain(lists) {
            if !reader.by_text.contains_key(text) && !new.iter().any(|token| token.text == text) {
                new.push(Added::special(text, None));
            }
        }

        let declared = Self {
            bos: named("bos_token").map(str::to_owned),
            eos: named("eos_token").map(str::to_owned),
            pad: named("pad_token").map(str::to_owned),
            add_bos: config.get("add_bos_token").and_then(Value::as_bool),
            added: Vec::new(),
        };
        let mut added = reader.finish()?;
        added.extend(new);
        Ok(Self { added, ..declared })
    }
}

/// Collects tokens with ids and what is wrong with them.
struct Reader<'a> {
    by_text: BTreeMap<String, Added>,
    faults: Vec<Fault>,
    place: &'a str,
}

impl Reader<'_> {
    fn fault(&mut self, file: &str, what: String) {
        self.faults.push(Fault::new(format!("{}/{file}", self.place), what));
    }

    fn add(&mut self, token: Added, file: &str) {
        match self.by_text.get(&token.text) {
            Some(old) if old.id != token.id => {
                let (old, new) = (old.id.unwrap_or_default(), token.id.unwrap_or_default());
                self.fault(file, format!("token `{}` has the id {new} here and {old} in another place", token.text));
            }
            Some(_) => {}
            None => {
                self.by_text.insert(token.text.clone(), token);
            }
        }
    }

    fn finish(mut self) -> Result<Vec<Added>> {
        let mut added: Vec<Added> = std::mem::take(&mut self.by_text).into_values().collect();
        added.sort_by_key(|token| token.id);
        for pair in added.windows(2).filter(|pair| pair[0].id == pair[1].id) {
            let what = format!(
                "tokens `{}` and `{}` have the same id {}",
                pair[0].text,
                pair[1].text,
                pair[0].id.unwrap_or_default()
            );
            self.faults.push(Fault::new(self.place, what));
        }
        if self.faults.is_empty() { Ok(added) } else { Err(Error::Invalid(self.faults)) }
    }
}

fn numbered_token(text: &str, id: u32, token: &Value) -> Added {
    let flag = |key| token.get(key).and_then(Value::as_bool).unwrap_or(false);
    Added {
        text: text.to_owned(),
        id: Some(id),
        special: flag("special"),
        lstrip: flag("lstrip"),
        rstrip: flag("rstrip"),
    }
}

/// The text of a token written as a string or as an object with `content`; an empty one means that there is none.
fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str()).filter(|text| !text.is_empty())
}

fn object(files: &[TokenizerFile], name: &str, place: &str) -> Result<serde_json::Map<String, Value>> {
    let Some(file) = files.iter().find(|file| file.name == name) else {
        return Ok(serde_json::Map::new());
    };
    match serde_json::from_slice(&file.bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::invalid(format!("{place}/{name}"), "is not a JSON object")),
        Err(error) => Err(Error::invalid(format!("{place}/{name}"), format!("is not valid JSON: {error}"))),
    }
}

/// Finds given strings in a text: the leftmost first, of those at one place the longest.
pub(super) struct Matcher {
    /// By first byte; the longest first.
    by_first_byte: Vec<Vec<(Added, u32)>>,
}

/// One place where a token stands in a text (byte offsets).
pub(super) struct Hit<'a> {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) id: u32,
    pub(super) token: &'a Added,
}

impl Matcher {
    /// Takes the tokens to look for, each with its id; empty ones never match.
    pub(super) fn new(tokens: impl IntoIterator<Item = (Added, u32)>) -> Self {
        let mut by_first_byte = vec![Vec::new(); 256];
        for (token, id) in tokens {
            if let Some(&first) = token.text.as_bytes().first() {
                by_first_byte[usize::from(first)].push((token, id));
            }
        }
        for list in &mut by_first_byte {
            list.sort_by_key(|(token, _)| std::cmp::Reverse(token.text.len()));
        }
        Self { by_first_byte }
    }

    /// The longest token at the very beginning of `text`.
    pub(super) fn at_start<'a>(&'a self, text: &[u8]) -> Option<(&'a Added, u32)> {
        let list = &self.by_first_byte[usize::from(*text.first()?)];
        list.iter().find(|(token, _)| text.starts_with(token.text.as_bytes())).map(|(token, id)| (token, *id))
    }

    /// The first token in `text`.
    pub(super) fn find<'a>(&'a self, text: &str) -> Option<Hit<'a>> {
        let bytes = text.as_bytes();
        for (start, &byte) in bytes.iter().enumerate() {
            if self.by_first_byte[usize::from(byte)].is_empty() {
                continue;
            }
            if let Some((token, id)) = self.at_start(&bytes[start..]) {
                return Some(Hit { start, end: start + token.text.len(), id, token });
            }
        }
        None
    }
}
