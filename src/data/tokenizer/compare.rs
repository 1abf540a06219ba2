//! Holding the two tokenizers of a folder against each other.

use rayon::prelude::*;

use super::sentencepiece::SPACE;
use super::{Backend, SpecialTokens, Tokenizer};
use crate::error::Result;

/// Texts whose ids are compared, beside one for each piece and some for each added token.
const PROBES: [&str; 48] = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    " \n ",
    "a",
    " a",
    "  a",
    "a ",
    "a  b",
    "\na",
    "▁",
    "▁a",
    "a▁b",
    "\u{a0}",
    "\u{3000}",
    "Hello, world!",
    " Hello",
    "The quick brown fox jumps over the lazy dog.",
    "don't can't I'll we've",
    "3.14159 1,000,000",
    "2024-01-01T12:34:56Z",
    "HTTP/1.1 200 OK",
    "user@example.com https://example.com/a?b=c&d=e#f",
    "C:\\path\\to\\file.txt",
    "fn main() {\n    let sum = [1, 2].iter().sum::<u32>();\n}\n",
    "def f(x):\n\treturn x ** 2  # square\n",
    "{\"key\": [1, 2.5, null, true]}",
    "<div class=\"a\">&nbsp;</div>",
    "$\\frac{a}{b} = \\sum_{i=1}^{n} x_i$",
    "| a | b |\n|---|---|\n",
    "### Instruction:\n\n",
    "Below is an instruction that describes a task.\n\n### Response:\n\n",
    "你好，世界！",
    "你好 世界",
    "今天天气很好，我们去公园玩吧。",
    "中文English混排123",
    "「引号」《书名》——……",
    "繁體中文測試",
    "こんにちは、世界。",
    "안녕하세요 세계",
    "Привет, мир! Ελληνικά",
    "مرحبا بالعالم שלום",
    "😀👍🏽👨‍👩‍👧",
    "naïve café Å ﬁ e\u{301}",
    "\u{0}\u{7f}\u{feff}\u{fffd}𠮷",
];

/// The first thing in which the tokenizers of a `tokenizer.model` and a `tokenizer.json` differ: tokens, the tokens at the ends of
/// a text, or ids of texts. Texts are probes, each piece, several pieces in a row, and added tokens in several places.
pub(super) fn difference(model: &Tokenizer, json: &Tokenizer) -> Result<Option<String>> {
    let show = |token: Option<String>| token.map_or("nothing".to_owned(), |token| format!("`{token}`"));
    for id in 0..model.vocab_size.max(json.vocab_size) as u32 {
        let (ours, theirs) = (model.token(id), json.token(id));
        if ours != theirs {
            return Ok(Some(format!("token {id} is {} in the one and {} in the other", show(ours), show(theirs))));
        }
    }
    for (what, ours, theirs) in [("begins", model.bos, json.bos), ("ends", Some(model.eos), Some(json.eos))] {
        if ours != theirs {
            let token = |id: Option<u32>| show(id.and_then(|id| model.token(id)));
            return Ok(Some(format!("{} {what} a text in the one and {} in the other", token(ours), token(theirs))));
        }
    }
    let mut texts: Vec<String> = PROBES.map(str::to_owned).into();
    let mut tokens: Vec<&str> = model.special_ids.values().map(String::as_str).collect();
    if let Backend::Hf(hf) = &json.backend {
        tokens.extend(hf.added());
    }
    tokens.sort_unstable();
    tokens.dedup();
    for token in tokens {
        let around = [("", ""), ("a", "b"), ("a ", " b"), (" ", " "), ("你好", "\n你好"), ("", "user\n")];
        texts.extend(around.map(|(before, after)| format!("{before}{token}{after}")));
    }
    let pieces: Vec<String> =
        (0..model.vocab_size as u32).filter_map(|id| model.token(id)).map(|piece| piece.replace(SPACE, " ")).collect();
    texts.extend(pieces.chunks(PIECES_IN_A_ROW).map(<[String]>::concat));
    texts.extend(pieces);
    let compare = |text: &String| -> Option<Result<String>> {
        let encode = |tokenizer: &Tokenizer| tokenizer.encode(text, SpecialTokens::Special);
        match (encode(model), encode(json)) {
            (Ok(ours), Ok(theirs)) if ours == theirs => None,
            (Ok(ours), Ok(theirs)) => {
                let ids = |ids: &[u32]| {
                    format!("{:?}{}", &ids[..ids.len().min(SHOWN)], if ids.len() > SHOWN { "..." } else { "" })
                };
                let text: String = text.chars().take(SHOWN).collect();
                Some(Ok(format!("{text:?} is {} in the one and {} in the other", ids(&ours), ids(&theirs))))
            }
            (Err(error), _) | (_, Err(error)) => Some(Err(error)),
        }
    };
    texts.par_iter().find_map_first(compare).transpose()
}

const PIECES_IN_A_ROW: usize = 8;
/// How much of a text that differs is shown, in characters and in ids.
const SHOWN: usize = 40;
