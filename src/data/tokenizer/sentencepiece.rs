//! SentencePiece BPE models, read directly and encoded token for token as SentencePiece does.
//!
//! A model gives every piece a score. Encoding starts from single characters and merges, again and again, the
//! neighbours whose joined text is the piece with the highest score; of equal scores the leftmost pair goes first.
//! (SentencePiece `bpe_model.cc`; Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units".)

use std::collections::{BTreeSet, HashMap};

use prost::Message;

use super::pairs::{BRIDGE, NONE, Pairs, key};
use super::proto::{ModelProto, PieceKind, PieceProto, refuse_other_kinds};
use super::special::{Added, Matcher};
use crate::error::{Error, Result};

/// The character that stands for a space in pieces.
pub(super) const SPACE: char = '\u{2581}';

/// Which stretches of a text get a space before them that it does not have (the dummy prefix).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prefix {
    /// All, as SentencePiece does with a text.
    EachStretch,
    /// The one at the text's beginning, unless it begins with a space: `legacy` is false.
    Start,
    /// None: `add_prefix_space` is false, or the model says so.
    Never,
}

/// A loaded SentencePiece BPE model.
pub(super) struct SentencePiece {
    pub(super) pieces: Vec<Piece>,
    /// Symbol of each character, by code point: a piece's id, or an id past the pieces for a character that
    /// occurs in pieces without being one.
    pub(super) symbol_of_char: Vec<u32>,
    /// What the symbols past the pieces come out as when nothing merged them.
    pub(super) loose: Vec<(char, Option<u32>)>,
    pub(super) pairs: Pairs,
    /// The piece of each byte, where the model has byte fallback.
    pub(super) byte_ids: Option<Vec<u32>>,
    pub(super) unknown: u32,
    pub(super) user_defined: Option<Matcher>,
    pub(super) prefix: Prefix,
    pub(super) bos_piece: String,
    pub(super) eos_piece: String,
    pub(super) pad_piece: String,
}

/// What a piece stands for in a text.
pub(super) enum Letters<'a> {
    /// These characters.
    Text(&'a str),
    /// One byte of a character.
    Byte,
    /// Characters that are no piece.
    Unknown,
}

pub(super) struct Piece {
    text: String,
    kind: PieceKind,
    byte: u8,
}

/// The longest piece that merging may make, in bytes; a longer one is no vocabulary entry but a damaged file.
const PIECE_MAX_BYTES: usize = 1024;

impl SentencePiece {
    /// Reads a model file.
    ///
    /// # Errors
    /// [`Error::Invalid`] at `place` for a file that is no SentencePiece model, and for a kind of model whose encoding
    /// would not come out exactly, by name.
    pub(super) fn new(bytes: &[u8], place: &str) -> Result<Self> {
        let model = ModelProto::decode(bytes).ok().filter(|model| !model.pieces.is_empty()).ok_or_else(|| {
            Error::invalid(place, "is not a SentencePiece model").hint(
                "the original tokenizer.model of Llama 3 is of another kind (tiktoken): give its tokenizer.json; \
                 for a damaged or cut-off file, download it again",
            )
        })?;
        let trainer = model.trainer_spec.clone().unwrap_or_default();
        refuse_other_kinds(&model, &trainer, place)?;
        let normalizer = model.normalizer_spec.clone().unwrap_or_default();

        let bad = |what: String| Error::invalid(place, what).hint("the file is damaged: download it again");
        let mut pieces = Vec::with_capacity(model.pieces.len());
        let mut ids = HashMap::with_capacity(model.pieces.len());
        let mut unknown = None;
        let mut byte_ids = vec![NONE; 256];
        for (id, piece) in (0u32..).zip(&model.pieces) {
            let (text, kind) = (piece.piece(), piece.r#type());
            let mut byte = 0;
            if text.is_empty() || piece.score().is_nan() {
                return Err(bad(format!("piece {id} has no text or no score")));
            }
            if ids.insert(text, id).is_some() {
                return Err(bad(format!("piece {id} `{text}` stands twice in the vocabulary")));
            }
            match kind {
                PieceKind::Unknown if unknown.replace(id).is_some() => {
                    return Err(bad(format!("piece {id} `{text}` is a second unknown piece")));
                }
                PieceKind::Byte => {
                    byte = byte_of_piece(text)
                        .filter(|_| trainer.byte_fallback())
                        .ok_or_else(|| bad(format!("piece {id} `{text}` is no byte piece")))?;
                    byte_ids[usize::from(byte)] = id;
                }
                PieceKind::Normal if text.len() > PIECE_MAX_BYTES => {
                    return Err(bad(format!("piece {id} is {} bytes long", text.len())));
                }
                _ => {}
            }
            pieces.push(Piece { text: text.to_owned(), kind, byte });
        }
        let unknown = unknown.ok_or_else(|| bad("has no unknown piece".into()))?;
        if trainer.byte_fallback() && byte_ids.contains(&NONE) {
            return Err(bad("has byte fallback but not all 256 byte pieces".into()));
        }

        let user: Vec<_> = (0u32..)
            .zip(&pieces)
            .filter(|(_, piece)| piece.kind == PieceKind::UserDefined)
            .map(|(id, piece)| (Added::special(&piece.text, None), id))
            .collect();
        let mut built = Self {
            symbol_of_char: Vec::new(),
            loose: Vec::new(),
            pairs: Pairs::default(),
            byte_ids: trainer.byte_fallback().then_some(byte_ids),
            unknown,
            user_defined: (!user.is_empty()).then(|| Matcher::new(user)),
            prefix: if normalizer.add_dummy_prefix() { Prefix::EachStretch } else { Prefix::Never },
            bos_piece: trainer.bos_piece().to_owned(),
            eos_piece: trainer.eos_piece().to_owned(),
            pad_piece: trainer.pad_piece().to_owned(),
            pieces,
        };
        built.number_characters(&ids);
        built.number_pairs(&ids, &model);
        Ok(built)
    }

    /// Gives every character of the pieces its symbol.
    fn number_characters(&mut self, ids: &HashMap<&str, u32>) {
        let mut letters = BTreeSet::new();
        for piece in &self.pieces {
            let mut chars = piece.text.chars();
            match (piece.kind, chars.next(), chars.next()) {
                (PieceKind::Normal | PieceKind::UserDefined, ..) | (_, Some(_), None) => {
                    letters.extend(piece.text.chars());
                }
                _ => {}
            }
        }
        let highest = letters.last().map_or(0, |&letter| letter as usize);
        self.symbol_of_char = vec![NONE; highest + 1];
        let n_pieces = self.pieces.len() as u32;
        for letter in letters {
            let id = ids.get(letter.encode_utf8(&mut [0; 4]) as &str).copied();
            let kind = id.map(|id| self.pieces[id as usize].kind);
            self.symbol_of_char[letter as usize] = match (id, kind) {
                (Some(id), Some(PieceKind::Normal | PieceKind::UserDefined)) => id,
                _ => {
                    // SentencePiece looks a character that is left over up among the other pieces too.
                    self.loose.push((letter, id.filter(|_| kind != Some(PieceKind::Unknown))));
                    n_pieces + self.loose.len() as u32 - 1
                }
            };
        }
    }

    /// Enters every way to make a piece out of two symbols. Pieces that are user-defined need none: wherever one could
    /// be made by merging, it is matched whole before.
    fn number_pairs(&mut self, ids: &HashMap<&str, u32>, model: &ModelProto) {
        let mut scores: Vec<f32> = model.pieces.iter().map(PieceProto::score).collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        scores.dedup();
        let symbol = |text: &str| {
            let mut chars = text.chars();
            match (chars.next(), chars.next()) {
                (Some(letter), None) => Some(self.symbol_of_char[letter as usize]),
                _ => ids.get(text).copied().filter(|&id| self.pieces[id as usize].kind == PieceKind::Normal),
            }
        };
        let mut pairs = Pairs::default();
        for (id, piece) in (0u64..).zip(&self.pieces).filter(|(_, piece)| piece.kind == PieceKind::Normal) {
            let score = model.pieces[id as usize].score();
            let rank = scores.partition_point(|&other| other > score) as u64;
            let text = piece.text.as_str();
            for (at, _) in text.char_indices().skip(1) {
                if let (Some(left), Some(right)) = (symbol(&text[..at]), symbol(&text[at..])) {
                    pairs.insert(key(left, right), rank << 32 | id);
                }
            }
            for (left, right) in text.chars().zip(text.chars().skip(1)) {
                let (left, right) = (self.symbol_of_char[left as usize], self.symbol_of_char[right as usize]);
                pairs.entry(key(left, right)).or_insert(BRIDGE);
            }
        }
        self.pairs = pairs;
    }

    pub(super) fn n_pieces(&self) -> u32 {
        self.pieces.len() as u32
    }

    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| piece.text.as_str())
    }

    /// What an id stands for in a text.
    pub(super) fn letters_of(&self, id: u32) -> Letters<'_> {
        match &self.pieces[id as usize] {
            Piece { kind: PieceKind::Byte, .. } => Letters::Byte,
            Piece { kind: PieceKind::Unknown, .. } => Letters::Unknown,
            Piece { text, .. } => Letters::Text(text),
        }
    }

    pub(super) fn unknown_piece(&self) -> &str {
        &self.pieces[self.unknown as usize].text
    }

    /// The pieces that are special in a text: control pieces, the unknown one, and one named `[PAD]`.
    pub(super) fn special_pieces(&self) -> impl Iterator<Item = (u32, &str)> {
        (0u32..).zip(&self.pieces).filter_map(|(id, piece)| {
            let special = matches!(piece.kind, PieceKind::Control | PieceKind::Unknown) || piece.text == "[PAD]";
            special.then_some((id, piece.text.as_str()))
        })
    }

    /// The id of a control piece.
    pub(super) fn control(&self, text: &str) -> Option<u32> {
        self.special_pieces()
            .find(|&(id, piece)| piece == text && self.pieces[id as usize].kind == PieceKind::Control)
            .map(|(id, _)| id)
    }

    /// Appends the text of a piece, as SentencePiece's own `decode` gives it, to `state`.
    pub(super) fn decode(&self, id: u32, state: &mut Decoding) {
        let Some(piece) = self.pieces.get(id as usize) else {
            return;
        };
        match piece.kind {
            PieceKind::Byte => {
                state.bytes.push(piece.byte);
                state.begun = true;
            }
            PieceKind::Control => {}
            PieceKind::Unknown => state.push_str(" \u{2047} "),
            _ => {
                let strip = !state.begun && self.prefix != Prefix::Never;
                let text = piece.text.strip_prefix(SPACE).filter(|_| strip).unwrap_or(&piece.text);
                state.push_str(&text.replace(SPACE, " "));
            }
        }
    }
}

/// A text while it is decoded.
#[derive(Default)]
pub(super) struct Decoding {
    text: String,
    /// Bytes of byte pieces, not yet text.
    bytes: Vec<u8>,
    begun: bool,
}

impl Decoding {
    pub(super) fn push_str(&mut self, text: &str) {
        self.end_bytes();
        self.text.push_str(text);
        self.begun = true;
    }

    /// Turns the collected bytes into text, each byte that is no UTF-8 into one U+FFFD.
    fn end_bytes(&mut self) {
        let mut rest = self.bytes.as_slice();
        while !rest.is_empty() {
            let valid = match std::str::from_utf8(rest) {
                Ok(text) => text,
                Err(error) => std::str::from_utf8(&rest[..error.valid_up_to()]).unwrap_or_default(),
            };
            self.text.push_str(valid);
            rest = &rest[valid.len()..];
            if let Some((_, after)) = rest.split_first() {
                self.text.push('\u{fffd}');
                rest = after;
            }
        }
        self.bytes.clear();
    }

    pub(super) fn finish(mut self) -> String {
        self.end_bytes();
        self.text
    }
}

/// The byte of a piece like `<0x0A>`.
fn byte_of_piece(text: &str) -> Option<u8> {
    let byte = u8::from_str_radix(text.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()?;
    (format!("<0x{byte:02X}>") == text).then_some(byte)
}
