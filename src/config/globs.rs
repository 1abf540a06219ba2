//! The files that a pattern stands for, as a shell and Python's glob read it: `*`, `?` and `[ ]` within a name, `**` for
//! folders in folders, and no name that begins with a dot unless the pattern's part names the dot.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};

use super::problem::{Checked, Problem, problem};

/// What a pattern stands for.
#[derive(Default)]
pub(super) struct Found {
    /// The files, part by part in alphabetical order.
    pub(super) files: Vec<PathBuf>,
    /// Folders that a pattern's last part matches; their files are not taken.
    pub(super) folders: Vec<PathBuf>,
}

const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Whether a text holds a pattern.
pub(super) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// Finds what a pattern stands for. A part that exists as it is written is no pattern, even with brackets in it.
pub(super) fn find(pattern: &Path) -> Checked<Found> {
    let mut found = Found::default();
    let parts: Vec<Component<'_>> = pattern.components().collect();
    walk(PathBuf::new(), &parts, &mut found)?;
    found.files.sort();
    found.files.dedup();
    Ok(found)
}

fn walk(folder: PathBuf, parts: &[Component<'_>], found: &mut Found) -> Checked<()> {
    let Some((part, rest)) = parts.split_first() else { return take(folder, found) };
    let literal = folder.join(part);
    let text = match part {
        Component::Normal(name) => name.to_str().filter(|name| is_pattern(name)),
        _ => None,
    };
    let Some(text) = text else {
        return if rest.is_empty() || is_folder(&literal)? { walk(literal, rest, found) } else { Ok(()) };
    };
    if text == "**" {
        let mut folders = Vec::new();
        below(folder, &mut BTreeSet::new(), &mut folders)?;
        let is_last = rest.is_empty();
        for folder in folders {
            // At the end it takes the files of all folders.
            let rest = if is_last { &[Component::Normal(OsStr::new("*"))] } else { rest };
            walk_within_all(folder, rest, is_last, found)?;
        }
        return Ok(());
    }
    if literal.symlink_metadata().is_ok() {
        return walk(literal, rest, found);
    }
    let pattern = Pattern::new(text).map_err(|error| Problem {
        what: format!("{text:?} is not a pattern: {error}"),
        hint: "* stands for any part of a name; write [[] for a bracket itself".to_owned(),
    })?;
    for name in names(&folder)? {
        let path = folder.join(&name);
        if name.to_str().is_some_and(|name| pattern.matches_with(name, OPTIONS))
            && (rest.is_empty() || is_folder(&path)?)
        {
            walk(path, rest, found)?;
        }
    }
    Ok(())
}

/// As [`walk`]; the folders that end a `**` are taken by it, so that none of them is passed over.
fn walk_within_all(folder: PathBuf, rest: &[Component<'_>], is_last: bool, found: &mut Found) -> Checked<()> {
    let n_folders = found.folders.len();
    walk(folder, rest, found)?;
    if is_last {
        found.folders.truncate(n_folders);
    }
    Ok(())
}

/// A folder and all folders in it, but for hidden ones. Links are followed, each folder is met once on a way down.
fn below(folder: PathBuf, above: &mut BTreeSet<PathBuf>, folders: &mut Vec<PathBuf>) -> Checked<()> {
    let own = if folder.as_os_str().is_empty() { Path::new(".") } else { folder.as_path() };
    let Ok(real) = own.canonicalize() else { return Ok(()) };
    if !above.insert(real.clone()) {
        return Ok(());
    }
    for name in names(&folder)? {
        let path = folder.join(&name);
        if !name.as_encoded_bytes().starts_with(b".") && is_folder(&path)? {
            below(path, above, folders)?;
        }
    }
    above.remove(&real);
    folders.push(folder);
    Ok(())
}

/// Whether a folder is there; one that cannot be looked at is not passed over.
fn is_folder(path: &Path) -> Checked<bool> {
    match path.metadata() {
        Ok(data) => Ok(data.is_dir()),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            problem(format!("{} cannot be opened: {error}", path.display()), OPEN_IT)
        }
        Err(_) => Ok(false),
    }
}

const OPEN_IT: &str = "change its permissions, or name files that leave it out";

/// The names in a folder, sorted.
fn names(folder: &Path) -> Checked<Vec<std::ffi::OsString>> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let read = || -> std::io::Result<Vec<_>> {
        std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
    };
    let mut names = read().map_err(|error| Problem {
        what: format!("the folder {} cannot be read: {error}", folder.display()),
        hint: OPEN_IT.to_owned(),
    })?;
    names.sort();
    Ok(names)
}

fn take(path: PathBuf, found: &mut Found) -> Checked<()> {
    match path.metadata() {
        Ok(data) if data.is_file() => found.files.push(path),
        Ok(data) if data.is_dir() => found.folders.push(path),
        Ok(_) => {
            return problem(format!("{} is matched and is no file", path.display()), "name files that leave it out");
        }
        // A part without wildcards at the end names what need not be there in every folder.
        Err(_) if path.symlink_metadata().is_err() => {}
        Err(error) => {
            let hint = "remove it, or put back what it links to";
            return problem(format!("{} is matched and cannot be opened: {error}", path.display()), hint);
        }
    }
    Ok(())
}
