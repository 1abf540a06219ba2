//! The token cache: encoded samples in a file that is written once and mapped into memory when read.
//!
//! A file is named by a key, a hash of everything that its contents depend on, and ends in a checksum. It appears
//! whole or not at all (temporary name, sync, rename), and one that does not fit its key, its size or its checksum
//! counts as absent and is written anew.
//!
//! Layout: a header of 72 bytes (magic, byte order, version, key, counts); 32-bit numbers in the machine's byte order:
//! length, file, line and number of learned spans of every sample, then all ids, then the spans (first token and the one behind
//! the last); the summary as JSON; the checksum.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Mmap;
use xxhash_rust::xxh3::Xxh3;

use super::cache_room::{TEMPORARY, TOKENS};
use crate::error::{Error, Result};

/// How a command may use the token cache.
#[derive(Debug, Clone, Copy)]
pub enum TokenCache<'a> {
    /// Nothing is looked for, and nothing is kept.
    Off,
    /// What lies in the folder is read, and nothing is written.
    Read(&'a Path),
    /// Samples are kept in the folder.
    Keep {
        /// The folder.
        folder: &'a Path,
        /// Whether it is an error that they cannot be; else it is a warning.
        is_required: bool,
        /// Bytes that all files of the folder may take together; those that were unused for longest are deleted.
        max_bytes: u64,
    },
}

impl<'a> TokenCache<'a> {
    /// The folder to look in.
    pub(super) fn folder(self) -> Option<&'a Path> {
        match self {
            Self::Off => None,
            Self::Read(folder) | Self::Keep { folder, .. } => Some(folder),
        }
    }

    /// The same cache, in which nothing is written.
    pub fn read_only(self) -> Self {
        self.folder().map_or(Self::Off, Self::Read)
    }
}

/// Encoded samples, column by column, in file order.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Tokens of each sample.
    pub(super) lengths: Vec<u32>,
    /// Learned spans of each sample.
    pub(super) n_spans: Vec<u32>,
    /// All spans, one sample's after the other's: the first token that is learned, and the one behind the last.
    pub(super) spans: Vec<[u32; 2]>,
    /// Which file each comes from.
    pub(super) files: Vec<u32>,
    /// The line it stands on there.
    pub(super) lines: Vec<u32>,
    /// The ids of all samples, one after the other.
    pub(super) ids: Ids,
    /// What else is worth knowing, as JSON.
    pub(super) summary: String,
}

/// Ids in memory or in a mapped file.
#[derive(Debug)]
pub(super) enum Ids {
    Memory(Vec<u32>),
    Mapped(MappedIds),
}

impl Default for Ids {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl Deref for Ids {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            Self::Memory(ids) => ids,
            Self::Mapped(mapped) => mapped.ids(),
        }
    }
}

/// The version of the layout and of what is computed into it; raised whenever either changes.
pub(super) const VERSION: u32 = 4;
const MAGIC: &[u8; 16] = b"bellora tokens\n\0";
const BYTE_ORDER: u32 = 0x0102_0304;
const HEADER_BYTES: usize = 72;
const CHECKSUM_BYTES: usize = 16;

/// Where the samples of a key are kept.
pub(super) fn path(folder: &Path, key: u128) -> PathBuf {
    folder.join(format!("{key:032x}.{TOKENS}"))
}

/// Writes a table under its key.
///
/// # Errors
/// [`Error::Failed`] where the folder or the file cannot be written.
pub(super) fn write(folder: &Path, key: u128, table: &Table) -> Result<()> {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let unwritable = |error: std::io::Error| {
        Error::failed(folder.display().to_string(), format!("the token cache cannot be written: {error}"))
            .hint("set data.cache_dir to a folder with room that you may write to")
    };
    std::fs::create_dir_all(folder).map_err(unwritable)?;
    let unique = WRITES.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!(".{key:032x}.{}.{unique}.{TEMPORARY}", std::process::id()));
    let written = File::create(&temporary).and_then(|file| {
        // Held until the file has its name: without it others may take the file for abandoned. Where the file system has no
        // locks, nobody does.
        let _ = file.try_lock();
        write_file(&file, key, table)?;
        std::fs::rename(&temporary, path(folder, key))?;
        File::open(folder)?.sync_all()
    });
    written.map_err(|error| {
        // Whether this works or not, the failure to report is the first one.
        let _ = std::fs::remove_file(&temporary);
        unwritable(error)
    })
}

fn write_file(file: &File, key: u128, table: &Table) -> std::io::Result<()> {
    let mut out = Summing { out: BufWriter::with_capacity(1 << 20, file), sum: Xxh3::new() };
    out.put(MAGIC)?;
    out.put_words(&[BYTE_ORDER, VERSION])?;
    out.put(&key.to_le_bytes())?;
    for count in [table.lengths.len(), table.ids.len(), table.spans.len(), table.summary.len()] {
        out.put(&(count as u64).to_le_bytes())?;
    }
    for column in [&table.lengths, &table.files, &table.lines, &table.n_spans] {
        out.put_words(column)?;
    }
    out.put_words(&table.ids)?;
    out.put_words(table.spans.as_flattened())?;
    out.put(table.summary.as_bytes())?;
    let sum = out.sum.digest128();
    out.put(&sum.to_le_bytes())?;
    out.out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}

/// Writes and sums up what it writes.
struct Summing<'a> {
    out: BufWriter<&'a File>,
    sum: Xxh3,
}

impl Summing<'_> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.sum.update(bytes);
        self.out.write_all(bytes)
    }

    fn put_words(&mut self, words: &[u32]) -> std::io::Result<()> {
        for words in words.chunks(1 << 14) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            self.put(&bytes)?;
        }
        Ok(())
    }
}

/// Opens the table of a key; `None` where there is none that can be trusted.
pub(super) fn open(folder: &Path, key: u128) -> Option<Table> {
    let map = map(&File::open(path(folder, key)).ok()?).ok()?;
    let header = map.get(..HEADER_BYTES)?;
    let expected = [&MAGIC[..], &BYTE_ORDER.to_ne_bytes(), &VERSION.to_ne_bytes(), &key.to_le_bytes()].concat();
    let counts = header.strip_prefix(expected.as_slice())?;
    let (counts, _) = counts.as_chunks::<8>();
    let [n_samples, n_ids, n_spans, n_summary]: [usize; 4] =
        counts.iter().map(|count| u64::from_le_bytes(*count) as usize).collect::<Vec<_>>().try_into().ok()?;

    let column_bytes = n_samples.checked_mul(4)?;
    let ids_start = column_bytes.checked_mul(4)?.checked_add(HEADER_BYTES)?;
    let spans_start = n_ids.checked_mul(4)?.checked_add(ids_start)?;
    let summary_start = n_spans.checked_mul(8)?.checked_add(spans_start)?;
    let sum_start = summary_start.checked_add(n_summary)?;
    if sum_start.checked_add(CHECKSUM_BYTES)? != map.len() {
        return None;
    }
    let mut sum = Xxh3::new();
    sum.update(&map[..sum_start]);
    if sum.digest128().to_le_bytes() != map[sum_start..] {
        return None;
    }

    let words = |start: usize, end: usize| -> Vec<u32> {
        map[start..end].as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect()
    };
    let column = |number: usize| {
        let start = HEADER_BYTES + number * column_bytes;
        words(start, start + column_bytes)
    };
    let table = Table {
        lengths: column(0),
        files: column(1),
        lines: column(2),
        n_spans: column(3),
        spans: words(spans_start, summary_start).as_chunks::<2>().0.to_vec(),
        summary: String::from_utf8(map[summary_start..sum_start].to_vec()).ok()?,
        ids: Ids::Mapped(MappedIds { start: ids_start, end: spans_start, map }),
    };
    let total: u64 = table.lengths.iter().map(|&length| u64::from(length)).sum();
    let of_samples: u64 = table.n_spans.iter().map(|&n| u64::from(n)).sum();
    let mut spans = table.spans.iter();
    let fit =
        |(&n, length): (&u32, &u32)| spans.by_ref().take(n as usize).all(|[start, end]| start <= end && end <= length);
    let are_whole = total == n_ids as u64 && of_samples == n_spans as u64;
    (are_whole && table.n_spans.iter().zip(&table.lengths).all(fit)).then_some(table)
}

/// The ids within a mapped file.
#[derive(Debug)]
pub(super) struct MappedIds {
    map: Mmap,
    start: usize,
    end: usize,
}

impl MappedIds {
    #[expect(unsafe_code, reason = "numbers in a mapped file are read in place")]
    fn ids(&self) -> &[u32] {
        let bytes = &self.map[self.start..self.end];
        // SAFETY: every bit pattern is a `u32`. Nothing is left before or after: a map begins at a page, and `start` and
        // `end` are multiples of 4.
        let (_, ids, _) = unsafe { bytes.align_to::<u32>() };
        ids
    }
}

#[expect(unsafe_code, reason = "the one place that maps files of the token cache")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: a cache file is complete when it gets its name and is only ever replaced as a whole, by a rename, which
    // leaves the mapped file as it was.
    unsafe { Mmap::map(file) }
}
