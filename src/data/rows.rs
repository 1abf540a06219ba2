//! Data files: which rows a file holds and where each stands.

use std::ops::Range;
use std::path::Path;

use super::record::{Reason, Record, parse};
use crate::error::{Error, Result};

/// The bytes of a row and its line.
type RowPlace = (Range<usize>, u32);

/// A data file in memory, split into rows that are not parsed yet.
#[derive(Debug)]
pub struct RowFile {
    bytes: Vec<u8>,
    rows: Vec<RowPlace>,
    /// The line and the reason why rows after the last one could not be told apart.
    broken: Option<(u32, Reason)>,
}

impl RowFile {
    /// Reads a JSON array or JSON lines, told by the content.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a file that is missing, empty or of another kind.
    pub fn read(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let invalid = |reason: Reason| Error::invalid(&place, reason.what).hint(reason.hint);
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
        Self::split(bytes).map_err(invalid)
    }

    /// Splits the content of a file into rows.
    fn split(bytes: Vec<u8>) -> std::result::Result<Self, Reason> {
        if let Some(reason) = other_kind_by_content(&bytes) {
            return Err(reason);
        }
        let start = if bytes.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        let first = bytes[start..].iter().copied().find(|byte| !byte.is_ascii_whitespace());
        let (rows, broken) = match first {
            None => return Err(Reason::new("is empty")),
            Some(b'[') => array_rows(&bytes, start),
            Some(b'{') => (line_rows(&bytes, start), None),
            Some(_) => {
                return Err(Reason::new("is neither a JSON array nor JSON lines (it begins with no `[` or `{`)")
                    .hint("write one JSON object a line, or one array of objects, in UTF-8"));
            }
        };
        if let Some((row, _)) = rows.first()
            && rows.len() > 1
            && bytes[row.clone()].trim_ascii() == b"{"
        {
            return Err(Reason::new("holds JSON objects spread over several lines")
                .hint("write each object on one line, or put them into one array: jq -c . FILE"));
        }
        if rows.is_empty() && broken.is_none() {
            return Err(Reason::new("holds no rows"));
        }
        Ok(Self { bytes, rows, broken })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many rows it holds, bad ones included.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether it holds no rows (only where the very first is cut off).
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The line of a row, from 1.
    pub fn line(&self, row: usize) -> u32 {
        self.rows[row].1
    }

    /// Parses a row.
    ///
    /// # Errors
    /// Why it is a bad row.
    pub fn record(&self, row: usize) -> std::result::Result<Record, Reason> {
        let (range, line) = &self.rows[row];
        parse(&self.bytes[range.clone()], *line)
    }

    /// Where and why the file broke off, if it did.
    pub fn broken(&self) -> Option<&(u32, Reason)> {
        self.broken.as_ref()
    }
}

fn line_rows(bytes: &[u8], start: usize) -> Vec<RowPlace> {
    let mut rows = Vec::new();
    let mut at = start;
    for (line, text) in (1u32..).zip(bytes[start..].split(|&byte| byte == b'\n')) {
        if !text.trim_ascii().is_empty() {
            rows.push((at..at + text.len(), line));
        }
        at += text.len() + 1;
    }
    rows
}

/// Finds the elements of the array by brackets and quotes alone; each is parsed by itself later.
fn array_rows(bytes: &[u8], start: usize) -> (Vec<RowPlace>, Option<(u32, Reason)>) {
    let (mut rows, mut line, mut depth) = (Vec::new(), 1, 0usize);
    let (mut in_string, mut escaped, mut closed) = (false, false, false);
    let mut row: Option<(usize, u32)> = None;
    for (at, &byte) in bytes.iter().enumerate().skip(start) {
        if byte == b'\n' {
            line += 1;
        }
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        if byte.is_ascii_whitespace() {
            continue;
        }
        if closed {
            let reason = Reason::new("there is more after the array's closing bracket");
            return (rows, Some((line, reason.hint("a data file is one array, or one object a line"))));
        }
        if depth == 1 && byte == b'}' {
            let reason = Reason::new("there is a `}` that closes nothing").hint("check the row before it");
            return (rows, Some((line, reason)));
        }
        let ends = depth == 1 && matches!(byte, b',' | b']');
        if ends {
            match row.take() {
                Some((from, line)) => rows.push((from..at, line)),
                None if byte == b']' && rows.is_empty() => {}
                None => {
                    let reason = Reason::new(format!("there is no row before this `{}`", char::from(byte)));
                    return (rows, Some((line, reason.hint("remove the extra comma"))));
                }
            }
        } else if depth >= 1 && row.is_none() {
            row = Some((at, line));
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth -= 1,
            _ => {}
        }
        closed = depth == 0;
    }
    let broken = (!closed).then(|| {
        let reason = Reason::new("the array is never closed: the file is cut off, or a quote or bracket is missing");
        (row.map_or(line, |(_, line)| line), reason.hint("check this row and what follows it"))
    });
    (rows, broken)
}

const PYTHON: &str = "in Python: datasets.Dataset";

fn other_kind_by_name(path: &Path) -> Option<Reason> {
    let extension = path.extension()?.to_string_lossy().to_ascii_lowercase();
    let (what, hint) = match extension.as_str() {
        "parquet" => ("a Parquet file", format!("{PYTHON}.from_parquet(FILE).to_json(\"rows.jsonl\")")),
        "arrow" | "feather" => ("an Arrow file", format!("{PYTHON}.from_file(FILE).to_json(\"rows.jsonl\")")),
        "csv" | "tsv" => ("a table", format!("{PYTHON}.from_csv(FILE).to_json(\"rows.jsonl\")")),
        "xls" | "xlsx" => (
            "a spreadsheet",
            "in Python: pandas.read_excel(FILE).to_json(\"rows.jsonl\", \
                            orient=\"records\", lines=True)"
                .to_owned(),
        ),
        "gz" | "bz2" | "xz" | "zst" | "zip" | "7z" | "rar" | "tar" | "tgz" => {
            ("a compressed file", format!("unpack it first: {}", unpacker(&extension)))
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
    let kinds: [(&[u8], &str, String); 10] = [
        (b"PAR1", "a Parquet file", format!("{PYTHON}.from_parquet(FILE).to_json(\"rows.jsonl\")")),
        (b"ARROW1", "an Arrow file", format!("{PYTHON}.from_file(FILE).to_json(\"rows.jsonl\")")),
        (b"\x1f\x8b", "a gzip file", "unpack it first: gunzip".to_owned()),
        (b"PK\x03\x04", "a zip file", "unpack it first: unzip".to_owned()),
        (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first: unzstd".to_owned()),
        (b"\xfd7zXZ", "an xz file", "unpack it first: unxz".to_owned()),
        (b"BZh", "a bzip2 file", "unpack it first: bunzip2".to_owned()),
        (b"\xff\xfe", "written in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8".to_owned()),
        (b"\xfe\xff", "written in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8".to_owned()),
        (b"version https://git-lfs", "only a pointer of git-lfs", "fetch the file itself: git lfs pull".to_owned()),
    ];
    let (_, what, hint) = kinds.into_iter().find(|(magic, ..)| bytes.starts_with(magic))?;
    Some(not_json(what, hint))
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
