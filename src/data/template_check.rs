//! What a user's template file holds that may not be what the user means, held against the tokenizer it is used with.

use std::collections::BTreeSet;
use std::path::Path;

use super::template::Template;
use super::tokenizer::{SpecialTokens, Tokenizer};
use crate::error::{Fault, shell_quoted};

/// Says what may not be meant in a template that was read from `path`. None of it is a fault.
pub fn warnings(template: &Template, path: &Path, tokenizer: &Tokenizer) -> Vec<Fault> {
    let place = path.display().to_string();
    let mut warnings = Vec::new();
    // Each form is told once, at the first key that has it.
    let mut spelled_out = BTreeSet::new();
    let mut warn = |key: &str, what: String, hint: String| {
        let fault = Fault::new(format!("{place}: {key}"), what).hint(hint);
        if !warnings.contains(&fault) {
            warnings.push(fault);
        }
    };
    for (key, text) in first_strings(template) {
        if let Some(bos) = tokenizer.bos().and_then(|id| tokenizer.token(id)).filter(|bos| text.starts_with(bos)) {
            let what =
                format!("begins with {bos}, which the program puts before every prompt: it would stand there twice");
            warn(key, what, format!("remove {bos} from the template"));
        }
    }
    if let Some(eos) = tokenizer.token(tokenizer.eos()).filter(|eos| template.end.ends_with(eos)) {
        let what = format!("ends with {eos}: `end` stands before the answer, and the program puts {eos} after it");
        warn("end", what, format!("remove {eos} from `end`"));
    }
    for (key, text) in strings(template) {
        if text.contains('\r') {
            let what = "holds a carriage return (CR), which becomes part of every prompt".to_owned();
            let hint = format!(
                "a text over several lines has the line ends of its file, CR LF on Windows: sed -i 's/\\r$//' {}",
                shell_quoted(path)
            );
            warn(key, what, hint);
        }
        if let Some(escape) = ["\\n", "\\t", "\\r"].into_iter().find(|escape| text.contains(escape)) {
            let what = format!("holds a backslash and `{}` as two characters, not {}", &escape[1..], name(escape));
            warn(key, what, "in TOML write such texts in double quotes; single quotes keep every backslash".to_owned());
        }
        if let Some(placeholder) = placeholder(text) {
            let what =
                format!("holds {placeholder}, which stands in every prompt as it is: nothing is put in its place");
            let hint = format!("{key} = [what stands before the text, what stands behind it]");
            warn(key, what, hint);
        }
        for form in token_forms(text).filter(|form| !is_token(tokenizer, form)) {
            if !spelled_out.insert(form.to_owned()) {
                continue;
            }
            let n_tokens = tokenizer.encode(form, SpecialTokens::Special).map_or(0, |ids| ids.len());
            let what =
                format!("holds {form}, which is no token of this tokenizer: it is spelled out in {n_tokens} tokens");
            let hint =
                "name the tokenizer that has it, or write the template that the base was trained with".to_owned();
            warn(key, what, hint);
        }
    }
    warnings
}

/// The strings that a prompt may begin with, each with its key.
fn first_strings(template: &Template) -> Vec<(&'static str, &str)> {
    if !template.start.is_empty() {
        return vec![("start", &template.start)];
    }
    let system = template.system.as_ref().map(|[before, _]| ("system", before.as_str()));
    let only_user = Some(("only_user", &*template.only_user[0])).filter(|_| template.only_user != template.user);
    system.into_iter().chain([("user", &*template.user[0])]).chain(only_user).collect()
}

/// All strings, each with its key; those that another key has given are left out.
fn strings(template: &Template) -> Vec<(&'static str, &str)> {
    let Template { start, system, user, only_user, reply, end, stop, .. } = template;
    let mut strings = vec![("start", start)];
    strings.extend(system.iter().flatten().map(|text| ("system", text)));
    strings.extend(user.iter().map(|text| ("user", text)));
    strings.extend(only_user.iter().filter(|_| only_user != user).map(|text| ("only_user", text)));
    strings.extend(reply.iter().map(|text| ("reply", text)));
    strings.extend((*end != reply[0]).then_some(("end", end)));
    strings.extend(stop.iter().map(|text| ("stop", text)));
    strings.into_iter().map(|(key, text)| (key, text.as_str())).collect()
}

fn name(escape: &str) -> &'static str {
    match escape {
        "\\n" => "a line break",
        "\\t" => "a tab",
        _ => "a carriage return",
    }
}

/// What stands for a text in other programs' templates: `{instruction}`, `{{content}}`, `{{ message.content }}`, `{% if ...`.
fn placeholder(text: &str) -> Option<&str> {
    const NAMES: [&str; 14] = [
        "instruction",
        "input",
        "output",
        "question",
        "query",
        "answer",
        "response",
        "prompt",
        "content",
        "system",
        "system_message",
        "user",
        "assistant",
        "text",
    ];
    text.match_indices('{').find_map(|(at, _)| {
        let inner = &text[at + 1..];
        if inner.starts_with(['{', '%']) {
            let length = inner.find("}}").or_else(|| inner.find("%}"))?;
            return Some(&text[at..at + length + 3]);
        }
        let length = inner.find('}')?;
        NAMES.contains(&inner[..length].trim()).then_some(&text[at..at + length + 2])
    })
}

/// The parts of a text that are written as special tokens are: `<|im_start|>`, `<s>`, `</s>`, `<start_of_turn>`.
fn token_forms(text: &str) -> impl Iterator<Item = &str> {
    const NAMES: [&str; 14] = [
        "s",
        "/s",
        "bos",
        "eos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "start_of_turn",
        "end_of_turn",
        "endoftext",
        "sop",
        "eop",
    ];
    text.match_indices('<').filter_map(move |(at, _)| {
        let inner = &text[at + 1..];
        let end = inner.find('>')?;
        let (name, form) = (&inner[..end], &text[at..at + end + 2]);
        let is_between = |bar: char| name.len() > 2 * bar.len_utf8() && name.starts_with(bar) && name.ends_with(bar);
        let is_form = (is_between('|') || is_between('｜')) && !name.contains(char::is_whitespace);
        (is_form || NAMES.contains(&name)).then_some(form)
    })
}

fn is_token(tokenizer: &Tokenizer, form: &str) -> bool {
    let ids = tokenizer.encode(form, SpecialTokens::Special).unwrap_or_default();
    ids.iter().any(|id| tokenizer.token(*id).as_deref() == Some(form))
}
