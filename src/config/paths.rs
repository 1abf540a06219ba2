//! The paths of a config: made absolute, globs expanded, and checked as far as a look at the folders goes.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::globs;
use super::problem::{Checked, Problem, problem};

/// Checks the folder of a base model.
pub(super) fn base(text: &str) -> Checked<PathBuf> {
    let path = absolute(text)?;
    if path.is_file() {
        let hint = match extension(&path) {
            "gguf" => {
                "GGUF files are not read: name the folder of the original model, with config.json and .safetensors"
            }
            _ => "name the folder that holds config.json and the .safetensors files",
        };
        return problem(format!("expected a folder, and {text:?} is a file"), hint);
    }
    match path.is_dir() {
        true => Ok(path),
        false => problem(format!("there is no folder {text:?}"), where_to_get(text, &path)),
    }
}

/// Checks the place of a tokenizer: a folder, a `tokenizer.json`, or a `.model` file.
pub(super) fn tokenizer(text: &str) -> Checked<PathBuf> {
    let path = absolute(text)?;
    if path.is_file() && !matches!(extension(&path), "json" | "model") {
        let what = format!("{text:?} is neither a folder, nor a tokenizer.json, nor a SentencePiece .model file");
        return problem(what, "name the folder that holds the tokenizer's files");
    }
    match path.exists() {
        true => Ok(path),
        false => problem(format!("there is no file or folder {text:?}"), where_to_get(text, &path)),
    }
}

/// Checks the folder of an adapter.
pub(super) fn adapter(text: &str) -> Checked<PathBuf> {
    let path = absolute(text)?;
    match (path.is_dir(), path.is_file()) {
        (true, _) => Ok(path),
        (_, true) => problem(
            format!("expected a folder, and {text:?} is a file"),
            "name the folder that holds adapter_config.json and adapter_model.safetensors",
        ),
        _ => problem(format!("there is no folder {text:?}"), where_to_get(text, &path)),
    }
}

/// Checks a template file.
pub(super) fn template(text: &str) -> Checked<PathBuf> {
    let path = absolute(text)?;
    match path.is_file() {
        true => Ok(path),
        false => problem(format!("there is no file {text:?}"), meant_from(text, &path)),
    }
}

/// Says what keeps a folder from being made or written. A file on the way down, or a folder of somebody else's, would make
/// every write below it fail.
pub(super) fn unwritable(path: &Path) -> Option<Problem> {
    let above = path.ancestors().find(|above| above.exists())?;
    let (what, hint) = if !above.is_dir() {
        (format!("expected a folder, and {} is a file", above.display()), "name another place")
    } else if access(above, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let what = format!("you may not write in {}", above.display());
        (what, "name another place, or have its owner let you write there")
    } else {
        return None;
    };
    Some(Problem { what, hint: hint.to_owned() })
}

/// Gives the data files that a path or a pattern stands for, those of a pattern sorted, and the folders that it matches.
pub(super) fn data_files(text: &str) -> Checked<globs::Found> {
    let path = absolute(text)?;
    if path.is_dir() {
        let pattern = format!("{}/*.jsonl", text.trim_end_matches('/'));
        let hint = format!("name its files: {pattern:?} takes all that end so");
        return problem(format!("expected files, and {text:?} is a folder"), hint);
    }
    if path.is_file() {
        return Ok(globs::Found { files: vec![path], folders: Vec::new() });
    }
    // A name that exists is taken as it is, even with brackets in it; the rest may be patterns.
    if !globs::is_pattern(text) {
        let hint = match is_hub_name(text) {
            true => "data sets are not downloaded: fetch the file and name its path".to_owned(),
            false => meant_from(text, &path),
        };
        return problem(format!("there is no file {text:?}"), hint);
    }
    if text.ends_with('/') {
        let hint = format!("name the files in them: {:?}", format!("{text}*.jsonl"));
        return problem(format!("expected files, and {text:?} stands for folders"), hint);
    }
    // Not the absolute path: brackets in the name of the working folder are no pattern.
    let mut found = globs::find(&expand_home(text))?;
    for file in &mut found.files {
        *file = absolute(&utf8(file)?)?;
    }
    match found.files.is_empty() {
        true => problem(format!("no file matches {text:?}"), no_match(text, &path, &found)),
        false => Ok(found),
    }
}

/// What to do about a pattern that nothing matches.
fn no_match(text: &str, path: &Path, found: &globs::Found) -> String {
    let is_hidden = |part: &&str| part.starts_with(['*', '?', '[']) && *part != "**";
    if let Some(folder) = found.folders.first() {
        return format!("{} is matched and is a folder: add /*.jsonl for the files in it", folder.display());
    }
    // Parts that exist as they are written are no patterns.
    let mut above = if text.starts_with('/') { PathBuf::from("/") } else { PathBuf::new() };
    let mut escaped = Vec::new();
    for part in text.split('/') {
        above.push(part);
        let is_pattern = part.contains('[') && above.symlink_metadata().is_err();
        escaped.push(if is_pattern { part.replace('[', "[[]") } else { part.to_owned() });
    }
    match escaped.join("/") {
        escaped if escaped != text => format!(
            "in a pattern, [ ] stand for one of the characters between them: write [[] for the bracket itself, as in \
             {escaped:?}"
        ),
        _ if text.split('/').any(|part| is_hidden(&part)) => {
            format!("{}; names that begin with a dot are left out", meant_from(text, path))
        }
        _ => meant_from(text, path),
    }
}

/// Gives the folder for tokenised data when the user names none: in the cache folder of the desktop convention (XDG).
pub(super) fn user_cache_dir() -> PathBuf {
    let configured = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let in_home = || std::env::home_dir().filter(|home| home.is_absolute()).map(|home| home.join(".cache"));
    configured.or_else(in_home).unwrap_or_else(std::env::temp_dir).join("bellora")
}

/// Reads `~/` as the user's folder, as a shell does.
fn expand_home(text: &str) -> PathBuf {
    match text.strip_prefix("~/").zip(std::env::home_dir()) {
        Some((below, home)) => home.join(below),
        None => PathBuf::from(text),
    }
}

/// Makes a path absolute.
pub(super) fn absolute(text: &str) -> Checked<PathBuf> {
    if text.trim().is_empty() {
        return problem("expected a path, found an empty text".to_owned(), "write a path, or leave the key out");
    }
    match std::path::absolute(expand_home(text)) {
        Ok(path) => utf8(&path).map(PathBuf::from),
        Err(error) => problem(format!("{text:?} cannot be made absolute: {error}"), ""),
    }
}

/// A file's own path, no link and no way round in it.
pub(super) fn real(file: &Path) -> PathBuf {
    file.canonicalize().unwrap_or_else(|_| file.to_path_buf())
}

/// The run's own config is text, so that only paths that are text can be kept.
fn utf8(path: &Path) -> Checked<String> {
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => problem(format!("{} is not UTF-8", path.display()), "rename it"),
    }
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|extension| extension.to_str()).unwrap_or_default()
}

/// Whether a text looks like `owner/name` on the Hugging Face hub rather than a path.
fn is_hub_name(text: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && !word.starts_with('.')
            && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/').is_some_and(|(owner, name)| is_word(owner) && is_word(name) && !Path::new(owner).exists())
}

fn where_to_get(text: &str, path: &Path) -> String {
    match is_hub_name(text) {
        true => {
            let name = text.rsplit('/').next().unwrap_or(text);
            format!(
                "if this is a name on the Hugging Face hub, download it \
                 (hf download {text} --local-dir models/{name}) and write \"models/{name}\""
            )
        }
        false => meant_from(text, path),
    }
}

fn meant_from(text: &str, path: &Path) -> String {
    let relative = "relative paths mean the working folder";
    let mut above = path.ancestors().skip(1);
    match above.find(|folder| folder.is_dir()) {
        Some(folder) if Path::new(text).is_absolute() => {
            format!("there is nothing of that name in {}: was it moved?", folder.display())
        }
        Some(folder) => format!("{relative}; it was looked for in {}", folder.display()),
        None => relative.to_owned(),
    }
}
