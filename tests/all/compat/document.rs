//! `docs/compat.md`, made from the tables of keys and from what became of the public models' files.

use std::fmt::Write as _;

use bellora::error::Fault;
use bellora::formats::keys::{Effect, Key, KeyTable};
use bellora::formats::model_keys::{ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, OTHER_ARCHITECTURES};
use bellora::formats::tokenizer_keys::{ADDED_TOKENS, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_JSON};
use bellora::model::arch::ARCHITECTURES;

use super::{Model, Outcome};

/// The files whose keys are listed, in this order.
pub(super) const TABLES: &[&KeyTable] = &[
    &CONFIG,
    &GENERATION_CONFIG,
    &TOKENIZER_CONFIG,
    &SPECIAL_TOKENS_MAP,
    &ADDED_TOKENS,
    &TOKENIZER_JSON,
    &ADAPTER_CONFIG,
];

const BEGINNING: &str = "\
# Public models: which files are read, and what becomes of each key

This page is made by a test (`tests/all/compat.rs`) from the tables that the program itself reads by, and from what the
program says of the files in `tests/compat/`. After a change to either, write it again:

    BELLORA_WRITE_DOCS=1 cargo test --release compat

Bellora trains models whose `config.json` has one of the `model_type`s below. Every key of a file is one of four things:

- **honoured:** it is read, and what it says is done.
- **harmless:** it says nothing about what is computed here.
- **refused:** it is read, and the file is refused unless the key is off.
- **unknown:** it is in no table. A value that says nothing (`null`, `false`, 0, 1, empty) is passed over. Any other value is
  named in a warning. A number in `config.json` is refused, for it may be a factor of some product; if it has no effect, set
  `model.allow_config_keys` to the key's name.

A name that ends in `*` stands for all keys that begin so.

## Architectures

| `model_type` | class | models |
|---|---|---|
";

const PUBLIC: &str = "
## Public models

The settings of these files are those of the public models. Vocabularies are stand-ins of the same size, with the special
tokens at their places; weights are not looked at. The last column says where a file's contents were compared. \"Tokenizer\"
is the folder given as `model.tokenizer`; a dash means that it is not listed.
";

const OTHERS: &str = "
## Other architectures

They are refused by `model_type`, and the message says what they have that those above have not. A `model_type` that is not in
this table is refused too.

| `model_type` | has |
|---|---|
";

/// The whole page.
pub(super) fn page(models: &[(Model, Option<Outcome>, Option<Outcome>)]) -> String {
    let mut page = BEGINNING.to_owned();
    for architecture in ARCHITECTURES {
        let cells = [format!("`{}`", architecture.class), architecture.models.to_owned()];
        row(&mut page, &format!("`{}`", architecture.model_type), &cells);
    }
    page += PUBLIC;
    page += "\n| model | `config.json` | tokenizer | compared |\n|---|---|---|---|\n";
    for (model, base, tokenizer) in models {
        let cells = [said(base.as_ref()), said(tokenizer.as_ref()), model.text("source").to_owned()];
        row(&mut page, model.text("name"), &cells);
    }
    for table in TABLES {
        let _ = write!(page, "\n## `{}`\n\n| key | | note |\n|---|---|---|\n", table.file);
        keys(&mut page, table.keys);
        if table.file == CONFIG.file {
            for architecture in ARCHITECTURES {
                let _ = write!(
                    page,
                    "\nOf a `{}` also these:\n\n| key | | note |\n|---|---|---|\n",
                    architecture.model_type
                );
                keys(&mut page, architecture.keys);
            }
        }
    }
    page += OTHERS;
    for (name, has) in OTHER_ARCHITECTURES {
        row(&mut page, &format!("`{name}`"), &[has.to_owned()]);
    }
    page
}

fn keys(page: &mut String, keys: &[Key]) {
    for key in keys {
        let effect = match key.effect {
            Effect::Honoured => "honoured",
            Effect::Harmless => "harmless",
            Effect::Refused => "refused",
        };
        row(page, &format!("`{}`", key.name), &[effect.to_owned(), key.note.to_owned()]);
    }
}

fn row(page: &mut String, first: &str, others: &[String]) {
    let cells: Vec<String> =
        [first].into_iter().chain(others.iter().map(String::as_str)).map(|cell| cell.replace('|', "\\|")).collect();
    let _ = writeln!(page, "| {} |", cells.join(" | "));
}

/// What became of a file, in a cell.
fn said(outcome: Option<&Outcome>) -> String {
    let faults = |faults: &[Fault]| faults.iter().map(in_file).collect::<Vec<_>>().join("; ");
    match outcome {
        None => "-".to_owned(),
        Some(Outcome { refused: Some(refused), .. }) => format!("refused: {}", faults(refused)),
        Some(Outcome { warnings, .. }) if warnings.is_empty() => "accepted".to_owned(),
        Some(Outcome { warnings, .. }) => format!("accepted with a warning: {}", faults(warnings)),
    }
}

/// A fault by its place within the folder.
fn in_file(fault: &Fault) -> String {
    let place = fault.place.rsplit('/').next().unwrap_or_default();
    match place.split_once(": ") {
        Some((_, key)) => format!("`{key}`: {}", fault.what),
        None if place.contains('.') && !place.starts_with('.') => format!("`{place}` {}", fault.what),
        None => fault.what.clone(),
    }
}
