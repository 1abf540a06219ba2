//! The tables of `docs/config.md`, made from the program's own table of keys.

use std::fmt::Write as _;
use std::path::Path;

use bellora::config::{Fallback, KEYS, Key};

fn fallback(key: &Key) -> String {
    match key.fallback {
        Fallback::Required(_) => "required".to_owned(),
        Fallback::Is(text) if text.starts_with('[') || (key.values)().contains(&format!("`{text}`")) => {
            format!("`{text}`")
        }
        Fallback::Is(text) | Fallback::Computed(text) | Fallback::Off(text) => text.to_owned(),
    }
}

/// The table of a section.
fn table(section: &str) -> String {
    let mut table = "| key | values | default | meaning |\n|---|---|---|---|\n".to_owned();
    for key in KEYS.iter().filter(|key| key.section == section) {
        let (values, fallback, help) = ((key.values)(), fallback(key), key.help.trim());
        writeln!(table, "| `{}` | {values} | {fallback} | {help} |", key.field).unwrap();
    }
    table
}

/// A page whose tables, each the first thing below the heading of its section, are made anew.
fn with_tables(page: &str) -> String {
    let (mut made, mut section) = (String::new(), None);
    for line in page.lines().filter(|line| !line.starts_with('|')) {
        made += &format!("{line}\n");
        match line.strip_prefix("## [").and_then(|rest| rest.strip_suffix(']')) {
            Some(name) => section = Some(name),
            None => made += &section.take().map(table).unwrap_or_default(),
        }
    }
    made
}

#[test]
fn the_docs_list_every_key_as_the_table_has_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/config.md");
    let written = std::fs::read_to_string(&path).unwrap();
    let made = with_tables(&written);
    if std::env::var_os("BELLORA_WRITE_DOCS").is_some() {
        std::fs::write(&path, &made).unwrap();
        return;
    }
    let first = made.lines().zip(written.lines().chain(std::iter::repeat(""))).find(|(made, found)| made != found);
    assert!(made == written, "docs/config.md is not what KEYS says (BELLORA_WRITE_DOCS=1 writes it): {first:?}");
    for key in KEYS {
        assert!(made.contains(&format!("\n| `{}` | ", key.field)), "docs/config.md has no section for {}", key.name);
        assert!(!key.help.contains('|') && key.help.ends_with('.'), "{}: {:?}", key.name, key.help);
    }
}
