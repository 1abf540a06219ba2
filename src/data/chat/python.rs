//! What chat templates expect of Jinja as Transformers sets it up: Python's methods and way of writing values, and its own
//! functions.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

/// What an error begins with that a template has raised itself.
pub(super) const RAISED: &str = "raised: ";

/// Adds them to an environment.
pub(super) fn set_up(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out: &mut Output, _: &State, value: &Value| Ok(out.write_str(&written(value))?));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| written(value));
}

/// A value as Python's `str` writes it.
fn written(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Seq | ValueKind::Map => repr(value),
        _ => value.to_string(),
    }
}

/// A value as Python's `repr` writes it.
fn repr(value: &Value) -> String {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::String => {
            let text = value.to_string();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            let mut out = String::from(quote);
            for letter in text.chars() {
                match letter {
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    '\\' => out.push_str("\\\\"),
                    _ if letter == quote => out.extend(['\\', quote]),
                    _ => out.push(letter),
                }
            }
            out.push(quote);
            out
        }
        ValueKind::Seq => format!("[{}]", items().map(|item| repr(&item)).collect::<Vec<_>>().join(", ")),
        ValueKind::Map => {
            let entry = |key: Value| format!("{}: {}", repr(&key), repr(&value.get_item(&key).unwrap_or_default()));
            format!("{{{}}}", items().map(entry).collect::<Vec<_>>().join(", "))
        }
        _ => written(value),
    }
}

/// JSON as Python's `json.dumps` writes it, letters as they are.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let _: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, format!("a value is no JSON: {error}")))?;
    let style = Style { indent, ensure_ascii: ensure_ascii == Some(true), sort_keys: sort_keys == Some(true) };
    let mut out = String::new();
    style.write(&value, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

struct Style {
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Style {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Array(items) if !items.is_empty() => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    self.separate(at, depth + 1, out);
                    self.write(item, depth + 1, out);
                }
                self.close(depth, out);
                out.push(']');
            }
            serde_json::Value::Object(entries) if !entries.is_empty() => {
                out.push('{');
                let mut entries: Vec<_> = entries.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                for (at, (key, value)) in entries.into_iter().enumerate() {
                    self.separate(at, depth + 1, out);
                    self.string(key, out);
                    out.push_str(": ");
                    self.write(value, depth + 1, out);
                }
                self.close(depth, out);
                out.push('}');
            }
            serde_json::Value::String(text) => self.string(text, out),
            other => out.push_str(&other.to_string()),
        }
    }

    fn separate(&self, at: usize, depth: usize, out: &mut String) {
        match (at, self.indent) {
            (0, None) => {}
            (_, None) => out.push_str(", "),
            (_, Some(indent)) => {
                out.push_str(if at == 0 { "\n" } else { ",\n" });
                out.push_str(&" ".repeat(indent * depth));
            }
        }
    }

    fn close(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent * depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        let json = serde_json::Value::from(text).to_string();
        // serde_json writes DEL as it is, as Python does; it writes no other letter in another way.
        if !self.ensure_ascii {
            out.push_str(&json);
            return;
        }
        for letter in json.chars() {
            if letter.is_ascii() {
                out.push(letter);
                continue;
            }
            for unit in letter.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
}

/// The time of this machine by a format of C's `strftime`.
fn strftime_now(format: String) -> Result<String, Error> {
    let mut out = String::new();
    let written = write!(out, "{}", chrono::Local::now().format(&format));
    let unknown = |_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {format:?} is no format"));
    written.map(|()| out).map_err(unknown)
}
