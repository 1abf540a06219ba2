//! Encoding the rows of data files into one table, on all threads, or finding that table in the token cache.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::cache::{self, Ids, Table, TokenCache};
use super::cache_room::{make_room, note_use};
use super::chat::Answers;
use super::encode::{Encoded, Encoder, Failure, Truncation};
use super::reason::{Reason, place, row_fault};
use super::rows::RowFile;
use super::tokenizer::SpecialTokens;
use crate::error::{Error, Fault, Result};
use crate::progress::Work;

/// Which samples to load and how.
#[derive(Debug, Clone)]
pub struct DataSpec {
    /// The data files, in order.
    pub files: Vec<PathBuf>,
    /// Tokens a sample may have.
    pub max_length: usize,
    /// What becomes of a longer one.
    pub truncation: Truncation,
    /// What becomes of special tokens in a sample's text.
    pub special_tokens: SpecialTokens,
    /// Which answers of a conversation are learned.
    pub answers: Answers,
    /// How many bad rows are passed over; one more is an error.
    pub max_bad_rows: usize,
}

/// What the token cache keeps beside the samples.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Summary {
    pub(super) rows: usize,
    pub(super) bad_rows: usize,
    /// The first bad rows.
    pub(super) bad: Vec<Bad>,
    pub(super) dropped: usize,
    /// The first samples dropped (or, where that is an error, too long): file, line, tokens.
    pub(super) too_long: Vec<(u32, u32, usize)>,
    pub(super) cut: usize,
    pub(super) with_special: usize,
    pub(super) with_no_answer: usize,
    /// Keys of rows that are passed over, and how many rows have each; the first [`N_KEYS`] of them.
    pub(super) passed_over: BTreeMap<String, usize>,
    /// Samples whose rows hold text that the template leaves out, and where the first of them stands: file and line.
    #[serde(default)]
    pub(super) lacking_text: usize,
    #[serde(default)]
    pub(super) first_lacking: Option<(u32, u32)>,
    /// Samples whose rows ask to have earlier answers learned too, and where the first of them stands: file and line.
    pub(super) asking_for_earlier: usize,
    pub(super) first_asking: Option<(u32, u32)>,
    /// What was read though it is not quite as it should be.
    pub(super) noted: Vec<Bad>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Bad {
    file: u32,
    line: u32,
    what: String,
    hint: String,
}

impl Bad {
    fn new(file: u32, line: u32, reason: Reason) -> Self {
        Self { file, line, what: reason.what, hint: reason.hint }
    }

    fn fault(&self, paths: &[PathBuf]) -> Fault {
        let reason = Reason::new(self.what.as_str()).hint(self.hint.as_str());
        row_fault(&paths[self.file as usize], self.line, &reason)
    }
}

/// How many bad rows are named one by one.
const N_NAMED: usize = 20;
/// How many keys that are passed over are counted: a file may have others in every row.
const N_KEYS: usize = 64;
/// Rows that one thread encodes at a time, and how many such pieces are in memory at once.
const CHUNK_ROWS: usize = 256;
const WINDOW_CHUNKS: usize = 256;

/// Samples that are ready for use.
pub(super) struct Loaded {
    pub(super) table: Table,
    pub(super) summary: Summary,
    /// Whether they were in the token cache.
    pub(super) from_cache: bool,
    /// Why they could not be kept there, where that is no error.
    pub(super) unkept: Option<Fault>,
}

/// Finds the samples in the cache or encodes them.
///
/// # Errors
/// See [`super::Dataset::load`].
pub(super) fn load(spec: &DataSpec, encoder: &Encoder<'_>, token_cache: TokenCache<'_>) -> Result<Loaded> {
    let cached = token_cache.folder().and_then(|folder| {
        let sums: Option<Vec<u128>> = spec.files.iter().map(|path| sum_file(path).ok()).collect();
        let key = key(encoder, &sums?);
        let table = cache::open(folder, key)?;
        if matches!(token_cache, TokenCache::Keep { .. }) {
            note_use(&cache::path(folder, key));
        }
        let summary: Summary = serde_json::from_str(&table.summary).ok()?;
        Some((table, summary))
    });
    let from_cache = cached.is_some();
    let (table, summary, unkept) = match cached {
        Some((table, summary)) => {
            // The samples are kept whatever the number of bad rows allowed, which may have changed since.
            refuse(spec, &summary, Vec::new())?;
            (table, summary, None)
        }
        None => build(spec, encoder, token_cache)?,
    };
    if table.lengths.is_empty() {
        return Err(nothing_left(spec, &summary));
    }
    Ok(Loaded { table, summary, from_cache, unkept })
}

/// The key of everything that the encoded samples depend on.
fn key(encoder: &Encoder<'_>, file_sums: &[u128]) -> u128 {
    let Encoder { tokenizer, template, answers, special_tokens, max_length, truncation } = encoder;
    let template = template.saved();
    let said =
        serde_json::json!([template, answers, special_tokens, max_length, truncation, file_sums.len()]).to_string();
    let mut hasher = Xxh3::new();
    hasher.update(&cache::VERSION.to_le_bytes());
    hasher.update(&tokenizer.fingerprint().to_le_bytes());
    for sum in file_sums {
        hasher.update(&sum.to_le_bytes());
    }
    hasher.update(said.as_bytes());
    hasher.digest128()
}

fn sum_file(path: &Path) -> std::io::Result<u128> {
    let (mut file, mut hasher, mut buffer) = (File::open(path)?, Xxh3::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.digest128()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Encodes the files; nothing is cached unless they may be used.
fn build(
    spec: &DataSpec,
    encoder: &Encoder<'_>,
    token_cache: TokenCache<'_>,
) -> Result<(Table, Summary, Option<Fault>)> {
    let mut builder = Builder::default();
    let (mut sums, mut faults) = (Vec::new(), Vec::new());
    for (file, path) in (0u32..).zip(&spec.files) {
        match RowFile::read(path) {
            Ok(rows) => {
                builder.add_file(file, path, &rows, encoder)?;
                faults.extend(rows.broken().map(|(line, reason)| row_fault(path, *line, reason)));
                sums.push(xxhash_rust::xxh3::xxh3_128(rows.bytes()));
            }
            Err(Error::Invalid(more)) => faults.extend(more),
            Err(error) => return Err(error),
        }
    }
    let Builder { mut table, ids, summary } = builder;
    table.ids = Ids::Memory(ids);
    refuse(spec, &summary, faults)?;
    table.summary = serde_json::to_string(&summary).expect("strings and numbers make JSON");
    let mut unkept = None;
    if let TokenCache::Keep { folder, is_required, max_bytes } = token_cache
        && !table.lengths.is_empty()
    {
        let key = key(encoder, &sums);
        match cache::write(folder, key, &table) {
            // From here on the samples are read from the file, and their memory is free.
            Ok(()) => {
                table = cache::open(folder, key).unwrap_or(table);
                make_room(folder, &cache::path(folder, key), max_bytes);
            }
            Err(error) if is_required => return Err(error),
            Err(error) => unkept = error.faults().first().cloned(),
        }
    }
    Ok((table, summary, unkept))
}

#[derive(Default)]
struct Builder {
    table: Table,
    ids: Vec<u32>,
    summary: Summary,
}

/// Some rows of one file, encoded.
#[derive(Default)]
struct Chunk {
    ids: Vec<u32>,
    /// Length, learned spans and line of each sample.
    samples: Vec<(u32, Vec<[u32; 2]>, u32)>,
    bad: Vec<(u32, Reason)>,
    /// Line and tokens.
    too_long: Vec<(u32, usize)>,
    cut: usize,
    with_special: usize,
    with_no_answer: usize,
    passed_over: BTreeMap<String, usize>,
    asking_for_earlier: usize,
    first_asking: Option<u32>,
    lacking_text: usize,
    first_lacking: Option<u32>,
}

impl Builder {
    fn add_file(&mut self, file: u32, path: &Path, rows: &RowFile, encoder: &Encoder<'_>) -> Result<()> {
        self.summary.rows += rows.len();
        let starts: Vec<usize> = (0..rows.len()).step_by(CHUNK_ROWS).collect();
        let work = Work::begin(format!("tokenising {}", path.display()), "rows", rows.len() as u64);
        for window in starts.chunks(WINDOW_CHUNKS) {
            let encode = |&start: &usize| {
                let range = start..rows.len().min(start + CHUNK_ROWS);
                let n_rows = range.len() as u64;
                let chunk = encode_rows(rows, range, encoder);
                work.advance(n_rows);
                chunk
            };
            let chunks: Vec<Result<Chunk>> = window.par_iter().map(encode).collect();
            for chunk in chunks {
                self.add_chunk(file, chunk?);
            }
        }
        let noted = |(line, reason): &(u32, Reason)| Bad::new(file, *line, reason.clone());
        self.summary.noted.extend(rows.notes().iter().map(noted));
        Ok(())
    }

    fn add_chunk(&mut self, file: u32, chunk: Chunk) {
        self.ids.extend(chunk.ids);
        for (length, spans, line) in chunk.samples {
            self.table.lengths.push(length);
            self.table.n_spans.push(spans.len() as u32);
            self.table.spans.extend(spans);
            self.table.files.push(file);
            self.table.lines.push(line);
        }
        for (line, reason) in chunk.bad {
            self.add_bad(file, line, reason);
        }
        let summary = &mut self.summary;
        summary.dropped += chunk.too_long.len();
        let room = N_NAMED - summary.too_long.len();
        summary.too_long.extend(chunk.too_long.into_iter().take(room).map(|(line, tokens)| (file, line, tokens)));
        summary.cut += chunk.cut;
        summary.with_special += chunk.with_special;
        summary.with_no_answer += chunk.with_no_answer;
        for (key, rows) in chunk.passed_over {
            if summary.passed_over.len() < N_KEYS || summary.passed_over.contains_key(&key) {
                *summary.passed_over.entry(key).or_default() += rows;
            }
        }
        summary.asking_for_earlier += chunk.asking_for_earlier;
        summary.first_asking = summary.first_asking.or(chunk.first_asking.map(|line| (file, line)));
        summary.lacking_text += chunk.lacking_text;
        summary.first_lacking = summary.first_lacking.or(chunk.first_lacking.map(|line| (file, line)));
    }

    fn add_bad(&mut self, file: u32, line: u32, reason: Reason) {
        self.summary.bad_rows += 1;
        if self.summary.bad.len() < N_NAMED {
            self.summary.bad.push(Bad::new(file, line, reason));
        }
    }
}

fn encode_rows(rows: &RowFile, range: Range<usize>, encoder: &Encoder<'_>) -> Result<Chunk> {
    let mut chunk = Chunk::default();
    for row in range {
        let (line, start) = (rows.line(row), chunk.ids.len());
        let Encoded { spans, full_length, told } = match encoder.encode_row(rows, row, &mut chunk.ids) {
            Ok(encoded) => encoded,
            Err(Failure::Row(reason)) => {
                chunk.ids.truncate(start);
                chunk.bad.push((line, reason));
                continue;
            }
            Err(Failure::Other(error)) => return Err(error),
        };
        for key in told.passed_over {
            *chunk.passed_over.entry(key).or_default() += 1;
        }
        let too_long = full_length > encoder.max_length;
        if too_long && encoder.truncation != Truncation::Cut {
            chunk.too_long.push((line, full_length));
            continue;
        }
        chunk.cut += usize::from(too_long);
        chunk.with_special += usize::from(told.has_special);
        chunk.with_no_answer += usize::from(told.has_no_answer);
        if told.lacks_text {
            chunk.lacking_text += 1;
            chunk.first_lacking.get_or_insert(line);
        }
        if told.asks_for_earlier {
            chunk.asking_for_earlier += 1;
            chunk.first_asking.get_or_insert(line);
        }
        chunk.samples.push(((chunk.ids.len() - start) as u32, spans, line));
    }
    Ok(chunk)
}

pub(super) fn bad_faults(summary: &Summary, paths: &[PathBuf]) -> Vec<Fault> {
    summary.bad.iter().map(|bad| bad.fault(paths)).collect()
}

/// What the user should know of the files, though it is no fault.
pub(super) fn warnings(summary: &Summary, paths: &[PathBuf]) -> Vec<Fault> {
    let mut warnings: Vec<Fault> = summary.noted.iter().map(|noted| noted.fault(paths)).collect();
    if let Some((file, line)) = summary.first_asking {
        let what = format!(
            "{} rows, this is the first, ask to have an earlier answer learned as well: the last alone is learned",
            summary.asking_for_earlier
        );
        let reason = Reason::new(what).hint("to learn every answer, set data.learn = \"all\"");
        warnings.push(row_fault(&paths[file as usize], line, &reason));
    }
    if let Some((file, line)) = summary.first_lacking {
        let what =
            format!("{} rows, this is the first, hold text that the chat template leaves out", summary.lacking_text);
        let reason = Reason::new(what).hint("a system prompt, with some templates: write it into the first question");
        warnings.push(row_fault(&paths[file as usize], line, &reason));
    }
    warnings
}

/// Turns what was found into an error where it may not be passed over.
fn refuse(spec: &DataSpec, summary: &Summary, mut faults: Vec<Fault>) -> Result<()> {
    if summary.bad_rows > spec.max_bad_rows {
        faults.extend(bad_faults(summary, &spec.files));
        let what = format!(
            "{} of {} rows are bad{}; {} may be",
            summary.bad_rows,
            summary.rows,
            if summary.bad_rows > summary.bad.len() { ", the first of them listed above" } else { "" },
            spec.max_bad_rows
        );
        faults.push(
            Fault::new("data.max_bad_rows", what)
                .hint(format!("mend the rows, or set data.max_bad_rows = {} to pass them over", summary.bad_rows)),
        );
    }
    if spec.truncation == Truncation::Error && summary.dropped > 0 {
        for &(file, line, tokens) in &summary.too_long {
            let what = format!("has {tokens} tokens, more than data.max_length = {}", spec.max_length);
            faults.push(Fault::new(place(&spec.files[file as usize], line), what));
        }
        faults.push(
            Fault::new("data.max_length", format!("{} of {} samples are longer", summary.dropped, summary.rows))
                .hint("raise data.max_length, or set data.truncation to \"drop\" or \"cut\""),
        );
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Invalid(faults)) }
}

fn nothing_left(spec: &DataSpec, summary: &Summary) -> Error {
    let files: Vec<String> = spec.files.iter().map(|path| path.display().to_string()).collect();
    let what = format!(
        "leaves no sample to use: of {} rows {} are bad and {} have more than {} tokens",
        summary.rows, summary.bad_rows, summary.dropped, spec.max_length
    );
    Error::invalid(files.join(", "), what).hint("raise data.max_length, or name other files")
}
