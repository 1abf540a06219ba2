//! Folders that are whole or absent: written under another name, described by a manifest, renamed when complete.
//!
//! A folder under its final name holds everything it ever will, and `MANIFEST.json` in it lists the size and the
//! checksum of every file. A run that is killed while writing leaves only a folder whose name begins with
//! `.incomplete-`, which [`sweep_incomplete`] removes at the next start.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3Default;

use crate::error::{Error, Fault, Result};

/// The name of the manifest in its folder.
pub const MANIFEST_FILE: &str = "MANIFEST.json";

/// The version of the manifest's own format.
const FORMAT_VERSION: u32 = 1;

/// The beginning of the names of folders that are being written or deleted.
const INCOMPLETE: &str = ".incomplete-";

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

/// Writes a folder so that it appears under its final name only when it is whole and on disk.
///
/// `write` gets an empty folder beside the final one and puts files (no folders) into it.
///
/// # Errors
/// What `write` gives, after its folder was removed; [`Error::Failed`] if the final name is taken by anything but an
/// empty folder; [`Error::Io`].
pub fn write_whole(final_dir: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<Manifest> {
    let is_taken = match fs::read_dir(final_dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => fs::symlink_metadata(final_dir).is_ok(),
    };
    if is_taken {
        let place = final_dir.display().to_string();
        return Err(Error::failed(place, "already exists").hint("move it away, or name another place"));
    }
    prepare(final_dir, write)?.publish(final_dir)
}

/// Does as [`write_whole`], and replaces a folder that has the final name already.
///
/// # Errors
/// As [`write_whole`].
pub fn replace_whole(final_dir: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<Manifest> {
    let prepared = prepare(final_dir, write)?;
    if final_dir.exists() {
        remove_whole(final_dir)?;
    }
    prepared.publish(final_dir)
}

/// Deletes a whole folder so that at no time a part of it stands under its name.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn remove_whole(dir: &Path) -> Result<()> {
    let doomed = sibling(dir, "old-")?;
    remove_if_there(&doomed)?;
    fs::rename(dir, &doomed).map_err(Error::io("rename", dir))?;
    sync_parent(dir)?;
    remove_if_there(&doomed)
}

/// Removes what interrupted writes and deletions left in a folder; gives the names of what went. A folder that does not
/// exist holds nothing.
///
/// # Errors
/// [`Error::Io`].
pub fn sweep_incomplete(parent: &Path) -> Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    for name in names(parent)? {
        if name.starts_with(INCOMPLETE) && parent.join(&name).is_dir() {
            remove_if_there(&parent.join(&name))?;
            swept.push(parent.join(name));
        }
    }
    Ok(swept)
}

/// Reads the manifest of a folder and holds every file against it.
///
/// # Errors
/// [`Error::Invalid`] with each file that is missing, extra, shorter, longer or otherwise than it was written, and when
/// the manifest itself is missing or unreadable; [`Error::Io`] for a file that cannot be read.
pub fn verify(dir: &Path) -> Result<Manifest> {
    let manifest = read_manifest(dir)?;
    let mut faults = Vec::new();
    for (name, written) in &manifest.files {
        let path = dir.join(name);
        let place = path.display().to_string();
        match fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                faults.push(Fault::new(place, format!("missing: {MANIFEST_FILE} lists it")));
            }
            Err(error) => return Err(Error::io("read", &path)(error)),
            Ok(found) if found.len() != written.size_bytes => {
                let what = format!("damaged: expected {} bytes, found {}", written.size_bytes, found.len());
                faults.push(Fault::new(place, what));
            }
            // Only a file of the right size is worth reading.
            Ok(_) => {
                let found = checksum(&path)?.xxh3_64;
                if found != written.xxh3_64 {
                    let what = format!("damaged: expected checksum {}, found {found}", written.xxh3_64);
                    faults.push(Fault::new(place, what));
                }
            }
        }
    }
    for name in names(dir)? {
        if name != MANIFEST_FILE && !manifest.files.contains_key(&name) {
            let place = dir.join(name).display().to_string();
            faults.push(Fault::new(place, format!("unexpected: {MANIFEST_FILE} does not list it")));
        }
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
    let mut damaged = Vec::new();
    for (step, dir) in checkpoints(checkpoints_dir)?.into_iter().rev() {
        match verify(&dir) {
            Ok(_) => {
                return Ok(Newest { good: Some((step, dir)), damaged });
            }
            Err(error) => damaged.push((dir, error)),
        }
    }
    Ok(Newest { good: None, damaged })
}

/// Gives the checkpoints of a folder by their names, oldest first, without looking into them.
pub(super) fn checkpoints(checkpoints_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
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

/// A folder that is complete and on disk, yet under its temporary name.
struct Prepared {
    dir: PathBuf,
    manifest: Manifest,
}

impl Prepared {
    fn publish(self, final_dir: &Path) -> Result<Manifest> {
        if let Err(error) = fs::rename(&self.dir, final_dir) {
            // The error at hand matters more than one of cleaning up.
            let _ = fs::remove_dir_all(&self.dir);
            return Err(Error::io("rename to", final_dir)(error));
        }
        sync_parent(final_dir)?;
        Ok(self.manifest)
    }
}

fn prepare(final_dir: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<Prepared> {
    let dir = sibling(final_dir, "")?;
    remove_if_there(&dir)?;
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    match write(&dir).and_then(|()| seal(&dir)) {
        Ok(manifest) => Ok(Prepared { dir, manifest }),
        Err(error) => {
            let _ = fs::remove_dir_all(&dir);
            Err(error)
        }
    }
}

/// Brings every file of a folder to the disk and writes the manifest last.
fn seal(dir: &Path) -> Result<Manifest> {
    let mut files = BTreeMap::new();
    for name in names(dir)? {
        let path = dir.join(&name);
        File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io("sync", &path))?;
        files.insert(name, checksum(&path)?);
    }
    let manifest = Manifest { format_version: FORMAT_VERSION, files };
    let path = dir.join(MANIFEST_FILE);
    let mut text = serde_json::to_string_pretty(&manifest).map_err(|error| Error::io("write", &path)(error.into()))?;
    text.push('\n');
    let write = |path: &Path| -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write(&path).map_err(Error::io("write", &path))?;
    sync_dir(dir)?;
    Ok(manifest)
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST_FILE);
    let place = path.display().to_string();
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::invalid(place, "missing: the folder was never completed, or has lost its manifest"));
        }
        Err(error) => return Err(Error::io("read", &path)(error)),
    };
    let manifest: Manifest =
        serde_json::from_slice(&text).map_err(|error| Error::invalid(&place, format!("damaged: {error}")))?;
    if manifest.format_version != FORMAT_VERSION {
        let what = format!("expected format version {FORMAT_VERSION}, found {}", manifest.format_version);
        return Err(Error::invalid(place, what).hint("use the version of Bellora that wrote it"));
    }
    Ok(manifest)
}

/// Reads a file through once, in pieces: files can be larger than the memory.
fn checksum(path: &Path) -> Result<FileEntry> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut hash = Xxh3Default::new();
    let mut piece = vec![0; 1 << 20];
    let mut size_bytes = 0;
    loop {
        match file.read(&mut piece).map_err(Error::io("read", path))? {
            0 => {
                return Ok(FileEntry { size_bytes, xxh3_64: format!("{:016x}", hash.digest()) });
            }
            read => {
                hash.update(&piece[..read]);
                size_bytes += read as u64;
            }
        }
    }
}

/// Gives the names in a folder, sorted; none when there is no such folder.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("read", dir))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Names the temporary folder beside a final one.
fn sibling(final_dir: &Path, kind: &str) -> Result<PathBuf> {
    match final_dir.file_name() {
        Some(name) => Ok(final_dir.with_file_name(format!("{INCOMPLETE}{kind}{}", name.to_string_lossy()))),
        None => Err(Error::failed(final_dir.display().to_string(), "this path does not end in a name")),
    }
}

fn remove_if_there(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("delete", dir)(error)),
        _ => Ok(()),
    }
}

fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => sync_dir(Path::new(".")),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(Error::io("sync", dir))
}
