//! What a row says as a conversation: messages as a chat template reads them, whatever the row's format.

use serde_json::{Map, Value, json};

use super::json::{self, Strict};
use super::learned::{self, About, Said, Wish};
use super::reason::Reason;
use super::record::{Record, text_of_row};

/// A conversation, and which of its answers may be learned.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// Objects with `role` and `content`, and whatever else the row's turns hold; keys that are null are left out.
    pub messages: Vec<Value>,
    /// The tools that the row names.
    pub tools: Option<Value>,
    /// Of each message whether its row says that it is not to be learned.
    pub is_left: Vec<bool>,
    /// Whether an answer before the last is asked to be learned by itself.
    pub asks_for_earlier: bool,
    /// The keys of the row that say nothing here and are passed over.
    pub passed_over: Vec<String>,
}

/// The role of an answer.
pub const ASSISTANT: &str = "assistant";

impl Conversation {
    /// A question by itself.
    pub fn question(text: &str) -> Self {
        let mut conversation = Self::default();
        conversation.say("user", text);
        conversation
    }

    /// Adds a message.
    pub fn say(&mut self, role: &str, content: &str) {
        self.push(json!({ "role": role, "content": content }), false);
    }

    /// Puts a system prompt before all other messages, in place of one that is there.
    pub fn set_system(&mut self, content: &str) {
        if self.messages.first().is_some_and(|first| role(first) == "system") {
            self.messages.remove(0);
            self.is_left.remove(0);
        }
        self.messages.insert(0, json!({ "role": "system", "content": content }));
        self.is_left.insert(0, false);
    }

    /// Reads messages as `{"role": ..., "content": ...}` or `{"from": ..., "value": ...}`.
    ///
    /// # Errors
    /// A turn that is no such object, or asks for what is not done.
    pub fn of_turns(turns: &Value, name: &str) -> Result<Self, Reason> {
        let Value::Array(turns) = turns else {
            return Err(Reason::new(format!("`{name}` must be a list of turns, this is {}", json::kind(turns))));
        };
        let mut conversation = Self::default();
        for (number, turn) in (1..).zip(turns) {
            let of_turn =
                |reason: Reason| Reason { what: format!("turn {number} of `{name}` {}", reason.what), ..reason };
            let (message, wish) = message(turn).map_err(of_turn)?;
            if role(&message) != ASSISTANT && wish == Wish::Learn {
                return Err(of_turn(
                    Reason::new("is to be learned, it says, and is no answer")
                        .hint("answers alone are learned: remove its `train`, `weight` or `loss`, or the row"),
                ));
            }
            conversation.asks_for_earlier |= wish == Wish::Learn && number < turns.len();
            conversation.push(message, matches!(wish, Wish::Leave(_)));
        }
        Ok(conversation)
    }

    /// The same for strings around its parts: turns in pairs, a question at the end.
    ///
    /// # Errors
    /// Turns in another order.
    pub fn asked(&self) -> Result<Record, Reason> {
        if self.tools.is_some() {
            return Err(Reason::new("the messages come with tools, which this template has no place for")
                .hint("a chat template has: --template chat, or a .jinja file, with a base"));
        }
        let mut record = Record::default();
        let mut question: Option<String> = None;
        for (number, message) in (1..).zip(&self.messages) {
            let misplaced = |what: &str| Err(Reason::new(format!("message {number} is {what}")));
            let Some(text) = message["content"].as_str().map(str::to_owned) else {
                return misplaced("no text: its `content` is no string");
            };
            match (role(message), question.take()) {
                ("system", None) if number == 1 => record.system = Some(text).filter(|text| !text.is_empty()),
                ("user", None) => question = Some(text),
                (ASSISTANT, Some(question)) => record.history.push((question, text)),
                ("user", Some(_)) => return misplaced("a second question in a row"),
                (ASSISTANT, None) => return misplaced("an answer without a question before it"),
                (role, _) => return misplaced(&format!("by `{role}`, which this template has no place for")),
            }
        }
        let question = question.ok_or_else(|| Reason::new("the messages do not end with a question"))?;
        Ok(Record { question, ..record })
    }

    fn push(&mut self, message: Value, is_left: bool) {
        self.messages.push(message);
        self.is_left.push(is_left);
    }
}

/// A message's role.
pub fn role(message: &Value) -> &str {
    message["role"].as_str().unwrap_or_default()
}

/// A row of a data file as a conversation.
///
/// # Errors
/// Where it is of no known format, or asks for what is not done.
pub(super) fn parse(bytes: &[u8], line: u32) -> Result<Conversation, Reason> {
    let text = text_of_row(bytes, line)?;
    let row = serde_json::from_str(text).map_err(|error| json::fault(&error, text, line))?;
    let Strict(Value::Object(mut row)) = row else {
        return Err(Reason::new("a row must be a JSON object"));
    };
    row.retain(|_, value| !value.is_null());
    let (tools, mut said) = said_of(&row);
    // A template reads these of a turn, and nothing of the row but its tools.
    let of_turns = [About::Reasoning, About::Tools, About::Refusal];
    said.extend(row.iter().filter_map(|(name, value)| {
        let (name, about) = learned::key(name).filter(|(name, about)| *name != "tools" && of_turns.contains(about))?;
        Some((name, about, value.clone()))
    }));
    if let Wish::Leave(why) = learned::wish(&said)? {
        return Err(Reason::new(format!("says that its answers are not to be learned ({why})")).hint("remove the row"));
    }
    let system = match row.get("system") {
        Some(Value::String(text)) => Some(text.clone()).filter(|text| !text.is_empty()),
        Some(other) => return Err(Reason::new(format!("`system` must be a string, this is {}", json::kind(other)))),
        None => None,
    };
    let read: &[&str] = match (row.get("messages"), row.get("conversations"), row.contains_key("instruction")) {
        (Some(_), Some(_), _) => {
            return Err(Reason::new("holds both `conversations` and `messages`: which one is meant?")
                .hint("remove one of the two"));
        }
        (Some(_), _, true) | (_, Some(_), true) => {
            return Err(Reason::new("holds both a dialogue and an `instruction`: which one is meant?")
                .hint("remove one of the two"));
        }
        (Some(_), ..) => &["messages"],
        (_, Some(_), _) => &["conversations"],
        _ => &["instruction", "input", "output", "history", "target"],
    };
    let mut conversation = match read {
        [name] => Conversation::of_turns(&row[*name], name)?,
        _ => of_instruction(super::record::parse(bytes, line)?),
    };
    // The record of an instruction has brought its system prompt along.
    if let ([_], Some(system)) = (read, system) {
        if conversation.messages.first().is_some_and(|first| role(first) == "system") {
            return Err(Reason::new("holds a system prompt among its turns beside the row's own `system`")
                .hint("remove one of the two"));
        }
        conversation.set_system(&system);
    }
    let is_known = |name: &String| read.contains(&name.as_str()) || name == "system" || learned::key(name).is_some();
    conversation.passed_over = row.keys().filter(|name| !is_known(name)).cloned().collect();
    conversation.tools = tools;
    Ok(conversation)
}

/// An instruction with its answer, and the turns before.
fn of_instruction(record: Record) -> Conversation {
    let mut conversation = Conversation::default();
    if let Some(system) = &record.system {
        conversation.say("system", system);
    }
    for (question, answer) in record.history.iter().chain([&(record.question, record.answer)]) {
        conversation.say("user", question);
        conversation.say(ASSISTANT, answer);
    }
    conversation
}

/// The tools of a row, which go to the template, and what else its keys say of learning.
fn said_of(row: &Map<String, Value>) -> (Option<Value>, Vec<Said>) {
    let mut tools = None;
    let mut said = Vec::new();
    for (name, value) in row {
        match learned::key(name) {
            Some(("tools", _)) => {
                // Some files hold the list as text.
                let parsed = value.as_str().and_then(|text| serde_json::from_str(text).ok());
                tools = Some(parsed.unwrap_or_else(|| value.clone())).filter(|value| !is_empty(value));
            }
            Some((_, About::Reasoning | About::Tools | About::Refusal)) | None => {}
            Some((name, about)) => said.push((name, about, value.clone())),
        }
    }
    (tools, said)
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_str().is_some_and(|text| text.trim().is_empty())
}

/// A turn as a message, and what it says of learning it.
fn message(turn: &Value) -> Result<(Value, Wish), Reason> {
    let Value::Object(turn) = turn else {
        return Err(Reason::new(format!("must be an object, it is {}", json::kind(turn))));
    };
    let mut message: Map<String, Value> =
        turn.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.clone(), value.clone())).collect();
    for (other, own) in [("from", "role"), ("value", "content")] {
        match (message.shift_remove(other), message.contains_key(own)) {
            (Some(_), true) => return Err(Reason::new(format!("has both `{other}` and `{own}`"))),
            (Some(value), false) => drop(message.insert(own.to_owned(), value)),
            (None, _) => {}
        }
    }
    let role = match message.get("role") {
        Some(Value::String(role)) => match role.to_ascii_lowercase().as_str() {
            "human" | "user" => "user".to_owned(),
            "gpt" | ASSISTANT => ASSISTANT.to_owned(),
            "system" => "system".to_owned(),
            _ => role.clone(),
        },
        Some(other) => return Err(Reason::new(format!("has {} as `role`", json::kind(other)))),
        None => return Err(Reason::new("has no `from` (or `role`)")),
    };
    match message.get("content") {
        Some(Value::String(_) | Value::Array(_) | Value::Object(_)) => {}
        Some(other) => return Err(Reason::new(format!("has {} as `content`", json::kind(other)))),
        None if message.contains_key("tool_calls") => {}
        None => return Err(Reason::new("has no `value` (or `content`)")),
    }
    message.insert("role".into(), Value::String(role));
    let (_, said) = said_of(&message);
    let wish = learned::wish(&said)?;
    Ok((Value::Object(message), wish))
}
