//! Tokenizers of the right size, with the special tokens of a public model where that model has them.
//!
//! The vocabularies themselves are no part of the project. What opening a folder decides on are the JSON files and the
//! pieces that they name; every other piece is filled in.

use std::collections::BTreeMap;
use std::path::Path;

use bellora::data::tokenizer::proto::{ModelProto, NormalizerProto, PieceKind, PieceProto, TrainerProto};
use prost::Message;
use serde_json::{Map, Value, json};

/// Writes the tokenizer that `stand_in` describes; `config` is the `tokenizer_config.json` beside it.
pub(super) fn write(stand_in: &Value, config: &Value, folder: &Path) {
    let name = stand_in["file"].as_str().unwrap();
    let bytes = match name {
        "tokenizer.model" if stand_in["tiktoken"] == true => b"IQ== 0\nIg== 1\n".to_vec(),
        "tokenizer.model" => sentencepiece(stand_in).encode_to_vec(),
        "tokenizer.json" => serde_json::to_vec(&byte_level(stand_in, config)).unwrap(),
        _ => Vec::new(),
    };
    std::fs::write(folder.join(name), bytes).unwrap();
}

/// A SentencePiece BPE model: the named pieces, 256 byte pieces from `bytes_from` on, and words for the rest.
fn sentencepiece(stand_in: &Value) -> ModelProto {
    let text = |key: &str| stand_in[key].as_str().map(str::to_owned);
    let kind_of = |name: &str| match name {
        "unknown" => PieceKind::Unknown,
        "control" => PieceKind::Control,
        "user" => PieceKind::UserDefined,
        "normal" => PieceKind::Normal,
        other => panic!("no kind of piece: {other}"),
    };
    let named: BTreeMap<u64, (String, PieceKind)> = stand_in["pieces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|piece| {
            let (text, kind) = (piece[1].as_str().unwrap(), piece[2].as_str().unwrap());
            (piece[0].as_u64().unwrap(), (text.to_owned(), kind_of(kind)))
        })
        .collect();
    let bytes_from = stand_in["bytes_from"].as_u64().unwrap_or(3);
    let piece = |id: u64| {
        let filled = match id.checked_sub(bytes_from) {
            Some(byte @ 0..256) => (format!("<0x{byte:02X}>"), PieceKind::Byte),
            _ => (format!("▁w{id}"), PieceKind::Normal),
        };
        let (text, kind) = named.get(&id).cloned().unwrap_or(filled);
        PieceProto { piece: Some(text), score: Some(-(id as f32)), r#type: Some(kind as i32) }
    };
    ModelProto {
        pieces: (0..stand_in["vocab"].as_u64().unwrap()).map(piece).collect(),
        trainer_spec: Some(TrainerProto {
            model_type: Some(2),
            byte_fallback: Some(true),
            bos_piece: text("bos_piece"),
            eos_piece: text("eos_piece"),
            ..TrainerProto::default()
        }),
        normalizer_spec: Some(NormalizerProto {
            name: Some("identity".into()),
            add_dummy_prefix: stand_in["dummy_prefix"].as_bool(),
            remove_extra_whitespaces: Some(false),
            ..NormalizerProto::default()
        }),
        denormalizer_spec: None,
    }
}

/// A `tokenizer.json` of a byte-level BPE. Its added tokens are those of `added`, or those of the config; `begins` is the
/// token that its post-processor puts before a text.
fn byte_level(stand_in: &Value, config: &Value) -> Value {
    let mut added: BTreeMap<u64, (String, bool)> = BTreeMap::new();
    match stand_in["added"].as_array() {
        Some(tokens) => {
            added.extend(tokens.iter().map(|token| {
                let text = token[1].as_str().unwrap().to_owned();
                (token[0].as_u64().unwrap(), (text, token[2].as_bool().unwrap()))
            }));
        }
        None => {
            let decoder = config["added_tokens_decoder"].as_object().unwrap();
            added.extend(decoder.iter().map(|(id, token)| {
                let text = token["content"].as_str().unwrap().to_owned();
                (id.parse().unwrap(), (text, token["special"] == true))
            }));
        }
    }
    let n_words = stand_in["vocab"].as_u64().unwrap();
    let vocab: Map<String, Value> = (0..n_words)
        .map(|id| match added.get(&id) {
            Some((text, _)) => (text.clone(), json!(id)),
            // The letter that is encoded in order to see what goes before a text.
            None if id + 1 == n_words => ("a".to_owned(), json!(id)),
            None => (format!("w{id}"), json!(id)),
        })
        .collect();
    let post_processor = stand_in["begins"].as_str().map(|begin| {
        let id = added.iter().find(|(_, (text, _))| text == begin).map(|(&id, _)| id).unwrap();
        json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [id], "tokens": [begin]}}})
    });
    let added_tokens: Vec<Value> = added
        .iter()
        .map(|(id, (text, special))| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": special})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": post_processor,
        "added_tokens": added_tokens,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}
