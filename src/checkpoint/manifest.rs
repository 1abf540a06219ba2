//! What a whole folder holds: `MANIFEST.json` lists the size and the checksum of every file, and comes last.
//!
//! A folder under its final name holds everything it ever will (see [`super::folder`]); damage that comes later is found
//! by [`verify`]. Files that the manifest does not list are nobody's business here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3Default;

use crate::disk::names;
use crate::error::{Error, Fault, Result};

/// The name of the manifest in its folder.
pub const MANIFEST_FILE: &str = "MANIFEST.json";

/// The version of the manifest's own format.
const FORMAT_VERSION: u32 = 1;

/// The beginning of a checkpoint's name.
const STEP: &str = "step-";

/// What a whole folder holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of this format.
    pub format_version: u32,
    /// Every file of the folder by its name, the manifest itself apart.
    pub files: BTreeMap<String, FileEntry>,
}

/// A file as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// The size.
    pub size_bytes: u64,
    /// The XXH3 checksum of 64 bits, in hexadecimal.
    pub xxh3_64: String,
}

impl Manifest {
    pub(super) fn of(files: BTreeMap<String, FileEntry>) -> Self {
        Self { format_version: FORMAT_VERSION, files }
    }

    /// The manifest as it is written. There is one way to write it, so that a byte that has changed in it always shows.
    pub(super) fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and strings make JSON") + "\n"
    }

    /// Reads the manifest of a folder.
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        let place = path.display().to_string();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::invalid(place, "missing: the folder was never completed, or has lost its manifest"));
            }
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| Error::invalid(&place, format!("damaged: {error}")))?;
        if manifest.format_version != FORMAT_VERSION {
            let what = format!("expected format version {FORMAT_VERSION}, found {}", manifest.format_version);
            return Err(Error::invalid(place, what).hint("use the version of bellora that wrote it"));
        }
        if manifest.to_text().as_bytes() != text {
            return Err(Error::invalid(place, "damaged: not as it was written"));
        }
        Ok(manifest)
    }

    /// Bytes of all files.
    pub fn n_bytes(&self) -> u64 {
        self.files.values().map(|file| file.size_bytes).sum()
    }
}

/// Reads the manifest of a folder and holds every file that it lists against it.
///
/// # Errors
/// [`Error::Invalid`] with each file that is missing, shorter, longer or otherwise than it was written, and when the
/// manifest itself is missing or damaged; [`Error::Io`] for a file that cannot be read.
pub fn verify(dir: &Path) -> Result<Manifest> {
    hold_against_manifest(dir, |path, written| {
        let found = checksum(path)?;
        Ok((found != written.xxh3_64).then(|| format!("damaged: expected checksum {}, found {found}", written.xxh3_64)))
    })
}

/// Does as [`verify`] without reading the files: their sizes alone are held against the manifest.
///
/// # Errors
/// As [`verify`].
pub(super) fn verify_sizes(dir: &Path) -> Result<Manifest> {
    hold_against_manifest(dir, |_, _| Ok(None))
}

fn hold_against_manifest(
    dir: &Path,
    contents_fault: impl Fn(&Path, &FileEntry) -> Result<Option<String>>,
) -> Result<Manifest> {
    let manifest = Manifest::read(dir)?;
    let mut faults = Vec::new();
    for (name, written) in &manifest.files {
        let path = dir.join(name);
        let fault = match fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Some(format!("missing: {MANIFEST_FILE} lists it"))
            }
            Err(error) => return Err(Error::io("read", &path)(error)),
            Ok(found) if found.len() != written.size_bytes => {
                Some(format!("damaged: expected {} bytes, found {}", written.size_bytes, found.len()))
            }
            // Only a file of the right size is worth reading.
            Ok(_) => contents_fault(&path, written)?,
        };
        faults.extend(fault.map(|what| Fault::new(path.display().to_string(), what)));
    }
    if faults.is_empty() { Ok(manifest) } else { Err(Error::Invalid(faults)) }
}

/// Gives the folder of a step's checkpoint.
pub fn step_dir(checkpoints_dir: &Path, step: u64) -> PathBuf {
    checkpoints_dir.join(format!("{STEP}{step:08}"))
}

/// What [`newest_good`] found.
#[derive(Debug)]
pub struct Newest {
    /// The newest checkpoint that is whole, with its step.
    pub good: Option<(u64, PathBuf)>,
    /// Newer ones that are not, newest first, each with what is wrong.
    pub damaged: Vec<(PathBuf, Error)>,
}

/// Finds the newest checkpoint that passes [`verify`]. A folder that does not exist holds none.
///
/// # Errors
/// [`Error::Io`] when the folder of checkpoints cannot be read; a checkpoint that cannot be read counts as damaged.
pub fn newest_good(checkpoints_dir: &Path) -> Result<Newest> {
    newest_good_before(checkpoints_dir, u64::MAX)
}

/// Does as [`newest_good`] among the checkpoints of steps before `step`.
///
/// # Errors
/// As [`newest_good`].
pub fn newest_good_before(checkpoints_dir: &Path, step: u64) -> Result<Newest> {
    let mut damaged = Vec::new();
    for (found, dir) in checkpoints(checkpoints_dir)?.into_iter().rev().filter(|(found, _)| *found < step) {
        match verify(&dir) {
            Ok(_) => {
                return Ok(Newest { good: Some((found, dir)), damaged });
            }
            Err(error) => damaged.push((dir, error)),
        }
    }
    Ok(Newest { good: None, damaged })
}

/// Gives the checkpoints of a folder by their names, oldest first, without looking into them.
///
/// # Errors
/// [`Error::Io`].
pub fn checkpoints(checkpoints_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for name in names(checkpoints_dir)? {
        let step = name.strip_prefix(STEP).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        let dir = checkpoints_dir.join(&name);
        if let Some(Ok(step)) = step.map(str::parse::<u64>)
            && dir.is_dir()
        {
            found.push((step, dir));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads a file through once, in pieces: files can be larger than the memory.
fn checksum(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut hash = Xxh3Default::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece).map_err(Error::io("read", path))? {
            0 => return Ok(format!("{:016x}", hash.digest())),
            read => hash.update(&piece[..read]),
        }
    }
}
