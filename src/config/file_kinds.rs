//! The kinds of values that name files and folders.

use std::collections::BTreeSet;
use std::path::{Path as FilePath, PathBuf};

use super::kinds::{Kind, Named, list, quoted};
use super::problem::Checked;
use super::raw::Value;
use super::reader::GivenKey;
use super::{TemplateChoice, paths};

/// A path: which, in the docs, what it names, and what makes it absolute or gives its fault.
pub(super) struct Path(pub(super) &'static str, pub(super) Named, pub(super) fn(&str) -> Checked<PathBuf>);

impl Kind<PathBuf> for Path {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<PathBuf> {
        match given.text().map(self.2) {
            Some(checked) => given.checked(checked),
            None => given.unexpected("a path in quotes"),
        }
    }

    /// The paths of a config were found to be UTF-8 when it was resolved.
    fn print(&self, value: &PathBuf) -> Option<String> {
        Some(shown(value))
    }

    fn values(&self) -> String {
        self.0.to_owned()
    }

    fn named(&self) -> Named {
        self.1
    }
}

/// A path or glob, or a list of them, that stand for files; each file is taken once.
pub(super) struct Files;

impl Kind<Vec<PathBuf>> for Files {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<Vec<PathBuf>> {
        let patterns = match (given.value(), given.text()) {
            (Value::List(items), _) => items.clone(),
            (_, Some(text)) => vec![Value::Text(text.to_owned())],
            (found, None) => vec![found.clone()],
        };
        if patterns.is_empty() && given.is_required() {
            return given.unexpected("at least one file");
        }
        let (mut files, mut twice, mut known) = (Vec::new(), Vec::new(), BTreeSet::new());
        for pattern in &patterns {
            let found = match pattern {
                Value::Text(text) => given.checked(paths::data_files(text)),
                other => given.unexpected_part("paths or globs in quotes", other),
            };
            let found = found.unwrap_or_default();
            for folder in found.folders {
                let what = format!("{} is a folder: the files in it are not taken", folder.display());
                given.warn(what, "name them too: /**/ in a pattern stands for folders in folders");
            }
            for file in found.files {
                // Links and ways round through other folders lead to the same file.
                if known.insert(paths::real(&file)) {
                    files.push(file);
                } else {
                    twice.push(file);
                }
            }
        }
        if let Some(first) = twice.first() {
            let more = match twice.len() {
                1 => " is".to_owned(),
                n => format!(" and {} more are", n - 1),
            };
            let what = format!("{}{more} named or matched twice: each file is taken once", first.display());
            given.warn(what, "to have rows count more, copy their file");
        }
        Some(files)
    }

    fn print(&self, value: &Vec<PathBuf>) -> Option<String> {
        Some(list(value.iter().map(|file| shown(file))))
    }

    fn values(&self) -> String {
        "files, globs".to_owned()
    }

    fn named(&self) -> Named {
        Named::Files
    }
}

/// A template's name or file.
pub(super) struct Template;

impl Kind<TemplateChoice> for Template {
    fn read(&self, given: &mut GivenKey<'_, '_>) -> Option<TemplateChoice> {
        let Some(text) = given.text() else {
            return given.unexpected("the name of a template or the path of a template file");
        };
        match text {
            "alpaca" => Some(TemplateChoice::Alpaca),
            "chinese-alpaca" => Some(TemplateChoice::ChineseAlpaca),
            "chat" => Some(TemplateChoice::Chat),
            text if FilePath::new(text)
                .extension()
                .is_some_and(|extension| ["toml", "jinja"].iter().any(|known| extension == *known)) =>
            {
                given.checked(paths::template(text)).map(TemplateChoice::File)
            }
            text => {
                let what = format!(
                    "expected \"alpaca\", \"chinese-alpaca\", \"chat\" or the path of a .toml or .jinja file, found {text:?}"
                );
                let near = given.value_hint(text, &["alpaca", "chinese-alpaca", "chat"]);
                given.fault(what, near.unwrap_or("a format of your own is written as a template file".to_owned()));
                None
            }
        }
    }

    fn print(&self, value: &TemplateChoice) -> Option<String> {
        Some(match value {
            TemplateChoice::Alpaca => quoted("alpaca"),
            TemplateChoice::ChineseAlpaca => quoted("chinese-alpaca"),
            TemplateChoice::Chat => quoted("chat"),
            TemplateChoice::File(file) => shown(file),
        })
    }

    fn values(&self) -> String {
        "`alpaca`, `chinese-alpaca`, `chat`, `.toml` or `.jinja` file".to_owned()
    }

    fn named(&self) -> Named {
        Named::Files
    }
}

fn shown(path: &FilePath) -> String {
    quoted(&path.to_string_lossy())
}
