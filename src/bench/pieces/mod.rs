//! The pieces of a training step, each timed by itself: what the engine calls in one block of a model, over the packed tokens of
//! one update, and what it might call in its place.
//!
//! Legend of axes: `N` tokens, `I` inputs, `O` outputs, `D` hidden, `F` feed-forward, `H` heads, `E` head width, `R` LoRA rank.

mod others;
mod products;
mod report;

use std::time::{Duration, Instant};

use tch::{Device, Tensor};

pub use report::{Piece, PiecesReport, Settings};

use super::report::{MeasuredMachine, median};
use crate::config::Config;
use crate::data::Lengths;
use crate::error::Result;
use crate::model::shape::ModelShape;
use crate::ops::attention::Heads;
use crate::ops::target::Target;
use crate::run::resolve_auto;
use crate::torch::cuda::{Blas, prefer_blas, set_numerics};
use crate::torch::dtype;
use crate::torch::memory;
use crate::torch::timer::seconds_of;

/// Runs of a piece before those that count.
const WARMUP: usize = 2;
/// Runs that count.
const REPEATS: usize = 10;
/// No piece begins later than that after the first.
const TIME: Duration = Duration::from_secs(45);

/// A piece that is ready to run.
type Call = Box<dyn FnMut() -> Result<()>>;

/// What a piece does in one run.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Work {
    /// Operations, a multiplication and an addition being two.
    Flops(f64),
    /// Bytes that one pass would have to read and write.
    Bytes(f64),
}

/// Sizes, and what the operations are for.
struct Sizes {
    rows: i64,
    /// The documents' borders in rows.
    borders: Vec<usize>,
    hidden: i64,
    intermediate: i64,
    heads: Heads,
    r: i64,
    target: Target,
}

/// Times pieces and keeps what was found.
struct Pieces {
    sizes: Sizes,
    end: Instant,
    /// The library of products that is preferred now.
    library: &'static str,
    found: Vec<Piece>,
}

/// Times every piece of one block of a shape; `tell` hears what is being done. The rows are those of an update of
/// `train.global_batch` samples of mean length, in documents of drawn lengths (those of BELLE's samples unless others are given),
/// the last of which is cut. A piece that the device or libtorch lacks is in the report with the reason.
///
/// # Errors
/// A device that is asked for and is not there; a device that is lost.
pub fn measure(
    mut config: Config,
    name: &str,
    shape: &ModelShape,
    lengths: Option<Lengths>,
    tell: &dyn Fn(&str),
) -> Result<PiecesReport> {
    if let Some(note) = resolve_auto::device_and_dtype(&mut config)? {
        tell(&note);
    }
    set_numerics(false)?;
    let lengths = match lengths {
        Some(lengths) => lengths,
        None => Lengths::belle()?,
    };
    let (kind, device) = (resolve_auto::kind(&config), resolve_auto::device(&config));
    let rows = (config.train.global_batch as f64 * lengths.mean_tokens()).round() as usize;
    let drawn = lengths.draw(rows, config.train.seed);
    let sizes = Sizes {
        rows: rows as i64,
        borders: borders(drawn.iter().map(|length| length.tokens as usize), rows),
        hidden: shape.hidden_size,
        intermediate: shape.intermediate_size,
        heads: shape.heads(),
        r: config.lora.r as i64,
        target: Target::new(device, kind),
    };
    let settings = Settings {
        shape: name.to_string(),
        rows: sizes.rows,
        documents: sizes.borders.len() - 1,
        hidden: sizes.hidden,
        intermediate: sizes.intermediate,
        heads: sizes.heads.n_heads,
        kv_heads: sizes.heads.n_kv_heads,
        r: sizes.r,
        repeats: REPEATS,
    };
    let mut pieces = Pieces { sizes, end: Instant::now() + TIME, library: "", found: Vec::new() };
    // What is small comes first, should the time run out.
    tell("timing what moves memory, and attention");
    others::time(&mut pieces)?;
    tell("timing products");
    products::time_fp8(&mut pieces)?;
    for blas in if device.is_cuda() { &[Some(Blas::CUBLAS), Some(Blas::CUBLASLT)][..] } else { &[None] } {
        let before = blas.map(prefer_blas).transpose()?;
        pieces.library = blas.map_or("", Blas::name);
        let timed = products::time(&mut pieces);
        before.map(prefer_blas).transpose()?;
        timed?;
    }
    Ok(PiecesReport {
        version: env!("CARGO_PKG_VERSION"),
        device: MeasuredMachine::of(device),
        dtype: dtype::name(kind),
        settings,
        pieces: pieces.found,
    })
}

/// Borders of documents one after another that fill the rows; the last is cut.
fn borders(lengths: impl Iterator<Item = usize>, rows: usize) -> Vec<usize> {
    let mut ends = vec![0];
    for length in lengths {
        let last = ends[ends.len() - 1];
        if last == rows {
            break;
        }
        ends.push(rows.min(last + length));
    }
    ends
}

impl Pieces {
    /// A drawn tensor in the compute dtype: a GPU is faster on zeros than it can ever be on real numbers.
    fn draw(&self, shape: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (self.sizes.target.kind, self.sizes.target.device))?.f_normal_(0.0, 1.0)?)
    }

    /// Bytes of an element in the compute dtype.
    fn element(&self) -> f64 {
        self.sizes.target.kind.elt_size_in_bytes() as f64
    }

    /// Times a piece. `prepare` makes its operands, which are gone before the next.
    ///
    /// # Errors
    /// A device that is lost: whatever the piece itself cannot do is recorded.
    fn time(&mut self, name: &str, work: Work, prepare: impl FnOnce(&Self) -> Result<Call>) -> Result<()> {
        let device = self.sizes.target.device;
        let timed = if Instant::now() > self.end {
            Err("no time left".to_string())
        } else {
            prepare(self).and_then(|call| run(call, device)).map_err(|error| error.to_string())
        };
        self.found.push(Piece::new(name, self.library, work, timed));
        memory::release_cached(device)
    }
}

/// Seconds of each run that counts.
fn run(mut call: Call, device: Device) -> Result<Vec<f64>> {
    for _ in 0..WARMUP {
        call()?;
    }
    (0..REPEATS).map(|_| seconds_of(device, &mut call)).collect()
}

#[cfg(test)]
mod tests {
    use super::borders;

    #[test]
    fn documents_fill_the_rows() {
        assert_eq!(borders([5, 3, 9, 9].into_iter(), 12), [0, 5, 8, 12]);
        assert_eq!(borders([5, 3, 4, 9].into_iter(), 12), [0, 5, 8, 12]);
    }
}
