//! Chat templates: the Jinja text by which a model's own tokenizer writes a conversation, as Transformers'
//! `apply_chat_template` renders it, and which parts of the result are learned.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::conversation::{ASSISTANT, Conversation, role};
use super::reason::Reason;
use crate::choice::choice;
use crate::error::{Error, Result};

mod python;

choice! {
    /// Which answers of a conversation are learned.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    Answers {
        /// The last one.
        Last = "last",
        /// Every one.
        All = "all",
    }
}

/// A chat template with the tokens that it may name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatSource {
    /// Its text.
    pub chat_template: String,
    /// The special tokens by the names of `tokenizer_config.json`: `bos_token`, `eos_token`, ...
    pub special_tokens: BTreeMap<String, String>,
}

/// A chat template that is ready to render.
#[derive(Clone)]
pub struct ChatTemplate {
    source: ChatSource,
    environment: Arc<Environment<'static>>,
    /// What closes an answer; empty where nothing does.
    end_of_turn: String,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

/// A conversation as text, with the bytes of it that are learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The learned parts, ascending.
    pub learned: Vec<Range<usize>>,
    /// Whether the text of some message is not in it.
    pub lacks_text: bool,
}

/// The name under which an environment holds the template.
const NAME: &str = "chat_template";
/// They stand where `{% generation %}` begins and ends; no text has them.
const MARKS: [char; 2] = ['\u{10fffe}', '\u{10ffff}'];
/// What stands for a text that is to be found again.
const PLACEHOLDER: &str = "\u{1}A";

impl ChatTemplate {
    /// Compiles a template; `place` is the file that it comes from.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the line and the column of a mistake in it.
    pub fn new(source: ChatSource, place: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        python::set_up(&mut environment);
        let text = mark_generation(&source.chat_template);
        environment.add_template_owned(NAME, text.clone()).map_err(|error| {
            let at = place_in(&text, &source.chat_template, &error).map_or(String::new(), |at| format!("{at}: "));
            let said = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
            Error::invalid(place, format!("the chat template is no Jinja that is known here: {at}{said}"))
                .hint("mend it there, or name another by data.template = \"FILE.jinja\"")
        })?;
        let mut template = Self { source, environment: Arc::new(environment), end_of_turn: String::new() };
        template.end_of_turn = template.find_end_of_turn();
        Ok(template)
    }

    /// Reads a template from a file of its own.
    ///
    /// # Errors
    /// A file that cannot be read; as [`Self::new`].
    pub fn read(path: &Path, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        let place = path.display().to_string();
        let chat_template = std::fs::read_to_string(path)
            .map_err(|error| Error::invalid(&place, format!("the chat template cannot be read: {error}")))?;
        Self::new(ChatSource { chat_template, special_tokens }, &place)
    }

    /// What it was made of.
    pub fn source(&self) -> &ChatSource {
        &self.source
    }

    /// What closes an answer: `<|im_end|>`. Empty where nothing does.
    pub fn end_of_turn(&self) -> &str {
        &self.end_of_turn
    }

    /// The text of a conversation to be answered.
    ///
    /// # Errors
    /// What the template says of it.
    pub fn prompt(&self, conversation: &Conversation) -> std::result::Result<String, Reason> {
        let text = self.render(&conversation.messages, conversation, true)?;
        Ok(text.replace(MARKS, ""))
    }

    /// The text of a conversation, and what of it is learned: what each answer adds beyond its generation prompt, up to and with
    /// the token that ends its turn.
    ///
    /// # Errors
    /// A conversation without an answer to learn, or what the template says of it.
    pub fn learned(&self, conversation: &Conversation, answers: Answers) -> std::result::Result<Rendered, Reason> {
        let messages = &conversation.messages;
        let last = messages.iter().rposition(|message| role(message) == ASSISTANT);
        let last = last.ok_or_else(|| Reason::new("holds no answer of an assistant"))?;
        if messages.last().is_some_and(|message| role(message) == "user") {
            return Err(Reason::new("ends with a user turn: there is no reply to learn")
                .hint("remove the last turn, or add the reply"));
        }
        let is_learned = |&turn: &usize| {
            let is_wanted = answers == Answers::All || turn == last;
            role(&messages[turn]) == ASSISTANT && is_wanted && !conversation.is_left[turn]
        };
        let turns: Vec<usize> = (0..messages.len()).filter(is_learned).collect();
        if turns.is_empty() {
            return Err(Reason::new("says that its answer is not to be learned")
                .hint("remove the row, or let it have an answer to learn"));
        }
        let marked = self.render(messages, conversation, false)?;
        let (text, marks) = without_marks(&marked);
        let learned = match marks.is_empty() {
            // A mark a turn, in their order.
            false => {
                let all: Vec<usize> = (0..messages.len()).filter(|&turn| role(&messages[turn]) == ASSISTANT).collect();
                if marks.len() != all.len() {
                    let what = format!("has {} answers, and the chat template marks {} parts", all.len(), marks.len());
                    return Err(Reason::new(what).hint("one {% generation %} an answer, or none at all"));
                }
                let of_turn = |turn: &usize| all.iter().position(|one| one == turn).and_then(|at| marks.get(at));
                turns.iter().filter_map(of_turn).cloned().collect()
            }
            true => {
                turns.iter().map(|turn| self.find(&text, conversation, *turn)).collect::<std::result::Result<_, _>>()?
            }
        };
        let lacks =
            |message: &Value| message["content"].as_str().is_some_and(|content| !text.contains(last_line(content)));
        let lacks_text = messages.iter().any(lacks) || self.leaves_out_system(&marked, conversation);
        Ok(Rendered { text, learned, lacks_text })
    }

    /// Whether the text is the same whatever the system prompt says.
    fn leaves_out_system(&self, text: &str, conversation: &Conversation) -> bool {
        if conversation.messages.first().is_none_or(|first| role(first) != "system") {
            return false;
        }
        let mut other = conversation.clone();
        other.set_system(PLACEHOLDER);
        self.render(&other.messages, &other, false).is_ok_and(|other| other == text)
    }

    /// Where what an answer adds stands in the text.
    fn find(&self, text: &str, conversation: &Conversation, turn: usize) -> std::result::Result<Range<usize>, Reason> {
        let start = self.start(text, conversation, turn)?;
        let until = self.start_of_next(text, conversation, turn).unwrap_or(text.len());
        // What ends the turn, the last such token before the next message.
        let end = match text.get(start..until).and_then(|found| found.rfind(&self.end_of_turn)) {
            Some(at) if !self.end_of_turn.is_empty() => start + at + self.end_of_turn.len(),
            _ => until,
        };
        if start >= end {
            return Err(not_found(turn));
        }
        Ok(start..end)
    }

    /// Where the text begins that an answer adds to its generation prompt.
    fn start(&self, text: &str, conversation: &Conversation, turn: usize) -> std::result::Result<usize, Reason> {
        if let Some(start) = self.start_by_prompt(text, conversation, turn) {
            return Ok(start);
        }
        // The template writes what comes before otherwise when more follows. Then the answer's own text is looked for, and what
        // the template puts between the prompt and that (a space) is seen in a conversation without a system message.
        let content = self.start_of_content(text, conversation, turn).ok_or_else(|| not_found(turn))?;
        let mut plain = conversation.clone();
        if plain.messages.first().is_some_and(|first| role(first) == "system") {
            plain.messages.remove(0);
        }
        let between = self.render(&plain.messages, &plain, false).ok().and_then(|text| {
            let turn = turn - (conversation.messages.len() - plain.messages.len());
            let start = self.start_by_prompt(&text, &plain, turn)?;
            Some(self.start_of_content(&text, &plain, turn)?.saturating_sub(start))
        });
        Ok(content - between.unwrap_or(0).min(content))
    }

    /// Where a turn begins if all before it, rendered as a prompt, is how the text begins.
    fn start_by_prompt(&self, text: &str, conversation: &Conversation, turn: usize) -> Option<usize> {
        let prompt = self.render(conversation.messages.get(..turn)?, conversation, true).ok()?;
        text.starts_with(&prompt).then_some(prompt.len())
    }

    /// Where a turn's own text begins: where the text changes first if that turn says something else.
    fn start_of_content(&self, text: &str, conversation: &Conversation, turn: usize) -> Option<usize> {
        let mut messages = conversation.messages.clone();
        *messages.get_mut(turn)?.get_mut("content")? = json!(PLACEHOLDER);
        let other = self.render(&messages, conversation, false).ok()?;
        Some(common_prefix(text, &other)).filter(|common| *common < text.len())
    }

    /// Where what follows a turn begins: the next message, or that one's own text where the template writes a conversation that ends
    /// here in another way.
    fn start_of_next(&self, text: &str, conversation: &Conversation, turn: usize) -> Option<usize> {
        let next = conversation.messages.get(turn + 1)?;
        let so_far = self.render(&conversation.messages[..=turn], conversation, false).ok();
        if let Some(so_far) = so_far.filter(|so_far| text.starts_with(so_far.as_str())) {
            return Some(so_far.len());
        }
        let mut messages = conversation.messages[..=turn].to_vec();
        let mut other = next.clone();
        other["content"] = json!(PLACEHOLDER);
        messages.push(other);
        // Some templates write a last question, or what leads to it, in another way.
        if role(next) == "user" {
            messages.push(json!({ "role": ASSISTANT, "content": "\u{2}" }));
        }
        let other = self.render(&messages, conversation, false).ok()?;
        Some(common_prefix(text, &other))
    }

    /// The first special token behind an answer.
    fn find_end_of_turn(&self) -> String {
        let mut probe = Conversation::question("q");
        probe.say(ASSISTANT, PLACEHOLDER);
        let text = self.render(&probe.messages, &probe, false).unwrap_or_default();
        let (text, _) = without_marks(&text);
        let after = text.rfind(PLACEHOLDER).map_or("", |at| &text[at + PLACEHOLDER.len()..]);
        let eos = self.source.special_tokens.get("eos_token").filter(|eos| after.starts_with(eos.as_str()));
        match (eos, after.trim_start().starts_with('<').then(|| after.find('>')).flatten()) {
            (Some(eos), _) => eos.clone(),
            (None, Some(end)) => after[..=end].trim_start().to_owned(),
            (None, None) => String::new(),
        }
    }

    fn render(
        &self,
        messages: &[Value],
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> std::result::Result<String, Reason> {
        let mut context: BTreeMap<&str, Jinja> = self
            .source
            .special_tokens
            .iter()
            .map(|(name, token)| (name.as_str(), Jinja::from(token.as_str())))
            .collect();
        context.insert("messages", Jinja::from_serialize(messages));
        context.insert("add_generation_prompt", Jinja::from(add_generation_prompt));
        if let Some(tools) = &conversation.tools {
            context.insert("tools", Jinja::from_serialize(tools));
        }
        let template = self.environment.get_template(NAME);
        template.and_then(|template| template.render(context)).map_err(|error| refused(&error))
    }
}

/// Where a mistake is: `line 2, column 4`, both from 1, the column in characters. On a line that was changed for the marks no column
/// is given.
fn place_in(text: &str, original: &str, error: &minijinja::Error) -> Option<String> {
    let line = error.line()?;
    let column = error.range().and_then(|range| {
        let before = text.get(..range.start)?;
        let line_of = |text: &str| text.split('\n').nth(line - 1).map(str::to_owned);
        let is_there = before.matches('\n').count() + 1 == line && line_of(text) == line_of(original);
        is_there.then(|| before.chars().rev().take_while(|letter| *letter != '\n').count() + 1)
    });
    Some(column.map_or(format!("line {line}"), |column| format!("line {line}, column {column}")))
}

fn not_found(turn: usize) -> Reason {
    Reason::new(format!("turn {} cannot be found in the text that the chat template makes", turn + 1)).hint(
        "the template leaves it out, or writes it anew: remove the turn, or give another template by data.template",
    )
}

/// The reason that a template gives, or what it stumbled over.
fn refused(error: &minijinja::Error) -> Reason {
    let said = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    if error.kind() == ErrorKind::InvalidOperation && said.starts_with(python::RAISED) {
        let said = &said[python::RAISED.len()..];
        return Reason::new(format!("is refused by the chat template: {said}"))
            .hint("write the row as the model's template wants it, or give another by data.template");
    }
    let at = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    Reason::new(format!("cannot be written by the chat template: {said}{at}"))
        .hint("the row lacks something that the template reads, or holds it in another form")
}

/// Bytes that two texts begin with alike, whole characters only.
fn common_prefix(a: &str, b: &str) -> usize {
    let alike = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    (0..=alike).rev().find(|&at| a.is_char_boundary(at)).unwrap_or(0)
}

/// The last line of a text that has anything in it, without the white space around it.
fn last_line(text: &str) -> &str {
    text.trim().lines().next_back().unwrap_or_default().trim()
}

/// Puts marks in place of `{% generation %}` and `{% endgeneration %}`, in blocks, so that white space goes as around those.
fn mark_generation(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start + 2..].find("%}").map(|end| start + 2 + end + 2) else { break };
        let tag = &rest[start..end];
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        let mark = ["generation", "endgeneration"].iter().position(|name| *name == inner);
        out.push_str(&rest[..start]);
        match mark {
            Some(mark) => {
                let sign = |at: usize| tag[at..].chars().next().filter(|sign| ['-', '+'].contains(sign));
                let (before, after) = (sign(2), sign(tag.len() - 3));
                out.push_str("{%");
                out.extend(before);
                out.push_str(" if true %}");
                out.push(MARKS[mark]);
                out.push_str("{% endif ");
                out.extend(after);
                out.push_str("%}");
            }
            None => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// A text without the marks, and the parts that they enclose.
fn without_marks(marked: &str) -> (String, Vec<Range<usize>>) {
    let (mut text, mut parts, mut begun) = (String::with_capacity(marked.len()), Vec::new(), None);
    for letter in marked.chars() {
        match MARKS.iter().position(|mark| *mark == letter) {
            Some(0) => begun = Some(text.len()),
            Some(_) => parts.extend(begun.take().map(|start| start..text.len())),
            None => text.push(letter),
        }
    }
    (text, parts)
}
