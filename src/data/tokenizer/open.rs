//! Opening a tokenizer: which files make it, and which special tokens they declare.

use std::collections::BTreeMap;
use std::path::Path;

use super::compare::difference;
use super::declared::{CONFIG, Declared};
use super::folder::{JSON, MODEL, left_behind, not_read_beside, read, read_files, without};
use super::hf::HfTokenizer;
use super::sentencepiece::{Prefix, SentencePiece};
use super::special::{Added, Matcher};
use super::{Backend, Tokenizer, TokenizerFile};
use crate::error::{Error, Fault, Result};

/// How tokenizer.json files without a config usually name the end of a text.
const USUAL_EOS: [&str; 5] = ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>"];

impl Tokenizer {
    /// Opens a folder that holds a tokenizer, a `tokenizer.json` (with the configs beside it) or a SentencePiece
    /// `.model` file (which is taken by itself). Of two kinds in a folder the `tokenizer.model` is taken where both
    /// encode the same, else the `tokenizer.json`, as Transformers does.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there is no tokenizer, or one that would not be encoded exactly.
    pub fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        if path.is_dir() {
            let mut opened = match (path.join(MODEL).is_file(), path.join(JSON).is_file()) {
                (true, true) => Self::from_both(read_files(path)?, &place)?,
                (true, false) => Self::from_sentencepiece(read_files(path)?, &place, MODEL)?,
                (false, true) => Self::from_json(read_files(path)?, &place, JSON)?,
                (false, false) => return Err(no_tokenizer(path)),
            };
            opened.warnings.extend(left_behind(path));
            return Ok(opened);
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
            files.extend(read_files(folder)?.into_iter().filter(|file| ![JSON, MODEL].contains(&file.name.as_str())));
            let mut opened = Self::from_json(files, &folder.display().to_string(), &file_name)?;
            opened.warnings.extend(left_behind(folder));
            return Ok(opened);
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let shown = path.parent().unwrap_or(Path::new("")).display().to_string();
        let mut opened =
            Self::from_sentencepiece(vec![TokenizerFile { name: MODEL.into(), bytes }], &shown, &file_name)?;
        opened.warnings.extend(not_read_beside(path, folder));
        Ok(opened)
    }

    /// Opens a folder with both kinds: the `tokenizer.model`, if the `tokenizer.json` encodes the same, else that one.
    fn from_both(files: Vec<TokenizerFile>, folder: &str) -> Result<Self> {
        let of_model = Self::from_sentencepiece(without(&files, JSON), folder, MODEL);
        let of_json = Self::from_json(without(&files, MODEL), folder, JSON);
        let (mut opened, reason) = match (of_model, of_json) {
            (Ok(model), Ok(json)) => match difference(&model, &json)? {
                None => (model, None),
                Some(difference) => (json, Some(difference)),
            },
            (Err(error), Ok(json)) => (json, Some(format!("the former cannot be taken: {error}"))),
            (Ok(_), Err(error)) => {
                let hint = "mend or remove the tokenizer.json; without one the tokenizer.model beside it decides";
                return Err(error.hint_where_none(hint));
            }
            (Err(error), Err(_)) => return Err(error),
        };
        for file in files {
            if opened.files.iter().all(|other| other.name != file.name) {
                opened.files.push(file);
            }
        }
        if let Some(reason) = reason {
            let what =
                format!("holds a {MODEL} and a {JSON} that differ; the latter is taken, as by Transformers: {reason}");
            let hint = format!("if {MODEL} is the right one, remove the {JSON}, or name it as model.tokenizer");
            opened.warnings.push(Fault::new(folder, what).hint(hint));
        }
        Ok(opened)
    }

    fn from_sentencepiece(mut files: Vec<TokenizerFile>, folder: &str, file_name: &str) -> Result<Self> {
        let mut declared = Declared::read(&files, folder)?;
        declared.judge_class(folder, true);
        let place = format!("{}{file_name}", slashed(folder));
        let bytes = files.iter().find(|file| file.name == MODEL).map_or(&[][..], |file| &file.bytes);
        let mut model = SentencePiece::new(bytes, &place)?;
        match (declared.legacy, declared.add_prefix_space) {
            (_, Some(false)) => model.prefix = Prefix::Never,
            (Some(false), _) => model.prefix = Prefix::Start,
            _ => {}
        }

        let mut tokens: BTreeMap<u32, Added> =
            model.special_pieces().map(|(id, text)| (id, Added::special(text, Some(id)))).collect();
        let mut ids: BTreeMap<&str, u32> =
            (0..model.n_pieces()).filter_map(|id| Some((model.piece(id)?, id))).collect();
        declared.take_known(|token| ids.contains_key(token));
        let (mut past_pieces, mut first_hole) = (BTreeMap::new(), None);
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
            if id > next && first_hole.is_none() {
                first_hole = Some((token.text.clone(), id, next));
            }
            if id >= model.n_pieces() {
                past_pieces.insert(id, token.text.clone());
            }
            ids.insert(&token.text, id);
            tokens.insert(id, token.clone());
        }
        if let Some((token, id, next)) = first_hole {
            let what = format!("number `{token}` as {id}, though {next} is the next free id");
            let hint =
                "Transformers 5 numbers such tokens without holes, so its ids differ: number them so in the files";
            declared.warnings.push(Fault::new(format!("{}the added tokens", slashed(folder)), what).hint(hint));
        }

        let named = |name: &Option<String>, piece: &str| {
            name.as_deref().and_then(|name| ids.get(name).copied()).or_else(|| model.control(piece))
        };
        let bos = named(&declared.bos, &model.bos_piece)
            .filter(|_| declared.add_bos != Some(false) && declared.null_bos.is_none());
        let eos = named(&declared.eos, &model.eos_piece).ok_or_else(|| no_eos(&place))?;
        let eos_text = tokens.get(&eos).map_or("", |token| &*token.text);
        declared.warnings.extend(declared.null_eos.as_deref().map(|at| taken_for_null(at, eos_text)));
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
            warnings: declared.warnings,
            backend: Backend::SentencePiece(Box::new(model)),
        })
    }

    fn from_json(files: Vec<TokenizerFile>, folder: &str, file_name: &str) -> Result<Self> {
        let mut declared = Declared::read(&files, folder)?;
        declared.judge_class(folder, false);
        let place = format!("{}{file_name}", slashed(folder));
        let bytes = files.iter().find(|file| file.name == JSON).map_or(&[][..], |file| &file.bytes);
        let hf = HfTokenizer::new(bytes, &mut declared, &place, folder)?;
        let named = |name: &Option<String>| name.as_deref().and_then(|name| hf.id(name));

        let (before, behind) = hf.around(&place)?;
        let bos = match (declared.add_bos, before.as_slice()) {
            (Some(false), _) => None,
            (Some(true), _) if declared.bos.is_some() => named(&declared.bos),
            (_, []) => None,
            (_, [bos]) => Some(*bos),
            (_, more) => {
                let what = format!("puts {} tokens before a text; Llama's put one, or none", more.len());
                return Err(Error::invalid(place, what).hint("Bellora trains Llama-family models only"));
            }
        };
        if let Some(add_bos) = declared.add_bos
            && bos.as_slice() != before
        {
            let what = format!("is {add_bos}, which holds here; the post-processor of {file_name} says otherwise");
            let hint = "Transformers 5 goes by the post-processor: make the two say the same";
            declared.warnings.push(Fault::new(format!("{}{CONFIG}: add_bos_token", slashed(folder)), what).hint(hint));
        }
        if let [first, ..] = behind[..] {
            let what = format!("puts {} behind every text", hf.token(first).unwrap_or_default());
            let hint = "here the token that ends a text follows every answer and never a prompt";
            declared.warnings.push(Fault::new(format!("{place}: post_processor"), what).hint(hint));
        }
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
        let eos_text = hf.token(eos).unwrap_or_default();
        declared.warnings.extend(declared.null_eos.as_deref().map(|at| taken_for_null(at, &eos_text)));
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
            warnings: declared.warnings,
            backend: Backend::Hf(Box::new(hf)),
        })
    }
}

fn no_tokenizer(folder: &Path) -> Error {
    let hint = if folder.join("vocab.json").is_file() {
        "vocab.json and merges.txt are not read: in Python, AutoTokenizer.from_pretrained(...).save_pretrained(\
         ...) of a fast tokenizer writes a tokenizer.json"
    } else {
        "name the folder, the tokenizer.json or the .model file in model.tokenizer"
    };
    Error::invalid(folder.display().to_string(), "holds neither a tokenizer.model nor a tokenizer.json").hint(hint)
}

/// Says which token ends answers where the file says that none does.
fn taken_for_null(place: &str, eos: &str) -> Fault {
    Fault::new(place, format!("is null, and answers are trained to end in a token: {eos} is taken"))
        .hint("name the token that ends a text there, or what serves the model may not stop at it")
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
