//! Special tokens: their flags, and finding them in a text.

/// A token that the tokenizer's files add to the vocabulary or name as special.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) text: String,
    /// The id its file gives it; `None` for a token that is only named and so takes the next free id if it is new.
    pub(super) id: Option<u32>,
    /// False only where `added_tokens_decoder` says so: such a token is found in texts in either mode.
    pub(super) special: bool,
    /// Whether its flags are those of `added_tokens_decoder`, which go before all others.
    pub(super) has_flags: bool,
    /// Whether it swallows the white space before it, and after it.
    pub(super) lstrip: bool,
    pub(super) rstrip: bool,
    /// Whether it counts only where no letter, digit or underscore adjoins.
    pub(super) single_word: bool,
    /// Whether a `tokenizer.json` looks for it behind its normalizer. A SentencePiece model has none.
    pub(super) normalized: bool,
}

impl Added {
    pub(super) fn special(text: impl Into<String>, id: Option<u32>) -> Self {
        Self {
            text: text.into(),
            id,
            special: true,
            has_flags: false,
            lstrip: false,
            rstrip: false,
            single_word: false,
            normalized: false,
        }
    }
}

/// Finds given strings in a text: the leftmost first, of those at one place the longest.
pub(super) struct Matcher {
    /// By first byte; the longest first.
    by_first_byte: Vec<Vec<(Added, u32)>>,
}

/// One place where a token stands in a text (byte offsets), with the white space that it swallows.
pub(super) struct Hit {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) id: u32,
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

    /// The first token in `text` from the offset `from` on. A token that stands within a word though it must not is no
    /// token, nor is any other within it (`find_matches` in `added_vocabulary.rs` of Hugging Face's `tokenizers`).
    pub(super) fn find(&self, text: &str, from: usize) -> Option<Hit> {
        let bytes = text.as_bytes();
        let mut at = from;
        while at < bytes.len() {
            let Some((token, id)) = self.at_start(&bytes[at..]) else {
                at += 1;
                continue;
            };
            let (start, end) = (at, at + token.text.len());
            let (before, after) = (&text[..start], &text[end..]);
            if token.single_word && (before.ends_with(is_of_word) || after.starts_with(is_of_word)) {
                at = end;
                continue;
            }
            let start = if token.lstrip { before.trim_end().len().max(from) } else { start };
            let end = if token.rstrip { text.len() - after.trim_start().len() } else { end };
            return Some(Hit { start, end, id });
        }
        None
    }
}

fn is_of_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}
