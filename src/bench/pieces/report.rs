//! What was found of the pieces: as JSON, and as a table.

use std::fmt::Write as _;

use serde::Serialize;

use super::{MeasuredMachine, Work, median};

/// The pieces, and what they were made of.
#[derive(Debug, Serialize)]
pub struct PiecesReport {
    /// The version of this program.
    pub version: &'static str,
    /// Where they ran.
    pub device: MeasuredMachine,
    /// Of weights and activations.
    pub dtype: &'static str,
    /// Their sizes.
    pub settings: Settings,
    /// One entry a piece, or two where two libraries make the product.
    pub pieces: Vec<Piece>,
}

/// The sizes of the pieces.
#[derive(Debug, Serialize)]
pub struct Settings {
    /// The shape's name.
    pub shape: String,
    /// Tokens.
    pub rows: i64,
    /// Documents among which they are.
    pub documents: usize,
    /// Columns of the residual stream.
    pub hidden: i64,
    /// Columns of the feed-forward.
    pub intermediate: i64,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Rank of the adapters.
    pub r: i64,
    /// Runs of a piece that count.
    pub repeats: usize,
}

/// A piece that was timed, or the reason why not. Its keys are those of `scripts/peers/pieces.py`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Piece {
    /// Its name.
    pub name: String,
    /// `cublas` or `cublaslt` for a product on a GPU; else empty.
    pub library: &'static str,
    /// The median of its runs, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub median_s: Option<f64>,
    /// The fastest of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fastest_s: Option<f64>,
    /// Operations a second at the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops_per_s: Option<f64>,
    /// Bytes a second at the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<f64>,
    /// Why it could not be timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_available: Option<String>,
}

impl Piece {
    /// From the seconds of its runs, or the reason why there are none.
    pub(super) fn new(name: &str, library: &'static str, work: Work, timed: Result<Vec<f64>, String>) -> Self {
        let mut piece = Self {
            name: name.to_string(),
            library,
            median_s: None,
            fastest_s: None,
            flops_per_s: None,
            bytes_per_s: None,
            not_available: None,
        };
        match timed {
            Err(why) => piece.not_available = Some(format!("not available: {why}")),
            Ok(secs) => {
                piece.fastest_s = secs.iter().copied().min_by(f64::total_cmp);
                let median_s = median(secs);
                piece.median_s = Some(median_s);
                match work {
                    Work::Flops(flops) => piece.flops_per_s = Some(flops / median_s),
                    Work::Bytes(bytes) => piece.bytes_per_s = Some(bytes / median_s),
                }
            }
        }
        piece
    }
}

impl PiecesReport {
    /// The report as one line of JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and strings make JSON")
    }

    /// The report for people.
    pub fn to_table(&self) -> String {
        let Settings { shape, rows, documents, r, repeats, .. } = &self.settings;
        let mut text = format!(
            "{}, {}; bellora {}\none block of {shape}, {rows} tokens in {documents} documents, rank {r}; medians of {repeats} runs\n\n",
            self.device.name, self.dtype, self.version
        );
        for Piece { name, library, median_s, flops_per_s, bytes_per_s, not_available, .. } in &self.pieces {
            let found = match (median_s, flops_per_s, bytes_per_s, not_available) {
                (Some(secs), Some(flops), _, _) => format!("{:>10.3} ms  {:>10.3} TFLOP/s", 1e3 * secs, flops / 1e12),
                (Some(secs), _, Some(bytes), _) => format!("{:>10.3} ms  {:>10.3} GB/s", 1e3 * secs, bytes / 1e9),
                (.., why) => why.clone().unwrap_or_default(),
            };
            let _ = writeln!(text, "{name:<24}{library:<10}{found}");
        }
        text
    }
}
