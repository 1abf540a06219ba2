//! Safetensors files: which tensors are in them, and their contents, tensor by tensor.
#![expect(unsafe_code, reason = "the one place that maps files")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Fault, Result};
use crate::formats::other_formats::no_weights;
use crate::formats::tensor_read;

/// Pages of a tensor by which it is told from another, and their size.
const SAMPLED_PAGES: usize = 16;
const PAGE_BYTES: usize = 4096;

/// One tensor's place in the files of a model.
#[derive(Debug, Clone)]
pub struct Located {
    file: usize,
    /// Stored dtype.
    pub dtype: Dtype,
    /// Stored shape.
    pub shape: Vec<usize>,
    start: usize,
    end: usize,
}

impl Located {
    /// Bytes of the stored tensor.
    pub fn n_bytes(&self) -> usize {
        self.end - self.start
    }
}

/// A set of safetensors files and the tensors in them.
#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<Opened>,
    tensors: BTreeMap<String, Located>,
}

/// A file that is read piece by piece, and mapped where its bytes are wanted as they lie.
#[derive(Debug)]
struct Opened {
    path: PathBuf,
    file: File,
    map: Mmap,
}

/// The libtorch dtype of a stored one, for those that are computed with.
pub fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

impl TensorFiles {
    /// Opens the weights of a model directory: `model.safetensors`, or the files of its index. Reads headers alone.
    ///
    /// # Errors
    /// No such file (other formats are named with the way to convert them), a damaged or truncated one.
    pub fn open_model(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.is_file() {
            return Self::open(&[single]);
        }
        if !index.is_file() {
            return Err(no_weights(dir));
        }
        let place = index.display().to_string();
        let damaged =
            |what: String| Error::invalid(&place, what).hint("download this file of the model again, and its parts");
        let text = std::fs::read_to_string(&index).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| damaged(format!("is not valid JSON: {e}")))?;
        let Some(map) = value.get("weight_map").and_then(|m| m.as_object()).filter(|m| !m.is_empty()) else {
            return Err(damaged("names no tensors: it has no \"weight_map\"".into()));
        };
        let mut wanted: BTreeMap<&str, &str> = BTreeMap::new();
        for (tensor, file) in map {
            match file.as_str().filter(|name| Path::new(name).components().count() == 1 && !name.starts_with('.')) {
                Some(name) if name.ends_with(".safetensors") => wanted.insert(tensor, name),
                _ => {
                    return Err(damaged(format!("names {file} as the file of {tensor}, not a .safetensors beside it")));
                }
            };
        }
        let names: BTreeSet<&str> = wanted.values().copied().collect();
        let paths: Vec<PathBuf> = names.iter().map(|n| dir.join(n)).collect();
        let missing: Vec<Fault> = paths
            .iter()
            .filter(|p| !p.is_file())
            .map(|p| {
                let what = format!("missing, though {} names it", index.display());
                Fault::new(p.display().to_string(), what).hint("download this part of the model again")
            })
            .collect();
        if !missing.is_empty() {
            return Err(Error::Invalid(missing));
        }
        let files = Self::open(&paths)?;
        for (tensor, name) in wanted {
            let found = files.tensors.get(tensor).map(|t| files.files[t.file].path.as_path());
            if found != Some(dir.join(name).as_path()) {
                return Err(damaged(format!("says that {tensor} is in {name}, and it is not there")));
            }
        }
        Ok(files)
    }

    /// Opens safetensors files as one set of tensors.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut set = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            set.add(path)?;
        }
        Ok(set)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(|e| {
            Error::invalid(path.display().to_string(), format!("cannot be read: {e}"))
                .hint("is it there, and may you read it?")
        })?;
        // From the first byte to the last: the system reads further ahead then. A hint, which may go unheard.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        // SAFETY: the map is only read. A file that another process truncates meanwhile is outside what we can guard.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| {
            if error.kind() != std::io::ErrorKind::OutOfMemory {
                return Error::io("map", path)(error);
            }
            let n_bytes = file.metadata().map_or(0, |found| found.len());
            Error::invalid(path.display().to_string(), format!("its {n_bytes} bytes do not fit into the address space"))
                .hint("raise the limit on it: ulimit -v unlimited")
        })?;
        let damaged = |why: String| {
            if map.starts_with(b"version https://git-lfs") {
                return Error::invalid(path.display().to_string(), "is only a pointer of git-lfs")
                    .hint("fetch the file itself: git lfs pull");
            }
            Error::invalid(path.display().to_string(), format!("is not a whole safetensors file: {why}"))
                .hint("download or copy it again and compare its size with the source's")
        };
        let (header_len, metadata) = SafeTensors::read_metadata(&map).map_err(|e| damaged(e.to_string()))?;
        let data_start = header_len + 8;
        let expected = data_start + metadata.data_len();
        if map.len() != expected {
            return Err(damaged(format!("its header describes {expected} bytes, it has {}", map.len())));
        }
        for (name, info) in metadata.tensors() {
            let located = Located {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data_start + info.data_offsets.0,
                end: data_start + info.data_offsets.1,
            };
            if let Some(first) = self.tensors.insert(name.clone(), located) {
                let what = format!("this tensor is in {} as well", self.files[first.file].path.display());
                let place = format!("{}: {name}", path.display());
                return Err(Error::invalid(place, what).hint("these files are not of one model: download them again"));
            }
        }
        self.files.push(Opened { path: path.to_path_buf(), file, map });
        Ok(())
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Located> {
        &self.tensors
    }

    /// `file: tensor`, for messages; the folder of many files for a tensor that none of them has.
    pub fn place(&self, name: &str) -> String {
        let path = match (self.tensors.get(name), self.files.as_slice()) {
            (Some(t), _) => &self.files[t.file].path,
            (None, [only]) => &only.path,
            (None, files) => files.first().and_then(|first| first.path.parent()).unwrap_or(Path::new(".")),
        };
        format!("{}: {name}", path.display())
    }

    fn located(&self, name: &str) -> Result<&Located> {
        self.tensors.get(name).ok_or_else(|| Error::invalid(self.place(name), "the tensor is missing"))
    }

    /// The stored bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let t = self.located(name)?;
        Ok(&self.files[t.file].map[t.start..t.end])
    }

    /// Copies a stored tensor over `to` (any float dtype, same shape).
    pub fn copy_into(&self, name: &str, to: &Tensor) -> Result<()> {
        let t = self.located(name)?;
        let kind = kind_of(t.dtype)
            .ok_or_else(|| Error::invalid(self.place(name), format!("dtype {:?} is not supported", t.dtype)))?;
        let shape: Vec<i64> = t.shape.iter().map(|&n| n as i64).collect();
        if shape != to.size() {
            let what = format!("has shape {shape:?}, expected {:?}", to.size());
            return Err(Error::invalid(self.place(name), what));
        }
        let Opened { path, file, map } = &self.files[t.file];
        if tensor_read::can_fill(to) {
            return tensor_read::read_into(file, path, t.start, kind, to);
        }
        if tensor_read::can_fill_by_buffers(to) {
            return tensor_read::read_up(file, path, t.start, kind, to);
        }
        let bytes = &map[t.start..t.end];
        let strides = contiguous_strides(&shape);
        // SAFETY: the bytes lie in the map, which outlives this view; they are only read; shape and dtype were checked
        // against the header, whose offsets were checked against the file's length.
        let stored = unsafe { Tensor::f_from_blob(bytes.as_ptr(), &shape, &strides, kind, Device::Cpu) }?;
        to.shallow_clone().f_copy_(&stored)?;
        drop(stored);
        self.let_go(t);
        Ok(())
    }

    /// Takes a tensor's pages off this process's memory.
    fn let_go(&self, t: &Located) {
        // SAFETY: the mapping is file-backed and read-only: dropped pages come back from the file.
        // Failing to release pages is harmless.
        let _ = unsafe {
            self.files[t.file].map.unchecked_advise_range(UncheckedAdvice::DontNeed, t.start, t.end - t.start)
        };
    }

    /// Copies a stored matrix or vector into a new tensor.
    pub fn load(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let shape: Vec<i64> = self.located(name)?.shape.iter().map(|&n| n as i64).collect();
        let to = Tensor::f_empty(shape, (kind, device))?;
        self.copy_into(name, &to)?;
        Ok(to)
    }

    /// Whether two tensors are the same, as far as the pages of both that are sampled tell; one that is not there is another.
    pub fn are_alike(&self, one: &str, other: &str) -> bool {
        let sampled = |name: &str| {
            let t = self.tensors.get(name)?;
            Some((t.dtype, &t.shape, self.sampled_pages(t).collect::<Vec<_>>()))
        };
        sampled(one).is_some_and(|one| sampled(other) == Some(one))
    }

    /// Pages of a tensor, spread evenly from its first to its last.
    fn sampled_pages(&self, t: &Located) -> impl Iterator<Item = &[u8]> {
        let bytes = &self.files[t.file].map[t.start..t.end];
        let last_page = bytes.len().saturating_sub(PAGE_BYTES);
        (0..SAMPLED_PAGES).map(move |page| {
            let start = last_page * page / (SAMPLED_PAGES - 1);
            &bytes[start..bytes.len().min(start + PAGE_BYTES)]
        })
    }

    /// Holds the files against the tensors they must have; one fault for each way to fall short.
    ///
    /// Names that `ignored` tells may be there or not.
    pub fn check<'a>(
        &self,
        expected: impl Iterator<Item = (&'a str, &'a [i64])>,
        ignored: impl Fn(&str) -> bool,
        hint: &str,
    ) -> Vec<Fault> {
        let mut known = BTreeSet::new();
        let (mut missing, mut reshaped, mut odd) = (Vec::new(), Vec::new(), Vec::new());
        for (name, shape) in expected {
            known.insert(name);
            match self.tensors.get(name) {
                None => missing.push((name, "the tensor is missing".to_string())),
                Some(t) if t.shape.iter().map(|&n| n as i64).ne(shape.iter().copied()) => {
                    reshaped.push((name, format!("has the shape {:?} instead of {shape:?}", t.shape)));
                }
                Some(t) if kind_of(t.dtype).is_none() => {
                    odd.push((name, format!("is stored as {:?}; only fp32, fp16 and bf16 are read", t.dtype)));
                }
                Some(_) => {}
            }
        }
        let extra = self.tensors.keys().filter(|name| !known.contains(name.as_str()) && !ignored(name));
        let extra = extra.map(|name| (name.as_str(), "the tensor has no place in this model".to_string())).collect();
        let mut faults = Vec::new();
        for kind in [missing, reshaped, odd, extra] {
            if let Some((name, what)) = kind.first() {
                let more =
                    if kind.len() > 1 { format!(" (and {} more like it)", kind.len() - 1) } else { String::new() };
                faults.push(Fault::new(self.place(name), format!("{what}{more}")).hint(hint));
            }
        }
        faults
    }

    /// A checksum that tells one model from another: names, dtypes, shapes, and sampled pages of each tensor.
    pub fn fingerprint(&self) -> String {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for (name, t) in &self.tensors {
            hasher.update(format!("{name} {:?} {:?}", t.dtype, t.shape).as_bytes());
            self.sampled_pages(t).for_each(|page| hasher.update(page));
            // The system has mapped what lies around a page too: two gigabytes of a base of 13.
            self.let_go(t);
        }
        format!("{:032x}", hasher.digest128())
    }

    /// The dtype in which most bytes of the model are stored.
    pub fn main_dtype(&self) -> Dtype {
        let mut bytes: BTreeMap<String, (usize, Dtype)> = BTreeMap::new();
        for t in self.tensors.values() {
            bytes.entry(format!("{:?}", t.dtype)).or_insert((0, t.dtype)).0 += t.n_bytes();
        }
        bytes.values().max_by_key(|(n, _)| *n).map_or(Dtype::F32, |(_, dtype)| *dtype)
    }
}

fn contiguous_strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    strides
}
