//! JSON as rows hold it: values in which no key stands twice, and what is wrong with text that is not JSON.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::reason::Reason;

/// A JSON value; an object that has a key twice is an error, where serde_json would keep the last of the two.
pub(super) struct Strict(pub(super) Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((key, Strict(value))) = entries.next_entry::<String, Strict>()? {
            if object.contains_key(&key) {
                return Err(twice(&key));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

const TWICE: &str = "holds the key ";

/// The error of an object that has a key twice.
pub(super) fn twice<E: Error>(key: &str) -> E {
    E::custom(format_args!("{TWICE}`{}` twice in one object", shortened(key)))
}

pub(super) const SINGLE_QUOTES: &str = "is written as Python shows it, in single quotes, which is not JSON";
pub(super) const SINGLE_QUOTES_HINT: &str = "in Python, write rows with json.dumps(row), not with str(row)";

/// Says what is wrong with a row that begins on `line` and that the parser gave up.
pub(super) fn fault(error: &serde_json::Error, text: &str, line: u32) -> Reason {
    let said = error.to_string();
    let said = said.split(" at line ").next().unwrap_or_default();
    if said.starts_with(TWICE) {
        return Reason::new(said).hint("keep one of the two");
    }
    let place = match error.line() {
        0 | 1 => format!("column {}", error.column()),
        below if error.column() == 0 => format!("the end of line {}", u64::from(line) + below as u64 - 2),
        below => format!("line {}, column {}", u64::from(line) + below as u64 - 1, error.column()),
    };
    let (what, hint) = known_fault(said, text, offset(error, text));
    if what == SINGLE_QUOTES {
        return Reason::new(format!("{what} ({place})")).hint(hint);
    }
    Reason::new(format!("is not valid JSON: {what} ({place})")).hint(hint)
}

/// The byte that the parser stumbled over.
fn offset(error: &serde_json::Error, text: &str) -> usize {
    let lines = text.split_inclusive('\n').take(error.line().saturating_sub(1));
    let before = lines.map(str::len).sum::<usize>() + error.column();
    // Column 0 is the line break before a line.
    before.saturating_sub(1).min(text.len())
}

/// What the parser says, in words that name the cause where it is a known one, and what to do.
fn known_fault<'a>(said: &'a str, text: &str, at: usize) -> (std::borrow::Cow<'a, str>, &'static str) {
    let bytes = text.as_bytes();
    let is_of_word = |byte: &&u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'_');
    let before = bytes[..at].iter().rev().take_while(is_of_word).count();
    let after = bytes[at..].iter().take_while(is_of_word).count();
    let word = std::str::from_utf8(&bytes[at - before..at + after]).unwrap_or_default();
    let here = bytes.get(at).copied().unwrap_or_default();
    let around = &bytes[at.saturating_sub(2)..bytes.len().min(at + 3)];
    // A parser that waits for a value, a key or a separator stumbles over these; within strings they are text.
    let outside = ["expected", "key must be", "invalid number", "trailing characters"];
    let is_outside = outside.iter().any(|words| said.contains(words));
    let closes_after_comma = matches!(here, b']' | b'}') && bytes[..at].trim_ascii_end().ends_with(b",");
    let is_surrogate = said.contains("surrogate") || said.contains("end of hex escape");
    match () {
        () if is_surrogate => (
            "a string holds half a character: \\ud800 to \\udfff stand for something only in pairs".into(),
            "the text was cut within an emoji or the like: write the row again from the whole text",
        ),
        () if said.contains("control character") && here == 0 || is_outside && here == 0 && at < bytes.len() => (
            "there is a NUL byte".into(),
            "the file was damaged, or is in UTF-16 from here on: fetch or write it again",
        ),
        () if said.contains("control character") && matches!(here, b'\n' | b'\r') => (
            "a string goes over the end of its line".into(),
            "write a line break within a string as \\n; if none is meant, a quote is missing",
        ),
        () if said.contains("control character") => {
            ("a string holds a control character as it is".into(), "write it as an escape: a tab is \\t")
        }
        () if is_outside && matches!(word, "NaN" | "Infinity" | "-Infinity" | "nan" | "inf" | "-inf") => (
            format!("{word} is no value of JSON").into(),
            "it stands for a missing cell in pandas: fill it first, df.fillna(\"\"), or leave the key out",
        ),
        () if is_outside && matches!(word, "None" | "True" | "False") => {
            (format!("{word} is Python's, not JSON's").into(), SINGLE_QUOTES_HINT)
        }
        () if is_outside && word == "undefined" => {
            ("undefined is JavaScript's, not JSON's".into(), "write null, or leave the key out")
        }
        () if is_outside && here == b'\'' => (SINGLE_QUOTES.into(), SINGLE_QUOTES_HINT),
        () if is_outside && (here == b'#' || around.windows(2).any(|two| two == b"//" || two == b"/*")) => {
            ("there is a comment, which JSON does not have".into(), "remove the comment")
        }
        () if said.contains("trailing comma")
            || is_outside && closes_after_comma
            || here == b',' && said.contains("trailing characters") =>
        {
            ("there is a comma too many".into(), "remove the comma before the closing bracket, or after the row")
        }
        () if here == b'}' && said.contains("trailing characters") => {
            ("there is a `}` that closes nothing".into(), "remove it, or open what it closes")
        }
        () if said.contains("trailing characters") => (
            "more follows after the end of the object".into(),
            "write one object a line, or in an array a comma between two",
        ),
        () if is_outside && (around.contains(&0xef) && text.contains('\u{feff}')) => (
            "a byte-order mark stands within the row".into(),
            "remove it: it belongs at the start of a file, if anywhere",
        ),
        () => (said.into(), ""),
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The beginning of a text from a data file, fit for a message.
pub(super) fn shortened(text: &str) -> String {
    let short: String = text.chars().take(40).flat_map(char::escape_debug).collect();
    if text.chars().nth(40).is_some() { format!("{short}...") } else { short }
}
