//! SentencePiece's model file: the part of its protocol buffer that matters here, and the kinds that are refused.

use prost::Message;

use crate::error::{Error, Result};

/// A SentencePiece model file (the fields of its protocol buffer that matter here).
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// The vocabulary; a piece's id is its position.
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<PieceProto>,
    /// How the model was trained.
    #[prost(message, optional, tag = "2")]
    pub trainer_spec: Option<TrainerProto>,
    /// How texts are normalised before encoding.
    #[prost(message, optional, tag = "3")]
    pub normalizer_spec: Option<NormalizerProto>,
    /// How texts are changed after decoding.
    #[prost(message, optional, tag = "5")]
    pub denormalizer_spec: Option<NormalizerProto>,
}

/// One piece of the vocabulary.
#[derive(Clone, PartialEq, Message)]
pub struct PieceProto {
    /// Its text.
    #[prost(string, optional, tag = "1")]
    pub piece: Option<String>,
    /// Its score: the highest is merged first.
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    /// Its [`PieceKind`].
    #[prost(enumeration = "PieceKind", optional, tag = "3", default = "Normal")]
    pub r#type: Option<i32>,
}

/// What a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PieceKind {
    /// Made by merging.
    Normal = 1,
    /// The piece for what the vocabulary lacks.
    Unknown = 2,
    /// Has no text of its own, like the mark of a text's beginning.
    Control = 3,
    /// Always kept whole, never merged further.
    UserDefined = 4,
    /// Used in training alone.
    Unused = 5,
    /// One byte of a character that the vocabulary lacks.
    Byte = 6,
}

/// The part of the trainer's settings that encoding depends on.
#[derive(Clone, PartialEq, Message)]
pub struct TrainerProto {
    /// The algorithm: 1 Unigram, 2 BPE, 3 words, 4 characters.
    #[prost(int32, optional, tag = "3", default = "1")]
    pub model_type: Option<i32>,
    /// Whether the space mark stands at the end of words.
    #[prost(bool, optional, tag = "24")]
    pub treat_whitespace_as_suffix: Option<bool>,
    /// Whether an unknown character is spelled in bytes.
    #[prost(bool, optional, tag = "35")]
    pub byte_fallback: Option<bool>,
    /// The piece that begins a text.
    #[prost(string, optional, tag = "46", default = "<s>")]
    pub bos_piece: Option<String>,
    /// The piece that ends a text.
    #[prost(string, optional, tag = "47", default = "</s>")]
    pub eos_piece: Option<String>,
    /// The piece that pads.
    #[prost(string, optional, tag = "48", default = "<pad>")]
    pub pad_piece: Option<String>,
}

/// The normaliser's settings.
#[derive(Clone, PartialEq, Message)]
pub struct NormalizerProto {
    /// Its name: `identity`, `nmt_nfkc`...
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Its compiled table of replacements.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// Whether a space goes before every text (the dummy prefix).
    #[prost(bool, optional, tag = "3", default = "true")]
    pub add_dummy_prefix: Option<bool>,
    /// Whether runs of spaces become one.
    #[prost(bool, optional, tag = "4", default = "true")]
    pub remove_extra_whitespaces: Option<bool>,
    /// Whether spaces are written as U+2581.
    #[prost(bool, optional, tag = "5", default = "true")]
    pub escape_whitespaces: Option<bool>,
}

/// Refuses what this encoder would get wrong.
pub(super) fn refuse_other_kinds(model: &ModelProto, trainer: &TrainerProto, place: &str) -> Result<()> {
    let normalizer = model.normalizer_spec.clone().unwrap_or_default();
    let denormalizer = model.denormalizer_spec.clone().unwrap_or_default();
    let kind = match trainer.model_type() {
        2 => None,
        1 => Some("a Unigram model".to_owned()),
        3 => Some("a word model".to_owned()),
        4 => Some("a character model".to_owned()),
        other => Some(format!("a model of unknown type {other}")),
    };
    let name = normalizer.name();
    let unused = (0u32..).zip(&model.pieces).find(|(_, piece)| piece.r#type() == PieceKind::Unused);
    let what = if let Some(kind) = kind {
        kind
    } else if !normalizer.precompiled_charsmap().is_empty() {
        format!("a BPE model that normalises texts (`{name}`)")
    } else if normalizer.remove_extra_whitespaces() {
        "a BPE model that removes repeated spaces (remove_extra_whitespaces)".to_owned()
    } else if !normalizer.escape_whitespaces() {
        "a BPE model that does not mark spaces (escape_whitespaces = false)".to_owned()
    } else if trainer.treat_whitespace_as_suffix() {
        "a BPE model with spaces at the end of words (treat_whitespace_as_suffix)".to_owned()
    } else if !denormalizer.precompiled_charsmap().is_empty() {
        "a BPE model with a denormaliser".to_owned()
    } else if let Some((id, piece)) = unused {
        format!("a BPE model with unused pieces (piece {id} `{}`)", piece.piece())
    } else {
        return Ok(());
    };
    Err(Error::invalid(place, format!("is {what}; Bellora reads SentencePiece BPE models as Llama's"))
        .hint("give the tokenizer.json of this model as model.tokenizer"))
}
