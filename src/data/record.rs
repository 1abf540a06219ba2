//! What a row of a data file says, in any of the known formats.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::Fault;

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
}

impl Record {
    /// A question by itself, as a prompt to answer.
    pub fn question(text: impl Into<String>) -> Self {
        Self { question: text.into(), ..Self::default() }
    }
}

/// Why a row or a file cannot be used, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What was found and what was expected.
    pub what: String,
    /// What to change; may be empty.
    pub hint: String,
}

impl Reason {
    /// A reason that says all by itself.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: String::new() }
    }

    /// Adds what to change.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }
}

/// The keys of every known format; other keys of a row are ignored.
#[derive(Deserialize)]
struct Row {
    instruction: Option<Value>,
    input: Option<Value>,
    output: Option<Value>,
    history: Option<Value>,
    system: Option<Value>,
    target: Option<Value>,
    conversations: Option<Value>,
    messages: Option<Value>,
}

pub(super) fn parse(bytes: &[u8], line: u32) -> std::result::Result<Record, Reason> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Reason::new(format!("is not valid UTF-8 (byte {} of the row)", error.valid_up_to() + 1))
            .hint("convert the file: iconv -f GB18030 -t UTF-8 (or what it is written in)")
    })?;
    if !text.trim_start().starts_with('{') {
        let found = match serde_json::from_str::<Value>(text) {
            Ok(value) => kind(&value),
            Err(error) => return Err(bad_json(&error, line)),
        };
        return Err(Reason::new(format!("a row must be a JSON object, this is {found}")));
    }
    let row: Row = serde_json::from_str(text).map_err(|error| bad_json(&error, line))?;
    match (row.messages.is_some() || row.conversations.is_some(), row.instruction.is_some()) {
        (true, true) => Err(Reason::new("holds both a dialogue and an `instruction`: which one is meant?")
            .hint("remove one of the two")),
        (true, false) => dialogue(row),
        (false, true) => alpaca(row),
        (false, false) if row.input.is_some() && row.target.is_some() => Ok(Record {
            question: string(row.input, "input")?,
            answer: string(row.target, "target")?,
            ..Record::default()
        }),
        (false, false) => Err(unknown_format(&row, text)),
    }
}

fn alpaca(row: Row) -> std::result::Result<Record, Reason> {
    let mut question = string(row.instruction, "instruction")?;
    if row.output.is_none() {
        return Err(Reason::new("has an `instruction` but no `output`"));
    }
    let input = row.input.map(|input| string(Some(input), "input")).transpose()?.unwrap_or_default();
    if !input.is_empty() {
        question.push('\n');
        question.push_str(&input);
    }
    let history = match row.history {
        None => Vec::new(),
        Some(Value::Array(turns)) => turns.into_iter().map(history_turn).collect::<std::result::Result<_, _>>()?,
        Some(other) => {
            return Err(Reason::new(format!("`history` must be a list, this is {}", kind(&other))));
        }
    };
    let system = row.system.map(|system| string(Some(system), "system")).transpose()?.filter(|text| !text.is_empty());
    Ok(Record { system, history, question, answer: string(row.output, "output")? })
}

fn history_turn(turn: Value) -> std::result::Result<(String, String), Reason> {
    if let Value::Array(pair) = turn
        && let Ok([Value::String(question), Value::String(answer)]) = <[Value; 2]>::try_from(pair)
    {
        return Ok((question, answer));
    }
    Err(Reason::new("each turn of `history` must be a list of two strings: [question, answer]"))
}

/// Whose words a turn of a dialogue holds.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    System,
    User,
    Assistant,
}

fn dialogue(row: Row) -> std::result::Result<Record, Reason> {
    let (turns, name) = match (row.conversations, row.messages) {
        (Some(_), Some(_)) => {
            return Err(Reason::new("holds both `conversations` and `messages`: which one is meant?")
                .hint("remove one of the two"));
        }
        (Some(turns), None) => (turns, "conversations"),
        (None, turns) => (turns.unwrap_or_default(), "messages"),
    };
    let Value::Array(turns) = turns else {
        return Err(Reason::new(format!("`{name}` must be a list of turns, this is {}", kind(&turns))));
    };
    let own_system = row.system.map(|system| string(Some(system), "system")).transpose()?;
    let mut record = Record { system: own_system.filter(|text| !text.is_empty()), ..Record::default() };
    let mut asked: Option<String> = None;
    for (number, turn) in (1..).zip(turns) {
        let (role, text) = turn_of(turn)
            .map_err(|reason| Reason { what: format!("turn {number} of `{name}` {}", reason.what), ..reason })?;
        let misplaced = |what: &str| Reason::new(format!("turn {number} of `{name}` {what}"));
        match role {
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
    Ok(Record { question, answer, ..record })
}

/// A turn in the words of ShareGPT (`from`, `value`) or of OpenAI (`role`, `content`).
fn turn_of(turn: Value) -> std::result::Result<(Role, String), Reason> {
    let Value::Object(mut turn) = turn else {
        return Err(Reason::new(format!("must be an object, it is {}", kind(&turn))));
    };
    let mut take = |a: &str, b: &str| match (turn.remove(a), turn.remove(b)) {
        (Some(_), Some(_)) => Err(Reason::new(format!("has both `{a}` and `{b}`"))),
        (Some(Value::String(text)), None) | (None, Some(Value::String(text))) => Ok(text),
        (None, None) => Err(Reason::new(format!("has no `{a}` (or `{b}`)"))),
        (Some(other), None) => Err(Reason::new(format!("has {} as `{a}`, not a string", kind(&other)))),
        (None, Some(other)) => Err(Reason::new(format!("has {} as `{b}`, not a string", kind(&other)))),
    };
    let role = match take("from", "role")?.to_ascii_lowercase().as_str() {
        "system" => Role::System,
        "human" | "user" => Role::User,
        "assistant" | "gpt" => Role::Assistant,
        other => {
            return Err(Reason::new(format!("is by `{}`", shortened(other)))
                .hint("known are human or user, assistant or gpt, and system"));
        }
    };
    Ok((role, take("value", "content")?))
}

fn string(value: Option<Value>, name: &str) -> std::result::Result<String, Reason> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(Reason::new(format!("`{name}` must be a string, this is {}", kind(&other)))),
        None => Err(Reason::new(format!("has no `{name}`"))),
    }
}

fn unknown_format(row: &Row, text: &str) -> Reason {
    const KNOWN: &str = "known are {instruction, input, output}, {input, target}, {conversations} and {messages}";
    if row.output.is_some() {
        return Reason::new("has an `output` but no `instruction`").hint(KNOWN);
    }
    if row.input.is_some() || row.target.is_some() {
        let missing = if row.input.is_some() { "target" } else { "input" };
        return Reason::new(format!("has no `{missing}` and no `instruction`")).hint(KNOWN);
    }
    let keys = serde_json::from_str::<serde_json::Map<String, Value>>(text).unwrap_or_default();
    let keys: Vec<String> = keys.keys().take(8).map(|key| format!("`{}`", shortened(key))).collect();
    let found = if keys.is_empty() { "it has no keys".to_owned() } else { format!("its keys are {}", keys.join(", ")) };
    Reason::new(format!("is of no known format: {found}")).hint(KNOWN)
}

fn bad_json(error: &serde_json::Error, line: u32) -> Reason {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    let at = match error.line() {
        0 | 1 => format!("column {}", error.column()),
        below => format!("line {}, column {}", u64::from(line) + below as u64 - 1, error.column()),
    };
    Reason::new(format!("is not valid JSON: {what} ({at})"))
}

fn kind(value: &Value) -> &'static str {
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
fn shortened(text: &str) -> String {
    let short: String = text.chars().take(40).flat_map(char::escape_debug).collect();
    if text.chars().nth(40).is_some() { format!("{short}...") } else { short }
}

/// A fault at a row.
pub fn row_fault(file: &Path, line: u32, reason: &Reason) -> Fault {
    Fault::new(place(file, line), reason.what.as_str()).hint(reason.hint.as_str())
}

/// `file:line`.
pub fn place(file: &Path, line: u32) -> String {
    format!("{}:{line}", file.display())
}
