//! The disk as a run uses it. Everything that must not be lost is written through a [`Disk`], so that tests can put one in
//! its place that fails, fills up or loses power at any of its operations. The product has [`LocalDisk`], and
//! [`Nowhere`] for those that leave the writing to another process.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// What changes a disk, and the room on it. Reading goes past it.
pub trait Disk: Debug + Send + Sync {
    /// Creates a folder and those above it.
    fn create_folder(&self, path: &Path) -> io::Result<()>;
    /// Creates an empty file, or empties the one that is there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens a file to write at its end, creating it if need be.
    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Gives a file or folder another name, in place of a file that has it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Deletes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Deletes an empty folder.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;
    /// Brings the names in a folder to the disk: which files and folders it holds.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;
    /// The bytes that may still be written below a folder that exists.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// An open file. Any thread may write to it or sync it.
pub trait DiskFile: Debug + Send + Sync {
    /// Writes some of the bytes where the last write ended, and gives how many.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Brings what was written to the disk.
    fn sync(&self) -> io::Result<()>;
}

/// The file systems of this machine.
#[derive(Debug, Clone, Copy)]
pub struct LocalDisk;

impl LocalDisk {
    /// The one to hand about.
    pub fn shared() -> Arc<dyn Disk> {
        Arc::new(Self)
    }
}

impl Disk for LocalDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(File::create(path)?))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(OpenOptions::new().append(true).create(true).open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let room = rustix::fs::statvfs(path)?;
        if room.f_blocks == 0 {
            // Not a full one, but one that does not count.
            return Err(ErrorKind::Unsupported.into());
        }
        Ok(room.f_bavail.saturating_mul(room.f_frsize))
    }
}

/// A disk that keeps nothing: for the ranks of a job that leave the writing to rank 0.
#[derive(Debug, Clone, Copy)]
pub struct Nowhere;

impl Disk for Nowhere {
    fn create_folder(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn create(&self, _: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(Self))
    }

    fn append(&self, _: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(Self))
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_file(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_folder(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_folder(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

impl DiskFile for Nowhere {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for File {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        // The trait of the standard library, not this one.
        io::Write::write(&mut &*self, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Writes all of the bytes.
///
/// # Errors
/// What the disk says; some of the bytes may have been written then.
pub fn write_all(file: &dyn DiskFile, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Puts a file in place, or replaces it: whole and on the disk under its name, or as it was before.
///
/// # Errors
/// [`Error::Io`].
pub fn put_file(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<()> {
    let tmp = temporary(path);
    let written = (|| {
        let file = disk.create(&tmp).map_err(Error::io("create", &tmp))?;
        write_all(&*file, bytes).map_err(Error::io("write", &tmp))?;
        file.sync().map_err(Error::io("sync", &tmp))?;
        disk.rename(&tmp, path).map_err(Error::io("replace", path))
    })();
    if let Err(error) = written {
        // The error at hand matters more than one of cleaning up.
        let _ = disk.remove_file(&tmp);
        return Err(error);
    }
    sync_parent(disk, path)
}

/// Creates a folder and those above it, as far as they are missing. Their names are on the disk then.
///
/// # Errors
/// [`Error::Io`].
pub fn make_folder(disk: &dyn Disk, path: &Path) -> Result<()> {
    let is_missing = |above: &&Path| !above.as_os_str().is_empty() && !above.exists();
    let missing: Vec<&Path> = path.ancestors().take_while(is_missing).collect();
    if !missing.is_empty() {
        disk.create_folder(path).map_err(Error::io("create", path))?;
    }
    missing.into_iter().try_for_each(|made| sync_parent(disk, made))
}

/// The name beside a file under which its next contents are written.
pub fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// Whether a name is one that [`temporary`] gives.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".new")
}

/// Deletes a file, or a folder with all that is in it; nothing if there is none.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_tree(disk: &dyn Disk, path: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    if !found.is_dir() {
        return disk.remove_file(path).map_err(Error::io("delete", path));
    }
    for name in names(path)? {
        remove_tree(disk, &path.join(name))?;
    }
    disk.remove_folder(path).map_err(Error::io("delete", path))
}

/// Brings the name of a file or folder to the disk.
///
/// # Errors
/// [`Error::Io`].
pub fn sync_parent(disk: &dyn Disk, path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    disk.sync_folder(parent).map_err(Error::io("sync", parent))
}

/// The bytes that may still be written to a place, whose folder need not exist yet; `None` where the system cannot say.
pub fn free_bytes(disk: &dyn Disk, path: &Path) -> Option<u64> {
    disk.free_bytes(path.ancestors().find(|above| above.is_dir())?).ok()
}

/// Gives the names in a folder, sorted; none when there is no such folder.
///
/// # Errors
/// [`Error::Io`].
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
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
