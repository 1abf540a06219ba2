//! What the JSON files beside a tokenizer say: tokens, with their flags, and how texts are encoded.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::TokenizerFile;
use super::special::Added;
use crate::error::{Error, Fault, Result};
use crate::formats::json;
use crate::formats::keys::{is_neutral, short};
use crate::formats::tokenizer_keys::{SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG};

pub(super) const CONFIG: &str = TOKENIZER_CONFIG.file;
pub(super) const MAP: &str = SPECIAL_TOKENS_MAP.file;
pub(super) const ADDED: &str = "added_tokens.json";

/// What `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say.
#[derive(Debug, Default)]
pub(super) struct Declared {
    /// Every token of theirs once; those with an id first, by id, then the others in the order they were named.
    pub(super) added: Vec<Added>,
    /// Tokens under keys of the model's own, with their places: special where the vocabulary holds them.
    pub(super) if_known: Vec<(String, Added)>,
    pub(super) bos: Option<String>,
    /// The place where `bos_token` is null, if no file names one: nothing stands before a text then.
    pub(super) null_bos: Option<String>,
    pub(super) eos: Option<String>,
    /// The place where `eos_token` is null, if no file names one.
    pub(super) null_eos: Option<String>,
    pub(super) pad: Option<String>,
    /// `add_bos_token`, where it is said.
    pub(super) add_bos: Option<bool>,
    /// `legacy`, where it is said.
    pub(super) legacy: Option<bool>,
    /// `add_prefix_space`, where it is said.
    pub(super) add_prefix_space: Option<bool>,
    /// `tokenizer_class`, without the ending `Fast`.
    pub(super) class: Option<String>,
    /// The Python class that `auto_map` names for the tokenizer.
    pub(super) own_code: Option<String>,
    /// What the files say that is passed over or may not be meant.
    pub(super) warnings: Vec<Fault>,
}

/// The names under which the files keep single special tokens, in the order in which new ones take their ids.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The keys of lists of special tokens.
const LISTS: [&str; 3] = ["additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"];

/// Classes that are Python code of a model's own and encode otherwise than the files say, with what they do.
const OTHER_CLASSES: [(&str, &str); 3] = [
    ("ChatGLMTokenizer", "puts [gMASK] and sop before every text"),
    ("ChatGLM4Tokenizer", "puts [gMASK] and <sop> before every text"),
    ("QWenTokenizer", "reads a vocabulary of tiktoken's kind"),
];

impl Declared {
    /// Reads the declaring files among `files`; `place` is the tokenizer's folder, for messages.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that is not JSON, a key whose value is of the wrong type, a setting that is
    /// refused, a token with two ids or an id with two tokens.
    pub(super) fn read(files: &[TokenizerFile], place: &str) -> Result<Self> {
        let config = object(files, CONFIG, place)?;
        let map = object(files, MAP, place)?;
        let numbered = object(files, ADDED, place)?;
        let mut reader = Reader { by_text: BTreeMap::new(), faults: Vec::new(), place };

        match config.get("added_tokens_decoder") {
            None | Some(Value::Null) => {}
            Some(Value::Object(decoder)) => {
                for (key, token) in decoder {
                    let id = key.parse::<u32>().ok().filter(|_| token.get("content").is_some_and(Value::is_string));
                    match id {
                        Some(id) => reader.numbered(id, token),
                        None => reader.fault(CONFIG, format!("added_tokens_decoder has a bad entry `{key}`")),
                    }
                }
            }
            Some(other) => reader.wrong(CONFIG, "added_tokens_decoder", "an object of ids and tokens", other),
        }
        for (text, id) in &numbered {
            match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) => reader.add(Added::special(text, Some(id)), ADDED),
                None => reader.fault(ADDED, format!("the id of `{text}` is not a whole number")),
            }
        }

        // A config of the newer kind, with its own list of added tokens, goes before the map; the older kind after it.
        let mut order = [(CONFIG, &config), (MAP, &map)];
        if !config.contains_key("added_tokens_decoder") {
            order.reverse();
        }
        let mut named: BTreeMap<&str, Added> = BTreeMap::new();
        for key in NAMED {
            for (file, values) in order {
                if let Some(token) = values.get(key).and_then(|value| reader.token(file, key, value)) {
                    named.entry(key).or_insert(token);
                }
            }
        }
        let mut tokens: Vec<Added> = NAMED.iter().filter_map(|key| named.get(key).cloned()).collect();
        for key in LISTS {
            for (file, values) in order {
                tokens.extend(values.get(key).into_iter().flat_map(|value| reader.list(file, key, value)));
            }
        }
        let mut new: Vec<Added> = Vec::new();
        for token in tokens {
            if let Some(known) = reader.by_text.get_mut(&token.text) {
                known.special = true;
                if !known.has_flags {
                    known.lstrip |= token.lstrip;
                    known.rstrip |= token.rstrip;
                    known.single_word |= token.single_word;
                }
            } else if new.iter().all(|other| other.text != token.text) {
                new.push(token);
            }
        }
        let mut if_known = Vec::new();
        for (file, values) in order {
            for (key, value) in values {
                if key.ends_with("_token") && !NAMED.contains(&key.as_str()) && key != "fill_token" && value.is_string()
                {
                    if_known.extend(reader.token(file, key, value).map(|t| (format!("{place}/{file}: {key}"), t)));
                }
            }
        }

        let text = |key| named.get(key).map(|token: &Added| token.text.clone());
        let null = |key: &str| {
            let is_null = |values: &Map<String, Value>| values.get(key).is_some_and(Value::is_null);
            let at = order.iter().find(|(_, values)| is_null(values)).filter(|_| !named.contains_key(key));
            at.map(|(file, _)| format!("{place}/{file}: {key}"))
        };
        let mut declared = Self {
            bos: text("bos_token"),
            null_bos: null("bos_token"),
            eos: text("eos_token"),
            null_eos: null("eos_token"),
            pad: text("pad_token"),
            if_known,
            ..Self::default()
        };
        declared.read_settings(&config, &mut reader);
        declared.warnings.extend(TOKENIZER_CONFIG.warnings(&config, &format!("{place}/{CONFIG}")));
        declared.warnings.extend(SPECIAL_TOKENS_MAP.warnings(&map, &format!("{place}/{MAP}")));
        declared.added = reader.finish()?;
        declared.added.extend(new);
        Ok(declared)
    }

    /// Reads what `tokenizer_config.json` says of encoding.
    fn read_settings(&mut self, config: &Map<String, Value>, reader: &mut Reader<'_>) {
        self.add_bos = reader.flag(config, "add_bos_token");
        self.legacy = reader.flag(config, "legacy");
        self.add_prefix_space = reader.flag(config, "add_prefix_space");
        if reader.flag(config, "add_eos_token") == Some(true) {
            let what = "is true; here the token follows every answer and never a prompt";
            let hint = "set it to false, so that programs that use the adapter do not end the prompt with it";
            self.warnings.push(Fault::new(reader.key(CONFIG, "add_eos_token"), what).hint(hint));
        }
        if reader.flag(config, "split_special_tokens") == Some(true) {
            let hint = "set it to false; data.special_tokens = \"text\" takes special tokens of the rows as text";
            reader.refuse(CONFIG, "split_special_tokens", "special tokens as plain text everywhere are not done", hint);
        }
        if reader.flag(config, "do_lower_case") == Some(true) {
            let hint = "set it to false, or write the rows in lower case";
            reader.refuse(CONFIG, "do_lower_case", "texts are not put in lower case here", hint);
        }
        match config.get("sp_model_kwargs") {
            None | Some(Value::Null) => {}
            Some(Value::Object(settings)) => {
                for name in ["enable_sampling", "reverse", "add_bos", "add_eos", "emit_unk_piece"] {
                    if let Some(value) = settings.get(name).filter(|value| !is_neutral(value)) {
                        let what = format!("{name} is {}: texts would be encoded otherwise", short(value));
                        reader.refuse(CONFIG, "sp_model_kwargs", &what, "remove it from the file");
                    }
                }
            }
            Some(other) => reader.wrong(CONFIG, "sp_model_kwargs", "an object", other),
        }
        match config.get("tokenizer_class") {
            None | Some(Value::Null) => {}
            Some(Value::String(class)) => self.class = Some(class.strip_suffix("Fast").unwrap_or(class).to_owned()),
            Some(other) => reader.wrong(CONFIG, "tokenizer_class", "a class's name", other),
        }
        let code = match config.get("auto_map") {
            Some(Value::Object(map)) => map.get("AutoTokenizer"),
            other => other,
        };
        self.own_code = code.and_then(|code| match code {
            Value::Array(classes) => classes.iter().rev().find_map(Value::as_str).map(str::to_owned),
            code => code.as_str().map(str::to_owned),
        });
        let class = self.class.as_deref().unwrap_or_default();
        if let Some((_, does)) = OTHER_CLASSES.iter().find(|(name, _)| *name == class) {
            let what = format!("{class} is Python code of its own that {does}");
            let hint = "Bellora trains Llama-family models; give a base whose tokenizer is of Llama's kind";
            reader.refuse(CONFIG, "tokenizer_class", &what, hint);
        }
    }

    /// Adds a warning where the class that the files name may encode otherwise; with a SentencePiece model that is every
    /// class that is not Llama's or general.
    pub(super) fn judge_class(&mut self, place: &str, of_sentencepiece: bool) {
        const LIKE_LLAMAS: [&str; 6] = [
            "LlamaTokenizer",
            // As the first files of Llama spell it.
            "LLaMATokenizer",
            "CodeLlamaTokenizer",
            "PreTrainedTokenizer",
            "TokenizersBackend",
            "SentencePieceBackend",
        ];
        if let Some(code) = &self.own_code {
            let what = format!("names the Python code {code} for the tokenizer; it is neither run nor copied");
            let hint = "texts are encoded as the tokenizer's file says: hold some ids against those of that code";
            self.warnings.push(Fault::new(format!("{place}/{CONFIG}: auto_map"), what).hint(hint));
        } else if let Some(class) = &self.class
            && of_sentencepiece
            && !LIKE_LLAMAS.contains(&class.as_str())
        {
            let what = format!("is {class}; the tokenizer.model is encoded as LlamaTokenizer does");
            let hint = "hold some ids against those of that class, or give its tokenizer.json as model.tokenizer";
            self.warnings.push(Fault::new(format!("{place}/{CONFIG}: tokenizer_class"), what).hint(hint));
        }
    }

    /// Moves the tokens under keys of the model's own that `is_known` to those that are added; the others are a warning.
    pub(super) fn take_known(&mut self, is_known: impl Fn(&str) -> bool) {
        for (place, token) in std::mem::take(&mut self.if_known) {
            if self.added.iter().any(|other| other.text == token.text) {
                continue;
            }
            if is_known(&token.text) {
                self.added.push(token);
            } else {
                let what = format!("names `{}`, which the vocabulary does not hold; it is not added", token.text);
                let hint = "if texts use it, name it in additional_special_tokens";
                self.warnings.push(Fault::new(place, what).hint(hint));
            }
        }
    }
}

/// Collects tokens with ids and what is wrong with the files.
struct Reader<'a> {
    by_text: BTreeMap<String, Added>,
    faults: Vec<Fault>,
    place: &'a str,
}

impl Reader<'_> {
    fn key(&self, file: &str, key: &str) -> String {
        format!("{}/{file}: {key}", self.place)
    }

    fn fault(&mut self, file: &str, what: String) {
        let hint = "the tokenizer's files are damaged or do not belong together: download them again";
        self.faults.push(Fault::new(format!("{}/{file}", self.place), what).hint(hint));
    }

    fn refuse(&mut self, file: &str, key: &str, what: &str, hint: &str) {
        self.faults.push(Fault::new(self.key(file, key), what).hint(hint));
    }

    fn wrong(&mut self, file: &str, key: &str, wanted: &str, found: &Value) {
        self.refuse(
            file,
            key,
            &format!("is {}, not {wanted}", short(found)),
            &format!("write {wanted}, or remove the key"),
        );
    }

    /// A setting that is on, off or not said.
    fn flag(&mut self, config: &Map<String, Value>, key: &str) -> Option<bool> {
        match config.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::Bool(value)) => Some(*value),
            Some(other) => {
                self.wrong(CONFIG, key, "true or false", other);
                None
            }
        }
    }

    /// A named token, as a string or as an object with flags; null and an empty string mean that there is none.
    fn token(&mut self, file: &str, key: &str, value: &Value) -> Option<Added> {
        match value {
            Value::Null => None,
            Value::String(text) => (!text.is_empty()).then(|| Added::special(text, None)),
            Value::Object(token) if token.get("content").is_some_and(Value::is_string) => {
                let mut token = self.flagged(file, key, token);
                token.special = true;
                (!token.text.is_empty()).then_some(token)
            }
            other => {
                self.wrong(file, key, "a token (a string, or an object with `content`)", other);
                None
            }
        }
    }

    fn list(&mut self, file: &str, key: &str, value: &Value) -> Vec<Added> {
        match value {
            Value::Null => Vec::new(),
            Value::Array(tokens) => tokens.iter().filter_map(|token| self.token(file, key, token)).collect(),
            Value::Object(tokens) => tokens.values().filter_map(|token| self.token(file, key, token)).collect(),
            other => {
                self.wrong(file, key, "a list of tokens", other);
                Vec::new()
            }
        }
    }

    /// An entry of `added_tokens_decoder`.
    fn numbered(&mut self, id: u32, token: &Value) {
        if let Some(token) = token.as_object() {
            let token = self.flagged(CONFIG, "added_tokens_decoder", token);
            self.add(Added { id: Some(id), has_flags: true, ..token }, CONFIG);
        }
    }

    /// The token of an object with `content`.
    fn flagged(&mut self, file: &str, key: &str, token: &Map<String, Value>) -> Added {
        let mut flag = |name: &str| match token.get(name) {
            None | Some(Value::Null) => None,
            Some(Value::Bool(value)) => Some(*value),
            Some(other) => {
                self.wrong(file, &format!("{key}: {name}"), "true or false", other);
                None
            }
        };
        let special = flag("special");
        Added {
            text: token.get("content").and_then(Value::as_str).unwrap_or_default().to_owned(),
            id: None,
            special: special.unwrap_or(false),
            has_flags: false,
            lstrip: flag("lstrip").unwrap_or(false),
            rstrip: flag("rstrip").unwrap_or(false),
            single_word: flag("single_word").unwrap_or(false),
            normalized: flag("normalized").unwrap_or(special == Some(false)),
        }
    }

    fn add(&mut self, token: Added, file: &str) {
        match self.by_text.get(&token.text) {
            Some(old) if old.id != token.id => {
                let (old, new) = (old.id.unwrap_or_default(), token.id.unwrap_or_default());
                self.fault(file, format!("token `{}` has the id {new} here and {old} in another place", token.text));
            }
            Some(_) => {}
            None => {
                self.by_text.insert(token.text.clone(), token);
            }
        }
    }

    fn finish(self) -> Result<Vec<Added>> {
        let Self { by_text, mut faults, place } = self;
        let mut added: Vec<Added> = by_text.into_values().collect();
        added.sort_by_key(|token| token.id);
        for pair in added.windows(2).filter(|pair| pair[0].id == pair[1].id) {
            let id = pair[0].id.unwrap_or_default();
            let what = format!("tokens `{}` and `{}` have the same id {id}", pair[0].text, pair[1].text);
            faults.push(Fault::new(place, what));
        }
        if faults.is_empty() { Ok(added) } else { Err(Error::Invalid(faults)) }
    }
}

fn object(files: &[TokenizerFile], name: &str, place: &str) -> Result<Map<String, Value>> {
    let Some(file) = files.iter().find(|file| file.name == name) else {
        return Ok(Map::new());
    };
    json::object(&file.bytes, &format!("{place}/{name}"))
}
