//! Writing folders that are whole or absent: under another name at first, described by a manifest, renamed when complete.
//!
//! A run that is killed on the way leaves only folders whose names begin with `.incomplete-`. [`sweep_incomplete`] removes
//! them at the next start, but for a whole one that was about to be replaced: that one is put back. One that cannot be
//! read stays where it is, and ends the start.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3Default;

use super::manifest::{FileEntry, MANIFEST_FILE, Manifest, verify};
use crate::disk::{self, Disk, DiskFile, make_folder, names, remove_tree, sync_parent};
use crate::error::{Error, Result};

/// The beginning of the names of folders that are being written.
const INCOMPLETE: &str = ".incomplete-";
/// Of those that are being replaced.
const REPLACED: &str = ".incomplete-old-";
/// Of those that are being deleted.
const DELETED: &str = ".incomplete-gone-";

/// Bytes that are handed to the system at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes a folder so that it appears under its final name only when it is whole and on the disk.
///
/// # Errors
/// What `write` gives, after its folder was removed; [`Error::Failed`] if the final name is taken by anything but an
/// empty folder; [`Error::Io`].
pub fn write_whole(
    disk: &dyn Disk,
    final_dir: &Path,
    write: impl FnOnce(&mut NewFolder<'_>) -> Result<()>,
) -> Result<Manifest> {
    let is_taken = match std::fs::read_dir(final_dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => std::fs::symlink_metadata(final_dir).is_ok(),
    };
    if is_taken {
        let place = final_dir.display().to_string();
        return Err(Error::failed(place, "already exists").hint("move it away, or name another place"));
    }
    let prepared = prepare(disk, final_dir, write)?;
    publish(disk, prepared, final_dir)
}

/// Does as [`write_whole`], and replaces a folder that has the final name already.
///
/// # Errors
/// As [`write_whole`].
pub fn replace_whole(
    disk: &dyn Disk,
    final_dir: &Path,
    write: impl FnOnce(&mut NewFolder<'_>) -> Result<()>,
) -> Result<Manifest> {
    let old = sibling(final_dir, REPLACED)?;
    put_back(disk, &old, final_dir)?;
    let prepared = prepare(disk, final_dir, write)?;
    remove_tree(disk, &old)?;
    let replaces = final_dir.exists();
    if replaces {
        disk.rename(final_dir, &old).map_err(Error::io("rename", final_dir))?;
    }
    let manifest = match publish(disk, prepared, final_dir) {
        Ok(manifest) => manifest,
        Err(error) => {
            if replaces && !final_dir.exists() {
                // If this fails too, the next start puts it back.
                let _ = disk.rename(&old, final_dir);
            }
            return Err(error);
        }
    };
    remove_tree(disk, &old)?;
    Ok(manifest)
}

/// Deletes a whole folder so that at no time a part of it stands under its name.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_whole(disk: &dyn Disk, dir: &Path) -> Result<()> {
    let doomed = sibling(dir, DELETED)?;
    remove_tree(disk, &doomed)?;
    disk.rename(dir, &doomed).map_err(Error::io("rename", dir))?;
    sync_parent(disk, dir)?;
    remove_tree(disk, &doomed)
}

/// Removes what interrupted writes and deletions left in a folder, and puts a whole folder back whose replacement never
/// came. A folder that does not exist holds nothing.
///
/// # Errors
/// [`Error::Io`].
pub fn sweep_incomplete(disk: &dyn Disk, parent: &Path) -> Result<()> {
    for name in names(parent)? {
        let left = parent.join(&name);
        if !name.starts_with(INCOMPLETE) || !left.is_dir() {
            continue;
        }
        if let Some(name) = name.strip_prefix(REPLACED) {
            put_back(disk, &left, &parent.join(name))?;
        }
        remove_tree(disk, &left)?;
    }
    Ok(())
}

/// Gives a folder that was about to be replaced its name back where its successor never came and it is whole.
///
/// # Errors
/// [`Error::Failed`] where it cannot be read: it may be the only copy, so nobody may delete it then; [`Error::Io`].
fn put_back(disk: &dyn Disk, old: &Path, final_dir: &Path) -> Result<()> {
    let is_there = |path: &Path| path.try_exists().map_err(Error::io("read", path));
    if !is_there(old)? || is_there(final_dir)? {
        return Ok(());
    }
    match verify(old) {
        Ok(_) => {
            disk.rename(old, final_dir).map_err(Error::io("rename", old))?;
            sync_parent(disk, final_dir)
        }
        Err(Error::Invalid(_)) => Ok(()),
        Err(error) => {
            let what = format!("cannot be read, and may be the only copy of {}: {error}", final_dir.display());
            Err(Error::failed(old.display().to_string(), what)
                .hint("see whether the disk is sound, or move this folder away"))
        }
    }
}

/// Whether a name is that of a folder that was being written, replaced or deleted.
pub fn is_incomplete(name: &str) -> bool {
    name.starts_with(INCOMPLETE)
}

/// A folder that is being written, under its temporary name.
#[derive(Debug)]
pub struct NewFolder<'a> {
    disk: &'a dyn Disk,
    dir: PathBuf,
    files: BTreeMap<String, FileEntry>,
}

impl NewFolder<'_> {
    /// Writes a file into the folder and brings it to the disk.
    ///
    /// # Errors
    /// What `write` gives; [`Error::Io`].
    pub fn write(&mut self, name: &str, write: impl FnOnce(&mut NewFile) -> Result<()>) -> Result<()> {
        let path = self.dir.join(name);
        let file = self.disk.create(&path).map_err(Error::io("create", &path))?;
        let summed = Summed { file, hash: Xxh3Default::new(), size_bytes: 0 };
        let mut file = NewFile { path, out: BufWriter::with_capacity(BUFFER_BYTES, summed) };
        write(&mut file)?;
        let NewFile { path, out } = file;
        let summed = out.into_inner().map_err(|error| Error::io("write", &path)(error.into_error()))?;
        summed.file.sync().map_err(Error::io("sync", &path))?;
        let entry = FileEntry { size_bytes: summed.size_bytes, xxh3_64: format!("{:016x}", summed.hash.digest()) };
        self.files.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Writes a small file from memory.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write(name, |file| {
            let path = file.path.clone();
            file.write_all(bytes).map_err(Error::io("write", &path))
        })
    }

    /// Copies a file into the folder under its own name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn copy(&mut self, from: &Path) -> Result<()> {
        let name = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut source = std::fs::File::open(from).map_err(Error::io("read", from))?;
        self.write(&name, |file| io::copy(&mut source, file).map(drop).map_err(Error::io("copy", from)))
    }
}

/// A file of a new folder, summed up as it is written.
pub struct NewFile {
    path: PathBuf,
    out: BufWriter<Summed>,
}

impl NewFile {
    /// Where it is being written.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

struct Summed {
    file: Box<dyn DiskFile>,
    hash: Xxh3Default,
    size_bytes: u64,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // In pieces: they are still in the cache when they are summed up.
        let written = self.file.write(&bytes[..bytes.len().min(BUFFER_BYTES)])?;
        self.hash.update(&bytes[..written]);
        self.size_bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A folder that is complete and on the disk, yet under its temporary name.
struct Prepared {
    dir: PathBuf,
    manifest: Manifest,
}

fn prepare(
    disk: &dyn Disk,
    final_dir: &Path,
    write: impl FnOnce(&mut NewFolder<'_>) -> Result<()>,
) -> Result<Prepared> {
    let dir = sibling(final_dir, INCOMPLETE)?;
    remove_tree(disk, &dir)?;
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_folder(disk, parent)?;
    }
    disk.create_folder(&dir).map_err(Error::io("create", &dir))?;
    let mut folder = NewFolder { disk, dir: dir.clone(), files: BTreeMap::new() };
    let sealed = write(&mut folder).and_then(|()| seal(folder));
    match sealed {
        Ok(manifest) => Ok(Prepared { dir, manifest }),
        Err(error) => {
            // The error at hand matters more than one of cleaning up.
            let _ = remove_tree(disk, &dir);
            Err(error)
        }
    }
}

/// Writes the manifest, the last of a folder's files.
fn seal(folder: NewFolder<'_>) -> Result<Manifest> {
    let NewFolder { disk, dir, files } = folder;
    let manifest = Manifest::of(files);
    let path = dir.join(MANIFEST_FILE);
    let file = disk.create(&path).map_err(Error::io("create", &path))?;
    disk::write_all(&*file, manifest.to_text().as_bytes()).map_err(Error::io("write", &path))?;
    file.sync().map_err(Error::io("sync", &path))?;
    disk.sync_folder(&dir).map_err(Error::io("sync", &dir))?;
    Ok(manifest)
}

fn publish(disk: &dyn Disk, prepared: Prepared, final_dir: &Path) -> Result<Manifest> {
    if let Err(error) = disk.rename(&prepared.dir, final_dir) {
        let _ = remove_tree(disk, &prepared.dir);
        return Err(Error::io("rename to", final_dir)(error));
    }
    sync_parent(disk, final_dir)?;
    Ok(prepared.manifest)
}

/// Names the temporary folder beside a final one.
fn sibling(final_dir: &Path, prefix: &str) -> Result<PathBuf> {
    match final_dir.file_name() {
        Some(name) => Ok(final_dir.with_file_name(format!("{prefix}{}", name.to_string_lossy()))),
        None => Err(Error::failed(final_dir.display().to_string(), "this path does not end in a name")),
    }
}
