//! Writing safetensors files one tensor at a time, so that no more than one tensor need be in memory.

use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch;

/// One tensor that a file will hold.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Its key.
    pub name: String,
    /// `F32`, `F16` or `BF16`.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<i64>,
}

impl Planned {
    /// Bytes in the file.
    pub fn n_bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * (self.dtype.bitsize() / 8) as u64
    }
}

/// A safetensors file being written: its header first, then each tensor in the planned order.
pub struct TensorFileWriter<W> {
    path: PathBuf,
    out: W,
    planned: std::vec::IntoIter<Planned>,
}

impl<W: Write> TensorFileWriter<W> {
    /// Writes the header of a file that will hold the planned tensors; `path` is its name in messages.
    pub fn new(out: W, path: &Path, planned: Vec<Planned>) -> Result<Self> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut end = 0;
        for tensor in &planned {
            let start = end;
            end += tensor.n_bytes();
            let entry =
                json!({ "dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "data_offsets": [start, end] });
            header.insert(tensor.name.clone(), entry);
        }
        let mut text = Value::Object(header).to_string();
        // Tensors begin at a multiple of eight bytes.
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let mut writer = Self { path: path.to_path_buf(), out, planned: planned.into_iter() };
        writer.put(&(text.len() as u64).to_le_bytes())?;
        writer.put(text.as_bytes())?;
        Ok(writer)
    }

    /// Writes the next planned tensor, converted to its dtype.
    ///
    /// # Errors
    /// A tensor that is not the next planned one: a defect of the caller.
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let next = self.planned.next();
        let Some(planned) = next.filter(|p| p.name == name && p.shape == tensor.size()) else {
            return Err(Error::failed(self.path.display().to_string(), format!("{name} was not planned next")));
        };
        let kind = match planned.dtype {
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            _ => Kind::Float,
        };
        let tensor = tensor.f_to_kind(kind)?.f_to_device(Device::Cpu)?.f_contiguous()?;
        self.put(torch::bytes(&tensor))
    }

    /// Writes the next planned tensor from bytes that are already in its dtype.
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let next = self.planned.next();
        if next.is_none_or(|p| p.name != name || p.n_bytes() != bytes.len() as u64) {
            return Err(Error::failed(self.path.display().to_string(), format!("{name} was not planned next")));
        }
        self.put(bytes)
    }

    /// Ends the file.
    pub fn finish(mut self) -> Result<()> {
        if let Some(missing) = self.planned.next() {
            return Err(Error::failed(self.path.display().to_string(), format!("{} was not written", missing.name)));
        }
        self.out.flush().map_err(Error::io("write", &self.path))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io("write", &self.path))
    }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "F16",
        Dtype::BF16 => "BF16",
        _ => "F32",
    }
}
