//! `tokenizer.json` files, through Hugging Face's `tokenizers`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;

use serde_json::{Value, json};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use super::declared::{CONFIG, Declared};
use super::special::Added;
use crate::error::{Error, Fault, Result};
use crate::formats::tokenizer_keys::TOKENIZER_JSON;

/// A loaded `tokenizer.json`.
pub(super) struct HfTokenizer {
    /// Finds special tokens in texts.
    special: Tokenizer,
    /// The same, but special tokens are plain text to it; made when first asked for.
    plain: OnceLock<Box<Tokenizer>>,
    /// The same for a text that goes on behind a special token; made when first asked for.
    plain_within: OnceLock<Box<Tokenizer>>,
    /// The tokens added to the vocabulary, in the file and beside it.
    added: BTreeMap<u32, AddedToken>,
    /// Past the highest id in use.
    n_ids: u32,
}

impl HfTokenizer {
    /// Reads the file and adds the tokens that the files beside it declare; what may not be meant is added to their
    /// warnings. `place` is the file, `folder` where the others lie.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that `tokenizers` does not read, that encodes at random (dropout), or that
    /// disagrees with the files beside it about an id.
    pub(super) fn new(bytes: &[u8], declared: &mut Declared, place: &str, folder: &str) -> Result<Self> {
        let invalid = |what: String| Error::invalid(place, what);
        let damaged = |what: &dyn std::fmt::Display| {
            invalid(format!("is not a tokenizer.json: {what}")).hint("the file is damaged or of an unknown version")
        };
        let json: Value = serde_json::from_slice(bytes).map_err(|error| damaged(&error))?;
        // `tokenizers` 0.23 panics on some files that say what it does not expect.
        let mut tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes))
            .map_err(|_| damaged(&"the tokenizers library cannot read it"))?
            .map_err(|error| damaged(&error))?;
        if let Value::Object(keys) = &json {
            declared.warnings.extend(TOKENIZER_JSON.warnings(keys, place));
        }
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

        space_as_declared(&mut tokenizer, &json, declared, folder).map_err(|error| invalid(error.to_string()))?;
        declared.take_known(|token| tokenizer.token_to_id(token).is_some());
        for token in &declared.added {
            let known = tokenizer.get_added_vocabulary().get_vocab().get(&token.text).copied();
            let known = known.and_then(|id| tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id));
            // What added_tokens_decoder says goes before the file's own list; a token that is only named keeps its flags.
            let wanted = match known {
                Some(known) if !token.has_flags => {
                    AddedToken { special: known.special || token.special, ..known.clone() }
                }
                _ => AddedToken::from(token.text.as_str(), token.special)
                    .lstrip(token.lstrip)
                    .rstrip(token.rstrip)
                    .single_word(token.single_word)
                    .normalized(token.normalized),
            };
            if known != Some(&wanted) {
                tokenizer.add_special_tokens([wanted]).map_err(|error| invalid(error.to_string()))?;
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
        Ok(Self { special: tokenizer, plain: OnceLock::new(), plain_within: OnceLock::new(), added, n_ids })
    }

    pub(super) fn n_ids(&self) -> u32 {
        self.n_ids
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.special.token_to_id(token)
    }

    pub(super) fn token(&self, id: u32) -> Option<String> {
        // The library gives an added token as its normalizer leaves it.
        self.added.get(&id).map(|token| token.content.clone()).or_else(|| self.special.id_to_token(id))
    }

    /// The added tokens, special or not.
    pub(super) fn added(&self) -> impl Iterator<Item = &str> {
        self.added.values().map(|token| token.content.as_str())
    }

    /// The special tokens, as the matcher takes them.
    pub(super) fn specials(&self) -> impl Iterator<Item = (Added, u32)> {
        self.added.iter().filter(|(_, token)| token.special).map(|(&id, token)| {
            let AddedToken { lstrip, rstrip, single_word, normalized, .. } = *token;
            (Added { lstrip, rstrip, single_word, normalized, ..Added::special(&token.content, Some(id)) }, id)
        })
    }

    /// What the post-processor puts before a text and behind it.
    pub(super) fn around(&self, place: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        // `tokenizers` 0.23 panics on a post-processor that names a token the vocabulary lacks.
        let encode = |special| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.special.encode_fast("a", special)))
                .map_err(|_| broken(place, &"its post-processor names a token that is not in its vocabulary"))?
                .map_err(|error| broken(place, &error))
        };
        let (bare, full) = (encode(false)?, encode(true)?);
        let (bare, full) = (bare.get_ids(), full.get_ids());
        let at = full.windows(bare.len().max(1)).position(|window| window == bare).unwrap_or(0);
        Ok((full[..at].to_vec(), full.get(at + bare.len()..).unwrap_or_default().to_vec()))
    }

    /// The ids of a text. To `plain`, special tokens are text; `at_start` says that nothing goes before it, which only
    /// then can be otherwise.
    pub(super) fn encode(&self, text: &str, at_start: bool, plain: bool) -> Result<Vec<u32>> {
        let as_text = || {
            let mut tokenizer = self.special.clone();
            tokenizer.set_encode_special_tokens(true);
            Box::new(tokenizer)
        };
        let tokenizer = match (plain, at_start) {
            (false, _) => &self.special,
            (true, true) => self.plain.get_or_init(as_text),
            (true, false) => self.plain_within.get_or_init(|| {
                let mut tokenizer = as_text();
                if let Some(within) = tokenizer.get_pre_tokenizer().and_then(without_first_space) {
                    tokenizer.with_pre_tokenizer(Some(within));
                }
                tokenizer
            }),
        };
        let encoding = tokenizer.encode_fast(text, false).map_err(|error| broken("tokenizer.json", &error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text in which special tokens count, each with the bytes that it stands for.
    pub(super) fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.special.encode(text, false).map_err(|error| broken("tokenizer.json", &error))?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }

    pub(super) fn decode(&self, ids: &[u32], show_special: bool) -> Result<String> {
        self.special.decode(ids, !show_special).map_err(|error| broken("tokenizer.json", &error))
    }
}

/// Has a tokenizer of Llama's kind put spaces before texts as `legacy` and `add_prefix_space` say, where they say something
/// else than SentencePiece's way, as `LlamaTokenizer` of Transformers 5 does.
fn space_as_declared(
    tokenizer: &mut Tokenizer,
    json: &Value,
    declared: &mut Declared,
    folder: &str,
) -> tokenizers::Result<()> {
    let scheme = match (declared.legacy, declared.add_prefix_space) {
        (_, Some(false)) => "never",
        (Some(false), _) => "first",
        _ => return Ok(()),
    };
    let is_llamas = declared.class.as_deref().is_none_or(|class| class.eq_ignore_ascii_case("LlamaTokenizer"));
    if !is_llamas || [&json["pre_tokenizer"], &json["decoder"]].into_iter().any(|part| has_kind(part, "ByteLevel")) {
        return Ok(());
    }
    let (key, said) =
        if scheme == "never" { ("add_prefix_space", "no space") } else { ("legacy", "one space at most") };
    let place = format!("{folder}/{CONFIG}: {key}");
    let is_usual = |part: &Value, kinds: &[&str]| {
        let parts = part.get("normalizers").and_then(Value::as_array);
        let parts = parts.map_or_else(|| std::slice::from_ref(part), Vec::as_slice);
        parts.iter().all(|part| part.is_null() || kinds.iter().any(|kind| part["type"] == **kind))
    };
    if !is_usual(&json["normalizer"], &["Prepend", "Replace"]) || !is_usual(&json["pre_tokenizer"], &["Metaspace"]) {
        let what = "is false, which is not done: tokenizer.json has a normalizer or pre-tokenizer of another kind";
        let hint = "hold some ids against those of the program that will use the adapter";
        declared.warnings.push(Fault::new(place, what).hint(hint));
        return Ok(());
    }
    if json["pre_tokenizer"]["prepend_scheme"] != *scheme || !json["normalizer"].is_null() {
        let what = format!(
            "is false, so a text gets {said} before it, as in Transformers 5; tokenizer.json says otherwise, and \
             Transformers 4 goes by that"
        );
        let hint =
            "texts encode otherwise there behind special tokens, or at their beginning; serve with Transformers 5";
        declared.warnings.push(Fault::new(place, what).hint(hint));
    }
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if scheme == "first" {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    tokenizer.with_normalizer(None::<NormalizerWrapper>)?;
    tokenizer.with_pre_tokenizer(Some(serde_json::from_value::<PreTokenizerWrapper>(metaspace)?));
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    tokenizer.with_decoder(Some(serde_json::from_value::<DecoderWrapper>(decoder)?));
    Ok(())
}

/// Whether a part of a `tokenizer.json` is of a kind or holds one.
fn has_kind(part: &Value, kind: &str) -> bool {
    match part {
        Value::Object(values) => part["type"] == *kind || values.values().any(|value| has_kind(value, kind)),
        Value::Array(values) => values.iter().any(|value| has_kind(value, kind)),
        _ => false,
    }
}

/// A pre-tokenizer that puts a space before the first stretch of a text, as it is for the others.
fn without_first_space(pre_tokenizer: &PreTokenizerWrapper) -> Option<PreTokenizerWrapper> {
    let mut json = serde_json::to_value(pre_tokenizer).ok()?;
    if json["prepend_scheme"] != "first" {
        return None;
    }
    json["prepend_scheme"] = "never".into();
    serde_json::from_value(json).ok()
}

fn broken(place: &str, error: &dyn std::fmt::Display) -> Error {
    Error::invalid(place, format!("cannot encode or decode a text: {error}"))
        .hint("the file is damaged or made by hand: download the model's own tokenizer files again")
}
