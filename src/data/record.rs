//! What a row of a data file says, in any of the known formats.

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::json::{self, Strict};
use super::learned::{self, About, Role, Said, Wish};
use super::reason::Reason;

/// What one row of a data file says, whatever its format.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// The system prompt; never empty.
    pub system: Option<String>,
    /// Earlier questions with their answers.
    pub history: Vec<(String, String)>,
    /// What is asked last.
    pub question: String,
    /// The answer to it, which is learned.
    pub answer: String,
    /// Whether the row asks to have an earlier answer learned too, which is not done.
    pub asks_for_earlier: bool,
    /// The keys of the row that say nothing here and are passed over.
    pub passed_over: Vec<String>,
}

impl Record {
    /// A question by itself, as a prompt to answer.
    pub fn question(text: impl Into<String>) -> Self {
        Self { question: text.into(), ..Self::default() }
    }
}

/// What a row holds under the keys of every known format; other keys are counted and passed over.
#[derive(Default)]
struct Row {
    texts: [Option<Value>; FIELDS.len()],
    /// What it says of what is to be learned.
    said: Vec<Said>,
    /// Its other keys.
    others: Vec<String>,
}

const FIELDS: [&str; 8] =
    ["instruction", "input", "output", "history", "system", "target", "conversations", "messages"];

impl Row {
    fn has(&self, field: &str) -> bool {
        FIELDS.iter().zip(&self.texts).any(|(name, value)| *name == field && value.is_some())
    }

    fn take(&mut self, field: &str) -> Option<Value> {
        let at = FIELDS.iter().position(|name| *name == field)?;
        self.texts[at].take()
    }

    /// Takes a text that must be there.
    fn text(&mut self, field: &str) -> std::result::Result<String, Reason> {
        string(self.take(field), field)
    }

    /// Takes a text that may be missing.
    fn text_if_any(&mut self, field: &str) -> std::result::Result<Option<String>, Reason> {
        self.take(field).map(|value| string(Some(value), field)).transpose()
    }
}

/// What a key of a row is.
enum Key {
    Field(usize),
    Said(&'static str, About),
    Other(String),
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Key;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, name: &str) -> std::result::Result<Key, E> {
                Ok(match FIELDS.iter().position(|field| *field == name) {
                    Some(field) => Key::Field(field),
                    None => match learned::key(name) {
                        Some((name, about)) => Key::Said(name, about),
                        None => Key::Other(name.to_owned()),
                    },
                })
            }
        }
        deserializer.deserialize_str(Name)
    }
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Row;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<Row, A::Error> {
                let (mut row, mut seen) = (Row::default(), [false; FIELDS.len()]);
                while let Some(key) = entries.next_key()? {
                    match key {
                        Key::Field(field) => {
                            if std::mem::replace(&mut seen[field], true) {
                                return Err(json::twice(FIELDS[field]));
                            }
                            let Strict(value) = entries.next_value()?;
                            row.texts[field] = Some(value).filter(|value| !value.is_null());
                        }
                        Key::Said(name, about) => {
                            if row.said.iter().any(|(known, ..)| *known == name) {
                                return Err(json::twice(name));
                            }
                            let Strict(value) = entries.next_value()?;
                            row.said.push((name, about, value));
                        }
                        Key::Other(name) => {
                            entries.next_value::<IgnoredAny>()?;
                            row.others.push(name);
                        }
                    }
                }
                Ok(row)
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// The text of a row, which looks like an object.
pub(super) fn text_of_row(bytes: &[u8], line: u32) -> std::result::Result<&str, Reason> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Reason::new(format!("is not valid UTF-8 (byte {} of the row)", error.valid_up_to() + 1))
            .hint("convert the file: iconv -f GB18030 -t UTF-8 (or what it is written in)")
    })?;
    if !text.trim_start().starts_with('{') {
        let found = match serde_json::from_str::<Value>(text) {
            Ok(value) => json::kind(&value),
            Err(error) => return Err(json::fault(&error, text, line)),
        };
        return Err(Reason::new(format!("a row must be a JSON object, this is {found}")));
    }
    Ok(text)
}

pub(super) fn parse(bytes: &[u8], line: u32) -> std::result::Result<Record, Reason> {
    let text = text_of_row(bytes, line)?;
    let mut row: Row = serde_json::from_str(text).map_err(|error| json::fault(&error, text, line))?;
    if let Wish::Leave(why) = learned::wish(&row.said)? {
        return Err(not_learned("its answer", &why));
    }
    let passed_over = std::mem::take(&mut row.others);
    let record = match (row.has("messages") || row.has("conversations"), row.has("instruction")) {
        (true, true) => Err(Reason::new("holds both a dialogue and an `instruction`: which one is meant?")
            .hint("remove one of the two")),
        (true, false) => dialogue(row),
        (false, true) => alpaca(row),
        (false, false) if row.has("input") && row.has("target") => {
            Ok(Record { question: row.text("input")?, answer: row.text("target")?, ..Record::default() })
        }
        (false, false) => Err(unknown_format(&row, text)),
    };
    record.map(|record| Record { passed_over, ..record })
}

fn not_learned(what: &str, why: &str) -> Reason {
    Reason::new(format!("says that {what} is not to be learned ({why})"))
        .hint("the last answer is what is learned: remove the row, or let it end with the answer to learn")
}

fn alpaca(mut row: Row) -> std::result::Result<Record, Reason> {
    let mut question = row.text("instruction")?;
    if !row.has("output") {
        return Err(Reason::new("has an `instruction` but no `output`"));
    }
    let input = row.text_if_any("input")?.unwrap_or_default();
    if !input.is_empty() {
        question.push('\n');
        question.push_str(&input);
    }
    let history = match row.take("history") {
        None => Vec::new(),
        Some(Value::Array(turns)) => turns.into_iter().map(history_turn).collect::<std::result::Result<_, _>>()?,
        Some(other) => {
            return Err(Reason::new(format!("`history` must be a list, this is {}", json::kind(&other))));
        }
    };
    let system = row.text_if_any("system")?.filter(|text| !text.is_empty());
    Ok(Record { system, history, question, answer: row.text("output")?, ..Record::default() })
}

fn history_turn(turn: Value) -> std::result::Result<(String, String), Reason> {
    if let Value::Array(pair) = turn
        && let Ok([Value::String(question), Value::String(answer)]) = <[Value; 2]>::try_from(pair)
    {
        return Ok((question, answer));
    }
    Err(Reason::new("each turn of `history` must be a list of two strings: [question, answer]"))
}

fn dialogue(mut row: Row) -> std::result::Result<Record, Reason> {
    let (turns, name) = match (row.take("conversations"), row.take("messages")) {
        (Some(_), Some(_)) => {
            return Err(Reason::new("holds both `conversations` and `messages`: which one is meant?")
                .hint("remove one of the two"));
        }
        (Some(turns), None) => (turns, "conversations"),
        (None, turns) => (turns.unwrap_or_default(), "messages"),
    };
    let Value::Array(turns) = turns else {
        return Err(Reason::new(format!("`{name}` must be a list of turns, this is {}", json::kind(&turns))));
    };
    let own_system = row.text_if_any("system")?;
    let mut record = Record { system: own_system.filter(|text| !text.is_empty()), ..Record::default() };
    let mut asked: Option<String> = None;
    // Of each answer so far, what its turn says of learning it.
    let mut wishes = Vec::new();
    for (number, turn) in (1..).zip(turns) {
        let (role, text, wish) = turn_of(turn)
            .map_err(|reason| Reason { what: format!("turn {number} of `{name}` {}", reason.what), ..reason })?;
        let misplaced = |what: &str| Reason::new(format!("turn {number} of `{name}` {what}"));
        match role {
            Role::System | Role::User if wish == Wish::Learn => {
                return Err(misplaced("is to be learned, it says, and is no answer")
                    .hint("answers alone are learned: remove its `train`, `weight` or `loss`, or the row"));
            }
            Role::System if number > 1 => return Err(misplaced("is a system prompt, which must come first")),
            Role::System if text.is_empty() => {}
            Role::System if record.system.is_some() => {
                return Err(misplaced("is a system prompt beside the row's own `system`"));
            }
            Role::System => record.system = Some(text),
            Role::User if asked.is_some() => return Err(misplaced("is a second user turn in a row")),
            Role::User => asked = Some(text),
            Role::Assistant => {
                let question =
                    asked.take().ok_or_else(|| misplaced("is an assistant turn without a user turn before it"))?;
                record.history.push((question, text));
                wishes.push((number, wish));
            }
        }
    }
    if asked.is_some() {
        return Err(Reason::new(format!("`{name}` ends with a user turn: there is no reply to learn"))
            .hint("remove the last turn, or add the reply"));
    }
    let (question, answer) = record
        .history
        .pop()
        .ok_or_else(|| Reason::new(format!("`{name}` holds no turns of a user and an assistant")))?;
    if let Some((number, Wish::Leave(why))) = wishes.pop() {
        return Err(not_learned(&format!("its answer, turn {number} of `{name}`,"), &why));
    }
    record.asks_for_earlier = wishes.iter().any(|(_, wish)| *wish == Wish::Learn);
    Ok(Record { question, answer, ..record })
}

/// A turn in the words of ShareGPT (`from`, `value`) or of OpenAI (`role`, `content`).
fn turn_of(turn: Value) -> std::result::Result<(Role, String, Wish), Reason> {
    let Value::Object(mut turn) = turn else {
        return Err(Reason::new(format!("must be an object, it is {}", json::kind(&turn))));
    };
    let role = match text_of(&mut turn, "from", "role")?.to_ascii_lowercase().as_str() {
        "system" => Role::System,
        "human" | "user" => Role::User,
        "assistant" | "gpt" => Role::Assistant,
        other => return Err(learned::unknown_role(other)),
    };
    let said = turn.iter().filter_map(|(name, value)| {
        let (name, about) = learned::key(name)?;
        Some((name, about, value.clone()))
    });
    let wish = learned::wish(&said.collect::<Vec<_>>())?;
    Ok((role, text_of(&mut turn, "value", "content")?, wish))
}

/// Takes a text that a turn has under one of two keys.
fn text_of(turn: &mut Map<String, Value>, a: &str, b: &str) -> std::result::Result<String, Reason> {
    let (value, name) = match (turn.swap_remove(a), turn.swap_remove(b)) {
        (Some(_), Some(_)) => return Err(Reason::new(format!("has both `{a}` and `{b}`"))),
        (None, None) => return Err(Reason::new(format!("has no `{a}` (or `{b}`)"))),
        (Some(value), None) => (value, a),
        (None, Some(value)) => (value, b),
    };
    match value {
        Value::String(text) => Ok(text),
        Value::Array(parts) if parts.first().is_some_and(Value::is_object) => text_of_part(parts, name),
        other => Err(Reason::new(format!("has {} as `{name}`, not a string", json::kind(&other)))),
    }
}

/// The text of a list of parts, as OpenAI writes it; of one part, for what stands between several is for the user to say.
fn text_of_part(mut parts: Vec<Value>, name: &str) -> std::result::Result<String, Reason> {
    let kind_of = |part: &Value| part.get("type").and_then(Value::as_str).map(str::to_owned);
    if let Some(other) = parts.iter().find(|part| kind_of(part).as_deref() != Some("text")) {
        let kind = kind_of(other).unwrap_or_else(|| "no".to_owned());
        return Err(Reason::new(format!("has a part of type `{}` in its `{name}`", json::shortened(&kind)))
            .hint("the models trained here see text alone: write the texts as one string, or remove the row"));
    }
    let n_parts = parts.len();
    match parts.pop().as_mut().and_then(Value::as_object_mut).and_then(|part| part.remove("text")) {
        Some(Value::String(text)) if n_parts == 1 => Ok(text),
        Some(Value::String(_)) => {
            Err(Reason::new(format!("has {n_parts} parts of text as `{name}`")).hint("join them into one string"))
        }
        _ => Err(Reason::new(format!("has a part without `text` in its `{name}`"))),
    }
}

fn string(value: Option<Value>, name: &str) -> std::result::Result<String, Reason> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(Reason::new(format!("`{name}` must be a string, this is {}", json::kind(&other)))),
        None => Err(Reason::new(format!("has no `{name}`"))),
    }
}

fn unknown_format(row: &Row, text: &str) -> Reason {
    const KNOWN: &str = "known are {instruction, input, output}, {input, target}, {conversations} and {messages}";
    if row.has("output") {
        return Reason::new("has an `output` but no `instruction`").hint(KNOWN);
    }
    if row.has("input") || row.has("target") {
        let missing = if row.has("input") { "target" } else { "input" };
        return Reason::new(format!("has no `{missing}` and no `instruction`")).hint(KNOWN);
    }
    let keys = serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
    if keys.contains_key("text") && !keys.contains_key("prompt") {
        return Reason::new("holds a `text` alone: plain text, without question and answer, is not trained on")
            .hint("write {\"instruction\": \"\", \"output\": TEXT} to learn it as an answer to an empty question");
    }
    let keys: Vec<String> = keys.keys().take(8).map(|key| format!("`{}`", json::shortened(key))).collect();
    let found = if keys.is_empty() { "it has no keys".to_owned() } else { format!("its keys are {}", keys.join(", ")) };
    Reason::new(format!("is of no known format: {found}")).hint(KNOWN)
}
