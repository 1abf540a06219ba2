//! A data set: the samples of some files, encoded, in file order.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::cache::{Ids, Table, TokenCache};
use super::encode::Encoder;
use super::lengths::Length;
use super::order::{self, SplitMix64};
use super::prompting::Prompting;
use super::reason::place;
use super::samples::{self, DataSpec, Loaded, Summary};
use super::tokenizer::Tokenizer;
use crate::error::{Fault, Result};

/// Encoded samples. A clone or a selection shares their memory.
#[derive(Clone)]
pub struct Dataset {
    shared: Arc<Shared>,
    /// The samples of a selection; `None` for all.
    selected: Option<Vec<u32>>,
}

struct Shared {
    paths: Vec<PathBuf>,
    table: Table,
    /// Where each sample's ids begin, and the end.
    offsets: Vec<u64>,
    /// Where each sample's learned spans begin, and the end.
    span_offsets: Vec<u64>,
    summary: Summary,
    warnings: Vec<Fault>,
    from_cache: bool,
}

/// What loading found, in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Rows in the files, bad ones included.
    pub rows: usize,
    /// Rows that are samples now.
    pub samples: usize,
    /// Rows passed over, with the first of them.
    pub bad_rows: usize,
    /// The first bad rows, each with its reason.
    pub bad_row_faults: Vec<Fault>,
    /// Samples left out for their length.
    pub dropped: usize,
    /// The first of those, as `file:line (tokens)`.
    pub dropped_places: Vec<String>,
    /// Samples that were cut.
    pub cut: usize,
    /// Samples without any label token: they were cut within the prompt.
    pub with_nothing_to_learn: usize,
    /// Tokens of all samples.
    pub tokens: u64,
    /// Of those, the ones that are learned.
    pub label_tokens: u64,
    /// Tokens of the longest sample.
    pub max_len: usize,
    /// Samples whose own text holds a special token.
    pub rows_with_special_tokens: usize,
    /// Samples whose answer is empty or blank.
    pub with_no_answer: usize,
    /// Keys of rows that are passed over, and how many rows have each.
    pub passed_over: BTreeMap<String, usize>,
    /// Whether the samples came from the token cache.
    pub from_cache: bool,
}

impl Dataset {
    /// Loads and encodes the files, or finds them in the token cache.
    ///
    /// # Errors
    /// [`Error::Invalid`] with all faults: files that are no data files, more bad rows than allowed (the first of them
    /// and how many), samples too long where that is an error, nothing left to train on. [`Error::Failed`] where the
    /// cache cannot be written.
    pub fn load(
        spec: &DataSpec,
        tokenizer: &Tokenizer,
        template: &Prompting,
        token_cache: TokenCache<'_>,
    ) -> Result<Self> {
        let encoder = Encoder {
            tokenizer,
            template,
            answers: spec.answers,
            special_tokens: spec.special_tokens,
            max_length: spec.max_length,
            truncation: spec.truncation,
        };
        Ok(Self::new(spec.files.clone(), samples::load(spec, &encoder, token_cache)?))
    }

    /// Makes samples of given lengths out of ids that the seed defines, each of the vocabulary equally likely.
    pub fn random(lengths: &[Length], vocab_size: u32, seed: u64) -> Self {
        let mut table = Table::default();
        let (mut ids, mut generator) = (Vec::new(), SplitMix64(seed));
        for (line, length) in (1..).zip(lengths) {
            table.lengths.push(length.tokens);
            table.n_spans.push(1);
            table.spans.push([length.tokens - length.learned, length.tokens]);
            table.files.push(0);
            table.lines.push(line);
            ids.extend((0..length.tokens).map(|_| generator.below(u64::from(vocab_size)) as u32));
        }
        table.ids = Ids::Memory(ids);
        let summary = Summary { rows: lengths.len(), ..Summary::default() };
        let loaded = Loaded { table, summary, from_cache: false, unkept: None };
        Self::new(vec![PathBuf::from("random samples")], loaded)
    }

    fn new(paths: Vec<PathBuf>, Loaded { table, summary, from_cache, unkept }: Loaded) -> Self {
        let (offsets, span_offsets) = (ends(&table.lengths), ends(&table.n_spans));
        let mut warnings = samples::warnings(&summary, &paths);
        warnings.extend(unkept);
        let shared = Shared { paths, table, offsets, span_offsets, summary, warnings, from_cache };
        Self { shared: Arc::new(shared), selected: None }
    }

    /// Samples.
    pub fn len(&self) -> usize {
        self.selected.as_ref().map_or(self.shared.table.lengths.len(), Vec::len)
    }

    /// Whether there are none; true only of an empty selection.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn at(&self, sample: usize) -> usize {
        self.selected.as_ref().map_or(sample, |selected| selected[sample] as usize)
    }

    /// A sample's ids.
    pub fn ids(&self, sample: usize) -> &[u32] {
        let at = self.at(sample);
        let range: Range<usize> = self.shared.offsets[at] as usize..self.shared.offsets[at + 1] as usize;
        &self.shared.table.ids[range]
    }

    /// The spans of a sample's tokens that are learned, ascending: the labels over all others are -100.
    pub fn spans(&self, sample: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + Clone {
        let at = self.at(sample);
        let range = self.shared.span_offsets[at] as usize..self.shared.span_offsets[at + 1] as usize;
        self.shared.table.spans[range].iter().map(|[start, end]| *start as usize..*end as usize)
    }

    /// The positions of a sample's tokens that are learned, ascending; never the first of all, which no other token comes before.
    pub fn learned(&self, sample: usize) -> impl Iterator<Item = usize> {
        self.spans(sample).flat_map(|span| span.start.max(1)..span.end)
    }

    /// How many of a sample's tokens are learned.
    pub fn label_tokens(&self, sample: usize) -> usize {
        self.spans(sample).map(|span| span.end.saturating_sub(span.start.max(1))).sum()
    }

    /// Where a sample stands: `file:line`.
    pub fn place(&self, sample: usize) -> String {
        let at = self.at(sample);
        self.shared.place(self.shared.table.files[at], self.shared.table.lines[at])
    }

    /// Tokens of all samples.
    pub fn n_tokens(&self) -> u64 {
        (0..self.len()).map(|sample| self.ids(sample).len() as u64).sum()
    }

    /// Learned tokens of all samples.
    pub fn n_label_tokens(&self) -> u64 {
        (0..self.len()).map(|sample| self.label_tokens(sample) as u64).sum()
    }

    /// What loading found. Of a selection, samples and tokens are its own; the rest is of the whole files.
    pub fn stats(&self) -> Stats {
        let Shared { summary, paths, from_cache, .. } = &*self.shared;
        Stats {
            rows: summary.rows,
            samples: self.len(),
            bad_rows: summary.bad_rows,
            bad_row_faults: samples::bad_faults(summary, paths),
            dropped: summary.dropped,
            dropped_places: summary
                .too_long
                .iter()
                .map(|&(file, line, tokens)| format!("{} ({tokens} tokens)", self.shared.place(file, line)))
                .collect(),
            cut: summary.cut,
            with_nothing_to_learn: (0..self.len()).filter(|&sample| self.label_tokens(sample) == 0).count(),
            tokens: self.n_tokens(),
            label_tokens: self.n_label_tokens(),
            max_len: (0..self.len()).map(|sample| self.ids(sample).len()).max().unwrap_or_default(),
            rows_with_special_tokens: summary.with_special,
            with_no_answer: summary.with_no_answer,
            passed_over: summary.passed_over.clone(),
            from_cache: *from_cache,
        }
    }

    /// What of the files may not be what the user means, though it is no fault.
    pub fn warnings(&self) -> &[Fault] {
        &self.shared.warnings
    }

    /// Splits the samples into training and validation: the same for the same seed, each in file order.
    pub fn split(&self, validation_fraction: f64, seed: u64) -> (Vec<u32>, Vec<u32>) {
        order::split(self.len(), validation_fraction, seed)
    }

    /// Some of the samples, in the given order.
    pub fn select(&self, samples: &[u32]) -> Self {
        let selected = samples.iter().map(|&sample| self.at(sample as usize) as u32).collect();
        Self { shared: Arc::clone(&self.shared), selected: Some(selected) }
    }

    /// Writes every sample as one line `{"input_ids":[...],"labels":[...]}`, in order.
    ///
    /// # Errors
    /// What `out` says.
    pub fn write_dump(&self, out: &mut impl Write) -> std::io::Result<()> {
        let mut line = Vec::new();
        for sample in 0..self.len() {
            let ids = self.ids(sample);
            let mut labels = vec![-100; ids.len()];
            for span in self.spans(sample) {
                for at in span {
                    labels[at] = i64::from(ids[at]);
                }
            }
            line.clear();
            line.extend_from_slice(b"{\"input_ids\":[");
            push_numbers(&mut line, ids.iter().map(|&id| i64::from(id)))?;
            line.extend_from_slice(b"],\"labels\":[");
            push_numbers(&mut line, labels.into_iter())?;
            line.extend_from_slice(b"]}\n");
            out.write_all(&line)?;
        }
        out.flush()
    }
}

impl Shared {
    fn place(&self, file: u32, line: u32) -> String {
        place(&self.paths[file as usize], line)
    }
}

/// Where each of some parts that lie one behind the other begins, and the end of the last.
fn ends(lengths: &[u32]) -> Vec<u64> {
    let mut end = 0;
    let ends = lengths.iter().map(|&length| {
        end += u64::from(length);
        end
    });
    std::iter::once(0).chain(ends).collect()
}

fn push_numbers(line: &mut Vec<u8>, numbers: impl Iterator<Item = i64>) -> std::io::Result<()> {
    for (at, number) in numbers.enumerate() {
        let comma = if at > 0 { "," } else { "" };
        write!(line, "{comma}{number}")?;
    }
    Ok(())
}
