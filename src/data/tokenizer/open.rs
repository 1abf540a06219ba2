//! Opening a tokenizer: which files make it, and which special tokens they declare.

use std::collections::BTreeMap;
use std::path::Path;

use super::hf::HfTokenizer;
use super::sentencepiece::SentencePiece;
use super::special::{Added, Declared, Matcher};
use super::{Backend, Tokenizer, TokenizerFile};
use crate::error::{Error, Result};

const MODEL: &str = "tokenizer.model";
const JSON: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
/// The files that declare tokens beside either.
const DECLARING: [&str; 3] = [CONFIG, "special_tokens_map.json", "added_tokens.json"];
/// A tokenizer's file is at most some ten megabytes; anything much larger is something else.
const MAX_BYTES: u64 = 256 << 20;
/// How tokenizer.json files without a config usually name the end of a text.
const USUAL_EOS: [&str; 5] = ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>"];

impl Tokenizer {
    /// Opens a folder that holds a tokenizer (of two kinds in it, the `tokenizer.model`), a `tokenizer.json` (with the
    /// configs beside it) or a SentencePiece `.model` file (which is taken by itself).
    ///
    /// # Errors
    /// [`Error::Invalid`] where there is no tokenizer, or one that would not be encoded exactly.
    pub fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        if path.is_dir() {
            if path.join(MODEL).is_file() {
                return Self::from_sentencepiece(read_files(path, &[MODEL, JSON])?, &place, MODEL);
            }
            if path.join(JSON).is_file() {
                return Self::from_json(read_files(path, &[JSON])?, &place, JSON);
            }
            let hint = if path.join("vocab.json").is_file() {
                "vocab.json and merges.txt are not read: in Python, AutoTokenizer.from_pretrained(...).save_pretrained(\
                 ...) of a fast tokenizer writes a tokenizer.json"
            } else {
                "name the folder, the tokenizer.json or the .model file in model.tokenizer"
            };
            return Err(Error::invalid(place, "holds neither a tokenizer.model nor a tokenizer.json").hint(hint));
        }
        if !path.is_file() {
            return Err(Error::invalid(place, "does not exist").hint(
                "model.tokenizer is a folder, a tokenizer.json or a .model file on this machine; names of the \
                 Hugging Face hub are not downloaded",
            ));
        }
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = read(path)?;
        if path.extension().is_some_and(|extension| extension == "json") {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut files = vec![TokenizerFile { name: JSON.into(), bytes }];
            files.extend(read_files(folder, &[])?);
            return Self::from_json(files, &folder.display().to_string(), &file_name);
        }
        let folder = path.parent().unwrap_or(Path::new("")).display().to_string();
        Self::from_sentencepiece(vec![TokenizerFile { name: MODEL.into(), bytes }], &folder, &file_name)
    }

    fn from_sentencepiece(mut files: Vec<TokenizerFile>, folder: &str, file_name: &str) -> Result<Self> {
        let declared = Declared::read(&files, folder)?;
        let place = format!("{}{file_name}", slashed(folder));
        let bytes = files.iter().find(|file| file.name == MODEL).map_or(&[][..], |file| &file.bytes);
        let model = SentencePiece::new(bytes, &place)?;

        let mut tokens: BTreeMap<u32, Added> =
            model.special_pieces().map(|(id, text)| (id, Added::special(text, Some(id)))).collect();
        let mut ids: BTreeMap<&str, u32> =
            (0..model.n_pieces()).filter_map(|id| Some((model.piece(id)?, id))).collect();
        let mut past_pieces = BTreeMap::new();
        for token in &declared.added {
            let next = past_pieces.last_key_value().map_or(model.n_pieces(), |(&last, _)| last + 1);
            let known = ids.get(token.text.as_str()).copied();
            let id = match (token.id, known) {
                (Some(declared), Some(known)) if declared != known => {
                    let what = format!("has token `{}` as {known}, the files beside it as {declared}", token.text);
                    return Err(mismatch(&place, what));
                }
                (_, Some(known)) => known,
                (Some(declared), None) if declared < model.n_pieces() => {
                    let piece = model.piece(declared).unwrap_or_default();
                    let what = format!("has `{piece}` as {declared}, the files beside it `{}`", token.text);
                    return Err(mismatch(&place, what));
                }
                (Some(u32::MAX), None) => return Err(mismatch(&place, format!("cannot number `{}`", token.text))),
                (declared, None) => declared.unwrap_or(next),
            };
            if id >= model.n_pieces() {
                past_pieces.insert(id, token.text.clone());
            }
            ids.insert(&token.text, id);
            tokens.insert(id, token.clone());
        }

        let named = |name: &Option<String>, piece: &str| {
            name.as_deref().and_then(|name| ids.get(name).copied()).or_else(|| model.control(piece))
        };
        let bos = named(&declared.bos, &model.bos_piece).filter(|_| declared.add_bos != Some(false));
        let eos = named(&declared.eos, &model.eos_piece).ok_or_else(|| no_eos(&place))?;
        let pad_piece = if ids.contains_key("[PAD]") { &Some("[PAD]".to_owned()) } else { &None };
        let pad = named(declared.pad.as_ref().map_or(pad_piece, |_| &declared.pad), &model.pad_piece);
        let vocab_size = past_pieces.last_key_value().map_or(model.n_pieces(), |(&last, _)| last + 1) as usize;

        if !files.iter().any(|file| file.name == CONFIG) {
            let text = |id: Option<u32>| id.and_then(|id| tokens.get(&id)).map(|token| token.text.as_str());
            let config = serde_json::json!({
                "tokenizer_class": "LlamaTokenizer", "legacy": true, "add_bos_token": bos.is_some(),
                "add_eos_token": false, "bos_token": text(bos), "eos_token": text(Some(eos)), "pad_token": text(pad),
                "unk_token": model.unknown_piece(),
            });
            files.push(TokenizerFile { name: CONFIG.into(), bytes: format!("{config:#}\n").into_bytes() });
        }
        let kept = Matcher::new(tokens.iter().filter(|(_, token)| !token.special).map(|(&id, t)| (t.clone(), id)));
        let special_ids =
            tokens.iter().filter(|(_, token)| token.special).map(|(&id, t)| (id, t.text.clone())).collect();
        Ok(Self {
            place,
            specials: Matcher::new(tokens.into_iter().map(|(id, token)| (token, id))),
            special_ids,
            kept,
            past_pieces,
            bos,
            eos,
            pad,
            vocab_size,
            files,
            backend: Backend::SentencePiece(Box::new(model)),
        })
    }

    fn from_json(files: Vec<TokenizerFile>, folder: &str, file_name: &str) -> Result<Self> {
        let declared = Declared::read(&files, folder)?;
        let place = format!("{}{file_name}", slashed(folder));
        let bytes = files.iter().find(|file| file.name == JSON).map_or(&[][..], |file| &file.bytes);
        let hf = HfTokenizer::new(bytes, &declared, &place)?;
        let named = |name: &Option<String>| name.as_deref().and_then(|name| hf.id(name));

        let bos = match declared.add_bos {
            Some(false) => None,
            Some(true) if declared.bos.is_some() => named(&declared.bos),
            _ => match hf.prefix(&place)?.as_slice() {
                [] => None,
                [bos] => Some(*bos),
                more => {
                    let what = format!("puts {} tokens before a text; Llama's put one, or none", more.len());
                    return Err(Error::invalid(place, what).hint("Bellora trains Llama-family models only"));
                }
            },
        };
        let eos = match named(&declared.eos) {
            Some(eos) => eos,
            None => {
                let known: Vec<u32> = USUAL_EOS.iter().filter_map(|name| hf.id(name)).collect();
                if let [eos] = known[..] {
                    eos
                } else {
                    return Err(no_eos(&place));
                }
            }
        };
        let specials: Vec<(Added, u32)> = hf.specials().collect();
        Ok(Self {
            place,
            special_ids: specials.iter().map(|(token, id)| (*id, token.text.clone())).collect(),
            specials: Matcher::new(specials),
            kept: Matcher::new([]),
            past_pieces: BTreeMap::new(),
            bos,
            eos,
            pad: named(&declared.pad).or_else(|| hf.id("[PAD]")),
            vocab_size: hf.n_ids() as usize,
            files,
            backend: Backend::Hf(Box::new(hf)),
        })
    }
}

fn no_eos(place: &str) -> Error {
    Error::invalid(place, "names no token that ends a text")
        .hint("add a tokenizer_config.json with `eos_token` beside it and give the folder as model.tokenizer")
}

fn mismatch(place: &str, what: String) -> Error {
    Error::invalid(place, what).hint("the tokenizer's files do not belong together: download them again")
}

fn slashed(folder: &str) -> String {
    if folder.is_empty() || folder.ends_with('/') { folder.to_owned() } else { format!("{folder}/") }
}

/// Reads those of the named and the declaring files that the folder holds.
fn read_files(folder: &Path, names: &[&str]) -> Result<Vec<TokenizerFile>> {
    let mut files = Vec::new();
    for name in names.iter().chain(&DECLARING).copied() {
        let path = folder.join(name);
        if path.is_file() {
            files.push(TokenizerFile { name: name.to_owned(), bytes: read(&path)? });
        }
    }
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let place = path.display().to_string();
    let unreadable = |error: std::io::Error| Error::invalid(&place, format!("cannot be read: {error}"));
    if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_BYTES {
        return Err(Error::invalid(&place, "is too large to be a tokenizer's file"));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::invalid(&place, "is only a pointer of git-lfs").hint("fetch the file itself: git lfs pull"));
    }
    Ok(bytes)
}
