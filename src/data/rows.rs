//! Data files: which rows a file holds and where each stands.

use std::path::Path;

use super::brackets::value_end;
use super::conversation::{self, Conversation};
use super::json;
use super::reason::Reason;
use super::record::{Record, parse};
use super::split::{Split, split};
use crate::error::{Error, Result, shell_quoted};

/// A data file in memory, split into rows that are not parsed yet.
#[derive(Debug)]
pub struct RowFile {
    bytes: Vec<u8>,
    split: Split,
}

impl RowFile {
    /// Reads a JSON array or JSON lines, told by the content.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that is missing, empty or of another kind.
    pub fn read(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let invalid = |reason: Reason| {
            let hint = reason.hint.replace("FILE", &shell_quoted(&place)).replace("PATH", &format!("{place:?}"));
            Error::invalid(&place, reason.what).hint(hint)
        };
        if let Some(reason) = other_kind_by_name(path) {
            return Err(invalid(reason));
        }
        if path.is_dir() {
            let reason = Reason::new("is a folder, not a data file");
            return Err(invalid(reason.hint("name its files, or a pattern like folder/*.jsonl")));
        }
        let bytes = std::fs::read(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => invalid(Reason::new("does not exist")),
            _ => invalid(Reason::new(format!("cannot be read: {error}"))),
        })?;
        let mut file = Self::split(bytes).map_err(invalid)?;
        for (_, reason) in file.split.notes.iter_mut().chain(&mut file.split.broken) {
            reason.hint = reason.hint.replace("FILE", &shell_quoted(&place));
        }
        Ok(file)
    }

    /// Splits the content of a file into rows.
    fn split(bytes: Vec<u8>) -> std::result::Result<Self, Reason> {
        if let Some(reason) = other_kind_by_content(&bytes) {
            return Err(reason);
        }
        let mut start = 0;
        while bytes[start..].starts_with(b"\xef\xbb\xbf") {
            start += 3;
        }
        start += bytes[start..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        match bytes.get(start) {
            None => return Err(Reason::new("is empty")),
            Some(b'[' | b'{') => {}
            Some(b'\0') => {
                return Err(Reason::new("begins with NUL bytes, as files do whose writing a crash broke off")
                    .hint("fetch or write the file again"));
            }
            Some(b'/' | b'#') => {
                return Err(Reason::new("begins with a comment, which JSON does not have").hint("remove the comment"));
            }
            Some(_) => {
                return Err(Reason::new("is neither a JSON array nor JSON lines (it begins with no `[` or `{`)")
                    .hint("write one JSON object a line, or one array of objects, in UTF-8"));
            }
        }
        if let Some(reason) = python_list(&bytes[start..]) {
            return Err(reason);
        }
        let split = split(&bytes, start);
        let file = Self { bytes, split };
        if file.is_spread_over_lines() {
            return Err(Reason::new("holds JSON objects spread over several lines")
                .hint("write each object on one line, or put them into one array: jq -c . FILE"));
        }
        if file.split.rows.is_empty() && file.split.broken.is_none() {
            return Err(Reason::new("holds no rows"));
        }
        Ok(file)
    }

    /// Whether JSON lines begin with an object that the first line does not end and the second does not hold.
    fn is_spread_over_lines(&self) -> bool {
        let [(first, line), (second, next_line), ..] = self.split.rows.as_slice() else { return false };
        let first = self.bytes[first.clone()].trim_ascii();
        let goes_on = first.starts_with(b"{") && matches!(first.last(), Some(b'{' | b'[' | b',' | b':'));
        let second = &self.bytes[second.clone()];
        let is_whole = second.starts_with(b"{") && value_end(second, 0, b'\n') == Ok(second.len());
        goes_on && line < next_line && value_end(first, 0, b'\n').is_err() && !is_whole
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many rows it holds, bad ones included.
    pub fn len(&self) -> usize {
        self.split.rows.len()
    }

    /// Whether it holds no rows (only where the very first is cut off).
    pub fn is_empty(&self) -> bool {
        self.split.rows.is_empty()
    }

    /// The line of a row, from 1.
    pub fn line(&self, row: usize) -> u32 {
        self.split.rows[row].1
    }

    /// Parses a row.
    ///
    /// # Errors
    /// Why it is a bad row.
    pub fn record(&self, row: usize) -> std::result::Result<Record, Reason> {
        if let Some(reason) = self.split.missing.get(&row) {
            return Err(reason.clone());
        }
        let (range, line) = &self.split.rows[row];
        parse(&self.bytes[range.clone()], *line)
    }

    /// Parses a row as a conversation.
    ///
    /// # Errors
    /// Why it is a bad row.
    pub fn conversation(&self, row: usize) -> std::result::Result<Conversation, Reason> {
        if let Some(reason) = self.split.missing.get(&row) {
            return Err(reason.clone());
        }
        let (range, line) = &self.split.rows[row];
        conversation::parse(&self.bytes[range.clone()], *line)
    }

    /// The line from which on the rest of the file is not read, and why, if that is so. The file is at fault then, whatever
    /// number of bad rows is allowed.
    pub fn broken(&self) -> Option<&(u32, Reason)> {
        self.split.broken.as_ref()
    }

    /// What was read though it is not quite as it should be, each with the line where it was met first.
    pub fn notes(&self) -> &[(u32, Reason)] {
        &self.split.notes
    }
}

/// Python's own way to show lists and objects, whose strings other marks end than JSON's.
fn python_list(bytes: &[u8]) -> Option<Reason> {
    let inner = bytes.strip_prefix(b"[")?.trim_ascii_start();
    let key = inner.strip_prefix(b"{")?.trim_ascii_start();
    key.starts_with(b"'").then(|| Reason::new(json::SINGLE_QUOTES).hint(json::SINGLE_QUOTES_HINT))
}

const PYTHON: &str = "in Python: datasets.Dataset";

fn other_kind_by_name(path: &Path) -> Option<Reason> {
    let extension = path.extension()?.to_string_lossy().to_ascii_lowercase();
    let (what, hint) = match extension.as_str() {
        "parquet" => ("a Parquet file", format!("{PYTHON}.from_parquet(PATH).to_json(\"rows.jsonl\")")),
        "arrow" | "feather" => ("an Arrow file", format!("{PYTHON}.from_file(PATH).to_json(\"rows.jsonl\")")),
        "csv" | "tsv" => ("a table", format!("{PYTHON}.from_csv(PATH).to_json(\"rows.jsonl\")")),
        "xls" | "xlsx" => (
            "a spreadsheet",
            "in Python: pandas.read_excel(PATH).to_json(\"rows.jsonl\", \
                            orient=\"records\", lines=True)"
                .to_owned(),
        ),
        "gz" | "bz2" | "xz" | "zst" | "zip" | "7z" | "rar" | "tar" | "tgz" => {
            ("a compressed file", format!("unpack it first: {} FILE", unpacker(&extension)))
        }
        "pkl" | "pickle" | "pt" | "pth" | "npy" | "npz" => ("a Python object", "write it as JSON lines".to_owned()),
        "yaml" | "yml" | "toml" | "xml" | "html" => {
            ("no JSON file", "write one JSON object a line, or one array of objects".to_owned())
        }
        "db" | "sqlite" | "sqlite3" => ("a database", "write its rows as JSON lines".to_owned()),
        _ => return None,
    };
    Some(not_json(what, hint))
}

fn other_kind_by_content(bytes: &[u8]) -> Option<Reason> {
    if let Some(encoding) = other_encoding(bytes) {
        let (family, _) = encoding.split_at(6);
        let hint = format!("convert it: iconv -f {encoding} -t UTF-8 FILE > rows.jsonl");
        return Some(not_json(&format!("written in {family}, not in UTF-8"), hint));
    }
    let kinds: [(&[u8], &str, String); 8] = [
        (b"PAR1", "a Parquet file", format!("{PYTHON}.from_parquet(PATH).to_json(\"rows.jsonl\")")),
        (b"ARROW1", "an Arrow file", format!("{PYTHON}.from_file(PATH).to_json(\"rows.jsonl\")")),
        (b"\x1f\x8b", "a gzip file", "unpack it first: gunzip FILE".to_owned()),
        (b"PK\x03\x04", "a zip file", "unpack it first: unzip FILE".to_owned()),
        (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first: unzstd FILE".to_owned()),
        (b"\xfd7zXZ", "an xz file", "unpack it first: unxz FILE".to_owned()),
        (b"BZh", "a bzip2 file", "unpack it first: bunzip2 FILE".to_owned()),
        (b"version https://git-lfs", "only a pointer of git-lfs", "fetch the file itself: git lfs pull".to_owned()),
    ];
    let (_, what, hint) = kinds.into_iter().find(|(magic, ..)| bytes.starts_with(magic))?;
    Some(not_json(what, hint))
}

/// UTF-16 or UTF-32, told by its mark, or by the zeros beside the first character, which is of ASCII in JSON; in the
/// words of `iconv`, which reads the mark itself.
fn other_encoding(bytes: &[u8]) -> Option<&'static str> {
    let zeros: Vec<bool> = bytes.iter().take(4).map(|&byte| byte == 0).collect();
    match bytes {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some("UTF-16"),
        _ => match *zeros.as_slice() {
            [false, true, true, true] => Some("UTF-32LE"),
            [true, true, true, false] => Some("UTF-32BE"),
            [false, true, ..] => Some("UTF-16LE"),
            [true, false, ..] => Some("UTF-16BE"),
            _ => None,
        },
    }
}

fn not_json(what: &str, hint: String) -> Reason {
    Reason::new(format!("is {what}; Bellora reads JSON arrays and JSON lines")).hint(hint)
}

fn unpacker(extension: &str) -> &'static str {
    match extension {
        "gz" => "gunzip",
        "bz2" => "bunzip2",
        "xz" => "unxz",
        "zst" => "unzstd",
        "zip" => "unzip",
        "tar" | "tgz" => "tar -xf",
        _ => "7z x",
    }
}
