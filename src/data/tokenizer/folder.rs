//! The files of a tokenizer's folder.

use std::path::Path;

use super::TokenizerFile;
use super::declared::{ADDED, CONFIG, MAP};
use crate::error::{Error, Fault, Result};

pub(super) const MODEL: &str = "tokenizer.model";
pub(super) const JSON: &str = "tokenizer.json";
/// The files that make a tokenizer's ids: either of two kinds, and those that declare tokens beside them.
const DECIDING: [&str; 5] = [MODEL, JSON, CONFIG, MAP, ADDED];
/// Files that other programs read beside a tokenizer: they travel with it.
const BESIDE: [&str; 4] = ["chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"];
/// The folder of further chat templates, which does not travel.
const MORE_TEMPLATES: &str = "additional_chat_templates";
/// A tokenizer's file is at most some ten megabytes; anything much larger is something else.
const MAX_BYTES: u64 = 256 << 20;

/// Whether ids depend on a file.
pub(super) fn decides_ids(name: &str) -> bool {
    DECIDING.contains(&name)
}

/// Reads what a folder holds of a tokenizer.
pub(super) fn read_files(folder: &Path) -> Result<Vec<TokenizerFile>> {
    let mut files = Vec::new();
    for name in DECIDING.iter().chain(&BESIDE).copied() {
        let path = folder.join(name);
        // A link to a file that is gone is no file that was never there.
        if path.is_file() || path.is_symlink() {
            files.push(TokenizerFile { name: name.to_owned(), bytes: read(&path)? });
        }
    }
    Ok(files)
}

/// The files without one of them.
pub(super) fn without(files: &[TokenizerFile], name: &str) -> Vec<TokenizerFile> {
    files.iter().filter(|file| file.name != name).cloned().collect()
}

/// What a folder holds beside a tokenizer that is left where it is.
pub(super) fn left_behind(folder: &Path) -> Option<Fault> {
    let path = folder.join(MORE_TEMPLATES);
    path.is_dir().then(|| {
        Fault::new(path.display().to_string(), "holds chat templates that do not travel with the adapter")
            .hint("copy the folder beside the exported model; chat_template.jinja is copied by itself")
    })
}

/// Says which files declare tokens or texts beside a `.model` file that is named by itself, for they are not read.
pub(super) fn not_read_beside(model: &Path, folder: &Path) -> Option<Fault> {
    let is_there = |name: &&str| ![MODEL, JSON].contains(name) && folder.join(name).is_file();
    let names: Vec<&str> = DECIDING.iter().chain(&BESIDE).copied().filter(|name| is_there(name)).collect();
    (!names.is_empty()).then(|| {
        let what = format!("is read by itself, without {} beside it", names.join(", "));
        Fault::new(model.display().to_string(), what)
            .hint("name the folder in model.tokenizer to have them read and copied")
    })
}

/// Reads a file of a tokenizer.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let place = path.display().to_string();
    if path.is_symlink() && !path.exists() {
        return Err(Error::invalid(&place, "is a link to a file that is not there")
            .hint("put that file back, or remove the link"));
    }
    let unreadable = |error: std::io::Error| Error::invalid(&place, format!("cannot be read: {error}"));
    if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_BYTES {
        return Err(Error::invalid(&place, "is too large to be a tokenizer's file"));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::invalid(&place, "is only a pointer of git-lfs").hint("fetch the file itself: git lfs pull"));
    }
    Ok(bytes)
}
