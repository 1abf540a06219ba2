//! Tensors from files into memory, by all cores: each reads a piece, converts it while it is in its cache, and writes it where
//! it belongs. (Copied from a mapped file by one thread, most of the time goes into faults of single pages.)

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::transfer::TwoBuffers;
use crate::torch::write_bytes;

/// Elements of a piece: stored and converted it stays within a core's cache.
const PIECE: usize = 1 << 18;

/// Elements of each of the two buffers by which a GPU is filled: 16 MiB in half precision. Not tuned: no GPU was at hand.
const BUFFER: usize = 1 << 23;

/// Whether [`read_into`] can fill a tensor.
pub(super) fn can_fill(to: &Tensor) -> bool {
    to.device() == Device::Cpu && to.is_contiguous() && is_float(to.kind())
}

/// Whether [`read_up`] can fill a tensor.
pub(super) fn can_fill_by_buffers(to: &Tensor) -> bool {
    to.device().is_cuda() && to.is_contiguous() && is_float(to.kind()) && to.numel() > 0
}

fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16)
}

/// Fills a tensor that [`can_fill`] allows with elements of dtype `stored` that lie at a byte of a file; `path` is its name in
/// messages. Dtypes that differ are converted, rounding to the nearest and ties to even.
///
/// # Errors
/// A file that cannot be read, or has become shorter.
pub(super) fn read_into(file: &File, path: &Path, start: usize, stored: Kind, to: &Tensor) -> Result<()> {
    let n = to.numel();
    // A tensor may go to another thread, a reference to one may not.
    let pieces: Vec<(usize, Tensor)> = (0..n).step_by(PIECE).map(|first| (first, to.shallow_clone())).collect();
    let one = |scratch: &mut Scratch, (first, to): (usize, Tensor)| {
        let n = PIECE.min(n - first);
        let kind = to.kind();
        scratch.read(file, start + first * stored.elt_size_in_bytes(), n * stored.elt_size_in_bytes())?;
        if kind != stored {
            scratch.convert(stored, kind);
        }
        write_bytes(&to, first * kind.elt_size_in_bytes(), &scratch.bytes);
        Ok(())
    };
    let outcome = match pieces.len() {
        1 => pieces.into_iter().try_for_each(|piece| one(&mut Scratch::default(), piece)),
        _ => pieces.into_par_iter().map_init(Scratch::default, one).collect(),
    };
    outcome.map_err(Error::io("read", path))
}

/// As [`read_into`], for a tensor on a GPU: pieces are read and converted into one of two pinned buffers while the device takes
/// the other. The device may still be taking the last of them afterwards; what is queued behind finds them there.
///
/// # Errors
/// As [`read_into`]; pinned memory that runs out.
pub(super) fn read_up(file: &File, path: &Path, start: usize, stored: Kind, to: &Tensor) -> Result<()> {
    let buffers = TwoBuffers::new(BUFFER.min(to.numel()) as i64, to.kind(), to.device())?;
    read_by(&buffers, file, path, start, stored, to)
}

fn read_by(buffers: &TwoBuffers, file: &File, path: &Path, start: usize, stored: Kind, to: &Tensor) -> Result<()> {
    buffers.fill(to, |part, first| read_into(file, path, start + first * stored.elt_size_in_bytes(), stored, part))
}

/// The memory of a thread for the piece at hand.
#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    halves: Vec<u16>,
    floats: Vec<f32>,
}

impl Scratch {
    fn read(&mut self, file: &File, at: usize, n: usize) -> std::io::Result<()> {
        self.bytes.resize(n, 0);
        file.read_exact_at(&mut self.bytes, at as u64)
    }

    /// Converts what was read, by way of fp32.
    fn convert(&mut self, from: Kind, to: Kind) {
        self.floats.clear();
        if from == Kind::Float {
            self.floats.extend(self.bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        } else {
            self.halves.clear();
            self.halves.extend(self.bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes)));
            self.floats.resize(self.halves.len(), 0.0);
            match from {
                Kind::Half => self.halves.reinterpret_cast::<f16>().convert_to_f32_slice(&mut self.floats),
                _ => self.halves.reinterpret_cast::<bf16>().convert_to_f32_slice(&mut self.floats),
            }
        }
        if to == Kind::Float {
            self.bytes.resize(4 * self.floats.len(), 0);
            for (bytes, x) in self.bytes.as_chunks_mut::<4>().0.iter_mut().zip(&self.floats) {
                *bytes = x.to_le_bytes();
            }
            return;
        }
        self.halves.resize(self.floats.len(), 0);
        match to {
            Kind::Half => self.halves.reinterpret_cast_mut::<f16>().convert_from_f32_slice(&self.floats),
            _ => self.halves.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(&self.floats),
        }
        self.bytes.resize(2 * self.halves.len(), 0);
        for (bytes, x) in self.bytes.as_chunks_mut::<2>().0.iter_mut().zip(&self.halves) {
            *bytes = x.to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Ordinary numbers, and the ends of each dtype's range; several pieces and a part of one.
    fn numbers() -> Tensor {
        let ends = [
            0.0,
            -0.0,
            1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            65504.0,
            65520.0,
            6e-8,
            1e-40,
            3.39e38,
            1.0 + 2f32.powi(-9),
        ];
        let n = 2 * PIECE as i64 + 17;
        let drawn = Tensor::randn([n], (Kind::Float, Device::Cpu));
        drawn.narrow(0, 3, ends.len() as i64).copy_(&Tensor::from_slice(&ends));
        drawn
    }

    #[test]
    fn every_pair_of_dtypes_converts_as_libtorch_does() {
        let kinds = [Kind::Float, Kind::Half, Kind::BFloat16];
        for stored in kinds {
            let tensor = numbers().to_kind(stored);
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(b"before").unwrap();
            file.write_all(crate::torch::bytes(&tensor)).unwrap();
            for kind in kinds {
                let ours = Tensor::zeros(tensor.size(), (kind, Device::Cpu));
                read_into(file.as_file(), file.path(), 6, stored, &ours).unwrap();
                let judge = tensor.to_kind(kind);
                assert_eq!(crate::torch::bytes(&ours), crate::torch::bytes(&judge), "{stored:?} to {kind:?}");
            }
        }
    }

    #[test]
    fn what_goes_by_two_buffers_is_the_same() {
        let numbers = numbers();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"before").unwrap();
        file.write_all(crate::torch::bytes(&numbers)).unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            // Ordinary memory in place of pinned: three buffers full and a part of one.
            let buffers = TwoBuffers::new(PIECE as i64 * 2 / 3, kind, Device::Cpu).unwrap();
            let to = Tensor::zeros(numbers.size(), (kind, Device::Cpu));
            read_by(&buffers, file.as_file(), file.path(), 6, Kind::Float, &to).unwrap();
            assert_eq!(crate::torch::bytes(&to), crate::torch::bytes(&numbers.to_kind(kind)), "{kind:?}");
        }
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0; 100]).unwrap();
        let to = Tensor::zeros([PIECE as i64 + 1], (Kind::Float, Device::Cpu));
        let said = read_into(file.as_file(), file.path(), 0, Kind::Float, &to).unwrap_err().to_string();
        assert!(said.contains(&file.path().display().to_string()), "{said}");
    }
}
