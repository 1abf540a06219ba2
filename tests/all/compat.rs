//! The JSON files of public models: each is accepted, or refused by the name of what it has. `docs/compat.md` is made from
//! the same tables.
//!
//! `tests/compat/` has a file a model: its settings, where they come from (`source`), and what is to become of them
//! (`expected`: `accepted`, or words of the refusal; and words of each warning).

mod document;
mod stand_in;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bellora::data::Tokenizer;
use bellora::error::{Error, Fault};
use bellora::formats::model_keys::OTHER_ARCHITECTURES;
use bellora::model::arch;
use serde_json::{Value, json};

/// A file of `tests/compat/`.
struct Model(Value);

/// What became of a base or a tokenizer.
struct Outcome {
    refused: Option<Vec<Fault>>,
    warnings: Vec<Fault>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All models, by the names of their files.
fn models() -> Vec<Model> {
    let files = std::fs::read_dir(root().join("tests/compat")).unwrap().map(|entry| entry.unwrap().path());
    let files: BTreeSet<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "json")).collect();
    files.iter().map(|path| Model(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())).collect()
}

impl Model {
    fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap()
    }

    /// Writes those of the named files that the model has, and returns whether it has the first.
    fn write(&self, names: &[&str], folder: &Path) -> bool {
        for name in names {
            if let Some(content) = self.0.get(*name) {
                let content = if *name == "tokenizer_config" { &self.tokenizer_config() } else { content };
                std::fs::write(folder.join(format!("{name}.json")), content.to_string()).unwrap();
            }
        }
        self.0.get(names[0]).is_some()
    }

    /// The config of the tokenizer, with the tokens that `reserved_tokens` stands for: from an id to an id, numbered from.
    fn tokenizer_config(&self) -> Value {
        let mut config = self.0["tokenizer_config"].clone();
        for range in self.0["reserved_tokens"].as_array().into_iter().flatten() {
            let [first, last, number] = [0, 1, 2].map(|at| range[at].as_u64().unwrap());
            for id in first..=last {
                let content = format!("<|reserved_special_token_{}|>", number + id - first);
                config["added_tokens_decoder"][id.to_string()] = json!({
                    "content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
                    "special": true,
                });
            }
        }
        config
    }

    /// What the program says of the base, where the model has a `config.json`.
    fn base(&self) -> Option<Outcome> {
        let folder = tempfile::tempdir().unwrap();
        let has = self.write(&["config", "generation_config"], folder.path());
        has.then(|| match arch::load(folder.path(), &[]) {
            Ok(read) => Outcome { refused: None, warnings: read.warnings },
            Err(error) => refused(&error),
        })
    }

    /// What the program says of the tokenizer's folder, where a stand-in for its vocabulary is described.
    fn tokenizer(&self) -> Option<Outcome> {
        let stand_in = self.0.get("stand_in")?;
        let folder = tempfile::tempdir().unwrap();
        self.write(&["tokenizer_config", "special_tokens_map", "added_tokens"], folder.path());
        stand_in::write(stand_in, &self.tokenizer_config(), folder.path());
        Some(match Tokenizer::open(folder.path()) {
            Ok(tokenizer) => Outcome { refused: None, warnings: tokenizer.warnings().to_vec() },
            Err(error) => refused(&error),
        })
    }

    /// Where the outcome is another than the expected one; `part` is `base` or `tokenizer`.
    fn differs(&self, part: &str, outcome: Option<&Outcome>) -> Option<String> {
        let expected = &self.0["expected"];
        let (name, wanted) = (self.text("name"), &expected[part]);
        let Some(outcome) = outcome else {
            return (!wanted.is_null()).then(|| format!("{name}: {part}: nothing to judge"));
        };
        let words = |list: &Value| -> Vec<String> {
            list.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned()).collect()
        };
        let told = |faults: &[Fault]| faults.iter().map(Fault::in_one_line).collect::<Vec<_>>().join("\n");
        match &outcome.refused {
            None if wanted != "accepted" => Some(format!("{name}: {part}: accepted, not refused for {wanted}")),
            None => {
                let wanted = words(&expected[format!("{part}_warnings")]);
                let fits = wanted.len() == outcome.warnings.len()
                    && wanted.iter().zip(&outcome.warnings).all(|(word, fault)| fault.to_string().contains(word));
                (!fits).then(|| format!("{name}: {part}: warnings {wanted:?}, found:\n{}", told(&outcome.warnings)))
            }
            Some(faults) => {
                let (found, wanted) = (told(faults), words(wanted));
                let fits = !wanted.is_empty()
                    && wanted.iter().all(|word| found.contains(word.as_str()))
                    && faults.iter().all(|fault| !fault.hint.is_empty());
                (!fits).then(|| format!("{name}: {part}: refused for {wanted:?}, found:\n{found}"))
            }
        }
    }
}

#[track_caller]
fn refused(error: &Error) -> Outcome {
    assert_eq!(error.exit_code(), 2, "{error}");
    Outcome { refused: Some(error.faults().to_vec()), warnings: Vec::new() }
}

#[test]
fn compat_public_models_are_accepted_or_refused_by_the_name_of_what_they_have() {
    let judged: Vec<_> = models().into_iter().map(|model| (model.base(), model.tokenizer(), model)).collect();
    let differing: Vec<String> = judged
        .iter()
        .flat_map(|(base, tokenizer, model)| {
            [model.differs("base", base.as_ref()), model.differs("tokenizer", tokenizer.as_ref())]
        })
        .flatten()
        .collect();
    assert!(differing.is_empty(), "\n{}", differing.join("\n"));

    let names: BTreeSet<&str> = judged.iter().map(|(.., model)| model.text("name")).collect();
    assert_eq!(names.len(), judged.len(), "a model stands twice");
    let n_with = |accepted: bool| {
        judged.iter().filter(|(base, ..)| base.as_ref().is_some_and(|b| b.refused.is_none() == accepted)).count()
    };
    assert!(n_with(true) >= 20 && n_with(false) >= 20, "{} accepted, {} refused", n_with(true), n_with(false));

    let mut models: Vec<_> = judged.into_iter().map(|(base, tokenizer, model)| (model, base, tokenizer)).collect();
    models.sort_by_key(|(_, base, _)| base.as_ref().is_none_or(|base| base.refused.is_some()));
    let (page, path) = (document::page(&models), root().join("docs/compat.md"));
    if std::env::var_os("BELLORA_WRITE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let first = page.lines().zip(written.lines().chain(std::iter::repeat(""))).find(|(made, found)| made != found);
    assert!(page == written, "docs/compat.md is not what the tables say (BELLORA_WRITE_DOCS=1 writes it): {first:?}");
}

#[test]
fn compat_no_key_is_hidden_by_another() {
    for table in document::TABLES {
        for key in table.keys {
            let found = table.find(key.name).map(|found| found.name);
            assert_eq!(found, Some(key.name), "{}: {} is hidden by another key", table.file, key.name);
        }
        let names: BTreeSet<&str> = table.keys.iter().map(|key| key.name).collect();
        assert_eq!(names.len(), table.keys.len(), "{}: a key stands twice", table.file);
    }
    let names: BTreeSet<&str> = OTHER_ARCHITECTURES.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), OTHER_ARCHITECTURES.len(), "an architecture stands twice");
}
