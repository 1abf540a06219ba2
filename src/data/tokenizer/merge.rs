//! Encoding with a SentencePiece BPE model: merging a text's characters into pieces.
//!
//! Two things make this quick without changing the result. Pieces are numbers: a pair of symbols is looked up as a
//! pair of ids, not as text. And a text falls into segments at every pair of neighbouring characters that no piece
//! contains; no merge can cross such a place, so each segment is merged alone, and most are a few characters long.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::pairs::{BRIDGE, NONE, Pair, key};
use super::sentencepiece::{Letters, Prefix, SPACE, SentencePiece};
use super::special::Matcher;

/// Segments up to this length are merged by scanning all pairs, longer ones (rare, but a text may be one character a
/// million times) with a heap.
const SCAN_MAX: usize = 64;

impl SentencePiece {
    /// Appends the ids of `text`, a stretch between special tokens, as SentencePiece's own `encode` gives them.
    /// `at_start` says that no text goes before it.
    pub(super) fn encode(&self, text: &str, at_start: bool, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let mut out = Output { ids, unknown_before: false };
        scratch.clear();
        if self.is_prefixed(text, at_start) {
            self.push(SPACE, scratch, &mut out);
        }
        match &self.user_defined {
            None => text.chars().for_each(|letter| self.push(letter, scratch, &mut out)),
            Some(matcher) => {
                let text = text.replace(' ', "\u{2581}");
                let mut at = 0;
                while let Some(letter) = text[at..].chars().next() {
                    if let Some((token, id)) = matcher.at_start(&text.as_bytes()[at..]) {
                        self.flush(scratch, &mut out);
                        out.known(id);
                        at += token.text.len();
                    } else {
                        self.push(letter, scratch, &mut out);
                        at += letter.len_utf8();
                    }
                }
            }
        }
        self.flush(scratch, &mut out);
    }

    /// The bytes of a stretch that each of its ids stands for.
    pub(super) fn offsets(&self, text: &str, at_start: bool, ids: &[u32]) -> Vec<Range<usize>> {
        let mut is_prefix = !text.is_empty() && self.is_prefixed(text, at_start);
        let (mut at, mut n_bytes) = (0, 0);
        let letter_at = |at: usize| text[at..].chars().next().map_or(0, char::len_utf8);
        let offset = |(number, &id): (usize, &u32)| {
            let start = at;
            match self.letters_of(id) {
                Letters::Byte => {
                    n_bytes += 1;
                    if n_bytes == letter_at(at) {
                        (at, n_bytes) = (at + n_bytes, 0);
                    }
                }
                Letters::Unknown => {
                    // A run of characters that are no piece, up to what the next id stands for.
                    let next = ids.get(number + 1).map(|id| self.letters_of(*id));
                    let is_next = |at: usize| match &next {
                        Some(Letters::Text(piece)) => text[at..].replace(' ', "\u{2581}").starts_with(piece),
                        _ => false,
                    };
                    at += letter_at(at);
                    while at < text.len() && !is_next(at) {
                        at += letter_at(at);
                    }
                }
                Letters::Text(piece) => {
                    for _ in 0..piece.chars().count() - usize::from(std::mem::take(&mut is_prefix)) {
                        at += letter_at(at);
                    }
                }
            }
            start..at
        };
        ids.iter().enumerate().map(offset).collect()
    }

    /// Whether a stretch gets a space before it (`Metaspace` of Hugging Face's `tokenizers`, but for the first kind).
    fn is_prefixed(&self, text: &str, at_start: bool) -> bool {
        match self.prefix {
            Prefix::EachStretch => true,
            Prefix::Start => {
                let begins_with_token = |matcher: &Matcher| matcher.at_start(text.as_bytes()).is_some();
                at_start
                    && !text.starts_with([' ', SPACE])
                    && !self.user_defined.as_ref().is_some_and(begins_with_token)
            }
            Prefix::Never => false,
        }
    }

    /// Adds a character to the current segment, or begins the next segment with it.
    #[inline]
    fn push(&self, letter: char, scratch: &mut Scratch, out: &mut Output) {
        let letter = if letter == ' ' { SPACE } else { letter };
        let symbol = self.symbol_of_char.get(letter as usize).copied().unwrap_or(NONE);
        if symbol == NONE {
            self.flush(scratch, out);
            self.emit_unknown(letter, out);
            return;
        }
        if let Some(&left) = scratch.symbols.last() {
            match self.pairs.get(&key(left, symbol)) {
                Some(&pair) => scratch.pairs.push(pair),
                None => self.flush(scratch, out),
            }
        }
        scratch.symbols.push(symbol);
    }

    /// Merges the current segment and writes its ids.
    #[inline]
    fn flush(&self, scratch: &mut Scratch, out: &mut Output) {
        match scratch.symbols.len() {
            0 => return,
            1 => {}
            2..=SCAN_MAX => self.merge_scanning(scratch),
            _ => self.merge_with_heap(scratch),
        }
        for &symbol in &scratch.symbols {
            match (symbol as usize).checked_sub(self.pieces.len()) {
                None => out.known(symbol),
                Some(loose) => match self.loose[loose] {
                    (_, Some(id)) => out.known(id),
                    (letter, None) => self.emit_unknown(letter, out),
                },
            }
        }
        scratch.clear();
    }

    fn emit_unknown(&self, letter: char, out: &mut Output) {
        match &self.byte_ids {
            Some(byte_ids) => {
                let mut utf8 = [0; 4];
                let bytes = letter.encode_utf8(&mut utf8).bytes();
                out.ids.extend(bytes.map(|byte| byte_ids[usize::from(byte)]));
                out.unknown_before = false;
            }
            // A run of unknown characters is one unknown piece.
            None if out.unknown_before => {}
            None => {
                out.ids.push(self.unknown);
                out.unknown_before = true;
            }
        }
    }

    fn pair(&self, left: u32, right: u32) -> Pair {
        self.pairs.get(&key(left, right)).copied().unwrap_or(BRIDGE)
    }

    /// Merges by looking through all pairs for the best one each time.
    fn merge_scanning(&self, scratch: &mut Scratch) {
        let Scratch { symbols, pairs, .. } = scratch;
        loop {
            let (mut best, mut best_rank) = (usize::MAX, u64::MAX);
            for (at, &pair) in pairs.iter().enumerate() {
                // Ranks alone are compared, so the leftmost of equals stays.
                if pair != BRIDGE && pair >> 32 < best_rank {
                    (best, best_rank) = (at, pair >> 32);
                }
            }
            if best == usize::MAX {
                return;
            }
            symbols[best] = pairs[best] as u32;
            symbols.remove(best + 1);
            pairs.remove(best);
            if best > 0 {
                pairs[best - 1] = self.pair(symbols[best - 1], symbols[best]);
            }
            if best < pairs.len() {
                pairs[best] = self.pair(symbols[best], symbols[best + 1]);
            }
        }
    }

    /// Merges with a heap of candidates, those that came to nothing left in it and skipped when they surface.
    fn merge_with_heap(&self, scratch: &mut Scratch) {
        let Scratch { symbols, pairs, heap, next, previous } = scratch;
        let n = symbols.len();
        pairs.push(BRIDGE);
        next.extend(1..=n);
        previous.extend((0..n).map(|at| at.wrapping_sub(1)));
        heap.extend(pairs.iter().enumerate().filter(|(_, pair)| **pair != BRIDGE).map(candidate));
        while let Some(Reverse((order, piece))) = heap.pop() {
            let left = (order & u64::from(u32::MAX)) as usize;
            // `pairs[left]` is what the symbol at `left` and its neighbour make now. A later pair at the same place
            // makes a longer piece, so an equal piece means that neither has changed.
            if pairs[left] == BRIDGE || pairs[left] as u32 != piece {
                continue;
            }
            let right = next[left];
            symbols[left] = piece;
            (symbols[right], pairs[right]) = (NONE, BRIDGE);
            next[left] = next[right];
            let after = next[left];
            pairs[left] = if after < n { self.pair(piece, symbols[after]) } else { BRIDGE };
            if after < n {
                previous[after] = left;
            }
            let before = previous[left];
            if before < n {
                pairs[before] = self.pair(symbols[before], piece);
            }
            let changed = [before, left].into_iter().filter(|&at| at < n && pairs[at] != BRIDGE);
            heap.extend(changed.map(|at| candidate((at, &pairs[at]))));
        }
        symbols.retain(|&symbol| symbol != NONE);
    }
}

/// Buffers that one thread uses again for every text.
#[derive(Default)]
pub(super) struct Scratch {
    /// The current segment.
    symbols: Vec<u32>,
    /// What each symbol makes with the next one.
    pairs: Vec<Pair>,
    heap: BinaryHeap<Reverse<(u64, u32)>>,
    next: Vec<usize>,
    previous: Vec<usize>,
}

impl Scratch {
    fn clear(&mut self) {
        self.symbols.clear();
        self.pairs.clear();
        self.heap.clear();
        self.next.clear();
        self.previous.clear();
    }
}

struct Output<'a> {
    ids: &'a mut Vec<u32>,
    unknown_before: bool,
}

impl Output<'_> {
    fn known(&mut self, id: u32) {
        self.ids.push(id);
        self.unknown_before = false;
    }
}

/// A pair as the heap orders it: by rank, then from the left.
fn candidate((at, &pair): (usize, &Pair)) -> Reverse<(u64, u32)> {
    Reverse((pair >> 32 << 32 | at as u64, pair as u32))
}
