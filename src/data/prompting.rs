//! What writes a row as text: strings around its parts, or the model's own chat template.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::chat::{ChatSource, ChatTemplate};
use super::template::Template;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// A template of either kind, ready for use.
#[derive(Debug, Clone)]
pub enum Prompting {
    /// Strings around the parts of a row.
    Strings(Box<Template>),
    /// A chat template.
    Chat(ChatTemplate),
}

/// A template of either kind as a file keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SavedTemplate {
    /// Strings around the parts of a row.
    Strings(Box<Template>),
    /// A chat template.
    Chat(ChatSource),
}

impl From<Template> for Prompting {
    fn from(template: Template) -> Self {
        Self::Strings(Box::new(template))
    }
}

impl Prompting {
    /// Reads a file of the user's: strings (`.toml`) or a chat template (`.jinja`), which may name the tokenizer's special tokens.
    ///
    /// # Errors
    /// As [`Template::read`] and [`ChatTemplate::read`].
    pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        match path.extension().is_some_and(|extension| extension == "jinja") {
            true => ChatTemplate::read(path, special_tokens(tokenizer)).map(Self::Chat),
            false => Template::read(path).map(Self::from),
        }
    }

    /// What a file keeps of it.
    pub fn saved(&self) -> SavedTemplate {
        match self {
            Self::Strings(template) => SavedTemplate::Strings(template.clone()),
            Self::Chat(template) => SavedTemplate::Chat(template.source().clone()),
        }
    }

    /// Texts at which generation stops, beside the end-of-text token.
    pub fn stop(&self) -> Vec<String> {
        match self {
            Self::Strings(template) => template.stop.clone(),
            Self::Chat(template) => {
                Some(template.end_of_turn().to_owned()).filter(|end| !end.is_empty()).into_iter().collect()
            }
        }
    }

    /// The chat template that a tokenizer's own files hold.
    ///
    /// # Errors
    /// [`Error::Invalid`] where they hold none, or one that is no Jinja.
    pub fn of_tokenizer(tokenizer: &Tokenizer) -> Result<Self> {
        let config = json_file(tokenizer, "tokenizer_config.json");
        let file = tokenizer.files().iter().find(|file| file.name == "chat_template.jinja");
        let (chat_template, place) = match (file, config.get("chat_template")) {
            // Where both are there the file counts, as in Transformers.
            (Some(file), _) => (String::from_utf8_lossy(&file.bytes).into_owned(), "chat_template.jinja"),
            (None, Some(Value::String(text))) => (text.clone(), CONFIG),
            (None, Some(Value::Array(named))) => (default_of(named)?, CONFIG),
            _ => {
                let what = format!("\"chat\" is asked for, and there is no chat template beside {}", tokenizer.place());
                return Err(Error::invalid("data.template", what).hint(
                    "base models often have none: give the path of a .jinja file, such as the chat_template.jinja of the model's \
                     instruct version, or of a .toml file",
                ));
            }
        };
        let source = ChatSource { chat_template, special_tokens: special_tokens(tokenizer) };
        let place = Path::new(tokenizer.place()).with_file_name(place).display().to_string();
        Ok(Self::Chat(ChatTemplate::new(source, &place)?))
    }
}

impl SavedTemplate {
    /// Makes it ready for use; `place` is the file that keeps it.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn open(&self, place: &str) -> Result<Prompting> {
        Ok(match self {
            Self::Strings(template) => Prompting::Strings(template.clone()),
            Self::Chat(source) => Prompting::Chat(ChatTemplate::new(source.clone(), place)?),
        })
    }
}

/// The place of a template that a tokenizer's settings hold.
const CONFIG: &str = "tokenizer_config.json: chat_template";

/// The template named `default` of a list of named ones.
fn default_of(named: &[Value]) -> Result<String> {
    let is_default = |one: &&Value| one["name"] == "default";
    let found = named.iter().find(is_default).and_then(|one| one["template"].as_str());
    found.map(str::to_owned).ok_or_else(|| {
        let names: Vec<String> = named.iter().map(|one| one["name"].to_string()).collect();
        Error::invalid(CONFIG, format!("names several templates ({}), and none is \"default\"", names.join(", ")))
            .hint("write the one that is meant into a .jinja file, and give its path as data.template")
    })
}

/// The special tokens of a tokenizer's files by their names there; those that are null are left out.
pub fn special_tokens(tokenizer: &Tokenizer) -> BTreeMap<String, String> {
    let mut tokens = BTreeMap::new();
    let mut known = Vec::new();
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        for (key, value) in json_file(tokenizer, name).iter().filter(|(key, _)| key.ends_with("_token")) {
            let text = value.as_str().or_else(|| value["content"].as_str());
            if let Some(text) = text.filter(|_| !known.contains(key)) {
                tokens.insert(key.clone(), text.to_owned());
            }
            known.push(key.clone());
        }
    }
    // A bare model file says nothing, and the tokenizer knows.
    let own = [("bos_token", tokenizer.bos()), ("eos_token", Some(tokenizer.eos()))];
    for (name, id) in own.into_iter().filter(|(name, _)| !known.iter().any(|key| key == name)) {
        if let Some(token) = id.and_then(|id| tokenizer.token(id)) {
            tokens.insert(name.to_owned(), token);
        }
    }
    tokens
}

/// A JSON file of a tokenizer's; empty where there is none.
fn json_file(tokenizer: &Tokenizer, name: &str) -> Map<String, Value> {
    let file = tokenizer.files().iter().find(|file| file.name == name);
    file.and_then(|file| serde_json::from_slice(&file.bytes).ok()).unwrap_or_default()
}
