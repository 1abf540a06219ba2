//! How much memory a process may still take on a CPU: the least of what the system can spare, what its control groups leave
//! (containers, batch systems), and what is left of its address space (`ulimit -v`).

use std::fmt;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};

/// Bytes that can still be taken, and what sets the bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// How many.
    pub bytes: u64,
    /// What sets it.
    pub bound: Bound,
}

/// What bounds the memory of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bound {
    /// The memory of the machine, or of a GPU.
    Machine,
    /// The limit of a control group.
    ControlGroup(PathBuf),
    /// The limit on the address space of a process.
    AddressSpace,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("free on this machine"),
            Self::ControlGroup(dir) => write!(f, "left of the limit of the control group {}", dir.display()),
            Self::AddressSpace => f.write_str("left of the limit on address space (ulimit -v)"),
        }
    }
}

/// What this process may still take.
///
/// # Errors
/// A system that does not say what it can spare.
pub fn room() -> Result<Room> {
    let machine = Room { bytes: proc_bytes("/proc/meminfo", "MemAvailable:")?, bound: Bound::Machine };
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let all = [Some(machine.clone()), of_groups(&groups, &mounts), of_address_space()];
    Ok(all.into_iter().flatten().min_by_key(|room| room.bytes).unwrap_or(machine))
}

fn of_address_space() -> Option<Room> {
    let limit = getrlimit(Resource::As).current?;
    let taken = proc_bytes("/proc/self/status", "VmSize:").ok()?;
    Some(Room { bytes: limit.saturating_sub(taken), bound: Bound::AddressSpace })
}

/// The files in which a hierarchy of control groups says what it counts.
struct Names {
    limit: &'static str,
    taken: &'static str,
    /// Lines of `memory.stat`: files that are in memory and can be read again.
    files: [&'static str; 2],
}

const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    taken: "memory.usage_in_bytes",
    files: ["total_active_file", "total_inactive_file"],
};
const V2: Names = Names { limit: "memory.max", taken: "memory.current", files: ["active_file", "inactive_file"] };

/// The control group with the least room of those that a process is in, by the texts of `/proc/self/cgroup` and
/// `/proc/self/mountinfo`.
fn of_groups(groups: &str, mounts: &str) -> Option<Room> {
    let mut rooms = Vec::new();
    for line in groups.lines() {
        // Number, controllers (none in version 2), path.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (kind, names) = match controllers {
            "" => ("cgroup2", &V2),
            _ if controllers.split(',').any(|controller| controller == "memory") => ("cgroup", &V1),
            _ => continue,
        };
        let Some((root, mount)) = mounts.lines().find_map(|line| mount_of(line, kind)) else { continue };
        // In a container the root of the mount may be the process's own group, and the path one that only the host knows.
        let below = Path::new(path).strip_prefix(&root).unwrap_or(Path::new(""));
        let group = mount.join(below);
        rooms
            .extend(group.ancestors().take_while(|dir| dir.starts_with(&mount)).filter_map(|dir| of_group(dir, names)));
    }
    rooms.into_iter().min_by_key(|room| room.bytes)
}

/// Root and mount point of a line of `mountinfo`, if it mounts the hierarchy that counts memory.
fn mount_of(line: &str, kind: &str) -> Option<(PathBuf, PathBuf)> {
    let (mount, system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, point) = (mount.next()?, mount.next()?);
    let mut system = system.split(' ');
    let (found, options) = (system.next()?, system.nth(1).unwrap_or_default());
    let counts = kind == "cgroup2" || options.split(',').any(|option| option == "memory");
    (found == kind && counts).then(|| (root.into(), point.into()))
}

fn of_group(dir: &Path, names: &Names) -> Option<Room> {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    // Version 2 says `max` where there is no limit.
    let limit: u64 = read(names.limit)?.trim().parse().ok()?;
    let taken: u64 = read(names.taken)?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let of_line = |line: &str| {
        let (name, bytes) = line.split_once(' ')?;
        names.files.contains(&name).then(|| bytes.trim().parse::<u64>().ok())?
    };
    let files: u64 = stat.lines().filter_map(of_line).sum();
    let bytes = limit.saturating_sub(taken.saturating_sub(files));
    Some(Room { bytes, bound: Bound::ControlGroup(dir.to_path_buf()) })
}

/// A line of one of Linux's files of `NAME: KILOBYTES kB`, in bytes.
pub(super) fn proc_bytes(path: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", Path::new(path)))?;
    let kilobytes =
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.map(|kb| kb << 10).ok_or_else(|| Error::failed(path, format!("has no number for {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups in a folder: the path of each below the mount, with its limit, what it has taken, and files in memory.
    fn made(groups: &[(&str, &str, u64, u64)], names: &Names) -> tempfile::TempDir {
        let mount = tempfile::tempdir().unwrap();
        for (path, limit, taken, files) in groups {
            let dir = mount.path().join(path);
            std::fs::create_dir_all(&dir).unwrap();
            let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
            write(names.limit, format!("{limit}\n"));
            write(names.taken, format!("{taken}\n"));
            write("memory.stat", format!("anon 1\n{} {files}\n{} 5\nother 9\n", names.files[0], names.files[1]));
        }
        mount
    }

    #[test]
    fn the_group_with_the_least_room_bounds_version_2() {
        let mount = made(&[("job", "1000", 300, 95), ("job/step", "max", 300, 0)], &V2);
        let point = mount.path().display();
        let mounts =
            format!("30 20 0:1 / /tmp rw - tmpfs tmpfs rw\n31 20 0:2 / {point} rw shared:1 - cgroup2 cgroup2 rw\n");
        let room = of_groups("0::/job/step\n", &mounts).unwrap();
        assert_eq!(room, Room { bytes: 800, bound: Bound::ControlGroup(mount.path().join("job")) });
        assert_eq!(of_groups("0::/elsewhere\n", &mounts), None);
    }

    #[test]
    fn version_1_counts_memory_in_a_hierarchy_of_its_own() {
        let mount = made(&[("a", "2000", 500, 0), ("a/b", "9223372036854771712", 400, 0)], &V1);
        let point = mount.path().display();
        let mounts = format!(
            "31 20 0:2 / /elsewhere rw - cgroup cgroup rw,cpu\n32 20 0:3 / {point} rw - cgroup cgroup rw,memory\n"
        );
        let room = of_groups("5:cpu:/a/b\n4:memory:/a/b\n0::/\n", &mounts).unwrap();
        assert_eq!(room, Room { bytes: 1505, bound: Bound::ControlGroup(mount.path().join("a")) });
    }

    #[test]
    fn a_container_sees_its_own_group_as_the_root() {
        let mount = made(&[("", "700", 100, 0)], &V2);
        let mounts = format!("31 20 0:2 /docker/abc {} rw - cgroup2 cgroup rw\n", mount.path().display());
        for path in ["/docker/abc", "/"] {
            assert_eq!(of_groups(&format!("0::{path}\n"), &mounts).unwrap().bytes, 605);
        }
    }
}
