//! JSON objects of Hugging Face's kind, read so that what is wrong with one is named as what it is.

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Reads a file's bytes as a JSON object in which no key stands twice; `place` is the file, for messages.
///
/// # Errors
/// [`Error::Invalid`]: another encoding, a byte-order mark, a number that JSON does not have, a key that stands twice, text
/// that is no JSON object.
pub fn object(bytes: &[u8], place: &str) -> Result<Map<String, Value>> {
    let invalid = |what: &str, hint: &str| Err(Error::invalid(place, what).hint(hint));
    let wide = match bytes {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] | [0, 0, 0, _, ..] | [_, 0, 0, 0, ..] => Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, _, ..] | [_, 0, ..] => Some("UTF-16"),
        _ => None,
    };
    if let Some(encoding) = wide {
        let what = format!("is written in {encoding}, not in UTF-8");
        return invalid(&what, &format!("convert it: iconv -f {encoding} -t UTF-8, or download the file again"));
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return invalid("begins with a byte-order mark, which JSON does not have", "save the file without it");
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return invalid("is not valid UTF-8", "download the file again, or save it as UTF-8");
    };
    let mut parser = serde_json::Deserializer::from_str(text);
    let read = parser.deserialize_map(Entries).and_then(|map| parser.end().map(|()| map));
    read.map_err(|error| {
        let word = word_at(text, &error);
        if matches!(word, "NaN" | "Infinity" | "-Infinity") {
            let what = format!("holds {word} on line {}, which is no value of JSON", error.line());
            return Error::invalid(place, what).hint("write a number there, or take the key out");
        }
        let said = error.to_string();
        if let Some(key) = said.strip_prefix(TWICE) {
            return Error::invalid(place, format!("{TWICE}{key}")).hint("keep one of the two");
        }
        let what = if error.is_data() { said } else { format!("not valid JSON: {said}") };
        Error::invalid(place, format!("is not a JSON object ({what})"))
            .hint("download this file again, or mend that line")
    })
}

const TWICE: &str = "holds a key twice: ";

struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<Self::Value, A::Error> {
        let mut object = Map::new();
        while let Some((key, value)) = entries.next_entry::<String, Value>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("{TWICE}`{key}`")));
            }
            object.insert(key, value);
        }
        Ok(object)
    }
}

/// The word that the parser stumbled over.
fn word_at<'a>(text: &'a str, error: &serde_json::Error) -> &'a str {
    let line = text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let is_of_word = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let at = error.column().saturating_sub(1).min(line.len());
    let Some((before, after)) = line.split_at_checked(at) else { return "" };
    let start = before.rfind(|c| !is_of_word(c)).map_or(0, |at| at + 1);
    let end = at + after.find(|c| !is_of_word(c)).unwrap_or(after.len());
    line.get(start..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named_as_what_it_is() {
        let utf16: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (bytes, words) in [
            (&b"\xef\xbb\xbf{}"[..], "byte-order mark"),
            (&utf16, "UTF-16"),
            (b"{\"a\": NaN}", "holds NaN on line 1"),
            (b"{\n\"a\": -Infinity\n}", "holds -Infinity on line 2"),
            (b"{\"a\": 1, \"b\": 2, \"a\": 3}", "holds a key twice: `a`"),
            (b"[1]", "is not a JSON object"),
            (b"{\"a\": 1} x", "is not a JSON object"),
            (b"{\"a\": \"\xff\"}", "UTF-8"),
        ] {
            let error = object(bytes, "a.json").expect_err(words);
            assert!(error.to_string().contains(words), "{words}: {error}");
            assert!(!error.faults()[0].hint.is_empty());
        }
        assert_eq!(object(b"{\"a\": {\"b\": [1, null]}}", "a.json").map(|map| map.len()).ok(), Some(1));
    }
}
