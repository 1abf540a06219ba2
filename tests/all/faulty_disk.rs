//! A disk for tests that fails, fills up or loses power at a chosen operation, and that knows what it may hold afterwards.
//!
//! It acts on a real folder and keeps beside it a model of what of that folder is on the disk for certain: the contents of
//! a file as of its last sync, the names in a folder as of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use bellora::disk::{Disk, DiskFile, LocalDisk};

use crate::support::Draws;

/// An operation by what it does to which file, and how many like it came before: the same in every run, however the
/// threads of a run take turns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Point {
    pub(crate) operation: &'static str,
    /// Beneath the disk's folder; times of day in names are left out.
    pub(crate) path: String,
    /// Counted from 1.
    pub(crate) nth: usize,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of {}", self.operation, self.nth, self.path)
    }
}

/// What goes wrong at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The operation fails once, as on a broken disk.
    Broken,
    /// There is no room for this operation, nor for those after it until so many were refused. A write that is
    /// `torn` gets half of its bytes down first.
    Full { torn: bool, n_refused: usize },
    /// This operation and every later one fail.
    PowerCut,
}

/// The disk, over a folder.
#[derive(Debug, Clone)]
pub(crate) struct FaultyDisk(Arc<Mutex<Inside>>);

#[derive(Debug)]
struct Inside {
    root: PathBuf,
    nodes: Vec<Node>,
    done: Vec<Point>,
    plan: Option<(Point, Fault)>,
    has_failed: bool,
    /// Operations that are still to be refused for want of room.
    n_to_refuse: usize,
    is_off: bool,
}

/// A file or folder, whatever its name.
#[derive(Debug, Clone)]
enum Node {
    File {
        now: Vec<u8>,
        synced: Vec<u8>,
    },
    Folder {
        now: BTreeMap<String, usize>,
        synced: BTreeMap<String, usize>,
        /// What made the one out of the other.
        changes: Vec<Change>,
    },
}

#[derive(Debug, Clone)]
enum Change {
    Put(String, usize),
    Gone(String),
}

impl Node {
    fn folder() -> Self {
        Self::Folder { now: BTreeMap::new(), synced: BTreeMap::new(), changes: Vec::new() }
    }
}

/// The node of the disk's folder.
const ROOT: usize = 0;

impl FaultyDisk {
    /// A disk without a fault. What the folder holds already is on it for certain.
    pub(crate) fn new(root: &Path) -> Self {
        let inside = Inside {
            root: root.to_owned(),
            nodes: Vec::new(),
            done: Vec::new(),
            plan: None,
            has_failed: false,
            n_to_refuse: 0,
            is_off: false,
        };
        let disk = Self(Arc::new(Mutex::new(inside)));
        disk.inside().take_in(root);
        disk
    }

    /// A disk with one.
    pub(crate) fn failing(root: &Path, at: &Point, fault: Fault) -> Self {
        let disk = Self::new(root);
        disk.inside().plan = Some((at.clone(), fault));
        disk
    }

    /// As the product takes it.
    pub(crate) fn shared(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    /// Every operation so far, in order.
    pub(crate) fn done(&self) -> Vec<Point> {
        self.inside().done.clone()
    }

    /// Whether the fault has come.
    pub(crate) fn has_failed(&self) -> bool {
        self.inside().has_failed
    }

    /// Names what stands in the folder otherwise than this disk was told: what was written past it.
    pub(crate) fn written_past(&self) -> Vec<String> {
        let inside = self.inside();
        let (mut told, mut real) = (BTreeMap::new(), BTreeMap::new());
        inside.list(ROOT, "", &mut told);
        read_tree(&inside.root, "", &mut real);
        let names: BTreeSet<&String> = told.keys().chain(real.keys()).collect();
        names.into_iter().filter(|name| told.get(*name) != real.get(*name)).cloned().collect()
    }

    /// Makes the folder what the disk may hold when power has gone: all that was synced, and of the rest what the seed
    /// says. Nothing may use the disk any more.
    pub(crate) fn after_power_cut(&self, seed: u64) {
        let inside = self.inside();
        for name in bellora::disk::names(&inside.root).unwrap() {
            bellora::disk::remove_tree(&LocalDisk, &inside.root.join(name)).unwrap();
        }
        inside.survive(ROOT, &inside.root, &mut Chance { kind: seed % 3, draws: Draws::new(seed) });
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap()
    }

    /// Does an operation, if it does not fail.
    fn act<T>(
        &self,
        operation: &'static str,
        path: &Path,
        act: impl FnOnce(&mut Inside, Cut) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut inside = self.inside();
        if !path.starts_with(&inside.root) {
            return act(&mut inside, Cut::No);
        }
        let cut = inside.meet(operation, path)?;
        act(&mut inside, cut)
    }
}

/// Whether a write is to be cut short.
#[derive(PartialEq, Eq)]
enum Cut {
    No,
    Half,
}

/// What a power cut does to what was not synced.
struct Chance {
    /// 0: nothing of it is there; 1: all of it; 2: some, and files are torn.
    kind: u64,
    draws: Draws,
}

impl Chance {
    fn keeps(&mut self) -> bool {
        self.kind == 1 || self.kind == 2 && self.draws.below(2) == 0
    }

    fn contents(&mut self, synced: &[u8], now: &[u8]) -> Vec<u8> {
        if synced == now || self.kind == 1 {
            return now.to_vec();
        }
        if self.kind == 0 {
            return synced.to_vec();
        }
        // A file that was emptied and written again since has nothing that is certain.
        let n_certain = if now.starts_with(synced) { synced.len() } else { 0 };
        let (certain, rest) = now.split_at(n_certain);
        let rest = match self.draws.below(6) {
            0 => return synced.to_vec(),
            1 => rest.to_vec(),
            2 => Vec::new(),
            3 => rest[..rest.len() / 2].to_vec(),
            4 => vec![0; rest.len()],
            _ => rest.iter().map(|_| self.draws.below(256) as u8).collect(),
        };
        [certain, &rest].concat()
    }
}

impl Inside {
    /// Counts an operation, and gives the error that it meets.
    fn meet(&mut self, operation: &'static str, path: &Path) -> io::Result<Cut> {
        let broken = || Err(io::Error::from_raw_os_error(5));
        let full = || Err(io::Error::from_raw_os_error(28));
        if self.is_off {
            return broken();
        }
        let path = name_of(path.strip_prefix(&self.root).unwrap());
        let nth = self.done.iter().filter(|p| p.operation == operation && p.path == path).count() + 1;
        let point = Point { operation, path, nth };
        self.done.push(point.clone());
        if let Some((_, fault)) = self.plan.take_if(|(at, _)| *at == point) {
            self.has_failed = true;
            match fault {
                Fault::Broken => return broken(),
                Fault::PowerCut => {
                    self.is_off = true;
                    return broken();
                }
                Fault::Full { torn, n_refused } => {
                    let is_torn = torn && operation == "write";
                    self.n_to_refuse = if is_torn { n_refused } else { n_refused.saturating_sub(1) };
                    return if is_torn { Ok(Cut::Half) } else { full() };
                }
            }
        }
        if self.n_to_refuse > 0 && ["create folder", "create", "write"].contains(&operation) {
            self.n_to_refuse -= 1;
            return full();
        }
        Ok(Cut::No)
    }

    /// Takes a folder that exists, or a file, with all that is in it; gives its node.
    fn take_in(&mut self, path: &Path) -> usize {
        if !path.is_dir() {
            let contents = std::fs::read(path).unwrap();
            return self.add(Node::File { now: contents.clone(), synced: contents });
        }
        let node = self.add(Node::folder());
        for name in bellora::disk::names(path).unwrap() {
            let child = self.take_in(&path.join(&name));
            let Node::Folder { now, synced, .. } = &mut self.nodes[node] else { unreachable!() };
            now.insert(name.clone(), child);
            synced.insert(name, child);
        }
        node
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn find(&self, path: &Path) -> Option<usize> {
        let mut node = ROOT;
        for part in path.strip_prefix(&self.root).ok()? {
            let Node::Folder { now, .. } = &self.nodes[node] else { return None };
            node = *now.get(&*part.to_string_lossy())?;
        }
        Some(node)
    }

    /// Changes the names in the folder that a path is in.
    fn change(&mut self, path: &Path, change: impl FnOnce(String) -> Change) {
        if !path.starts_with(&self.root) {
            return;
        }
        let folder = self.find(path.parent().unwrap()).unwrap();
        let change = change(path.file_name().unwrap().to_string_lossy().into_owned());
        let Node::Folder { now, changes, .. } = &mut self.nodes[folder] else { panic!("no folder: {path:?}") };
        apply(now, &change);
        changes.push(change);
    }

    /// The node of a file, made if there is none.
    fn file(&mut self, path: &Path) -> usize {
        self.find(path).unwrap_or_else(|| {
            let node = self.add(Node::File { now: Vec::new(), synced: Vec::new() });
            self.change(path, |name| Change::Put(name, node));
            node
        })
    }

    fn list(&self, node: usize, name: &str, found: &mut BTreeMap<String, Option<Vec<u8>>>) {
        match &self.nodes[node] {
            Node::File { now, .. } => {
                found.insert(name.to_owned(), Some(now.clone()));
            }
            Node::Folder { now, .. } => {
                found.insert(name.to_owned(), None);
                for (child, node) in now {
                    self.list(*node, &format!("{name}/{child}"), found);
                }
            }
        }
    }

    fn survive(&self, node: usize, path: &Path, chance: &mut Chance) {
        match &self.nodes[node] {
            Node::File { now, synced } => std::fs::write(path, chance.contents(synced, now)).unwrap(),
            Node::Folder { synced, changes, .. } => {
                std::fs::create_dir_all(path).unwrap();
                let mut names = synced.clone();
                changes.iter().filter(|_| chance.keeps()).for_each(|change| apply(&mut names, change));
                for (name, child) in names {
                    self.survive(child, &path.join(name), chance);
                }
            }
        }
    }
}

fn apply(names: &mut BTreeMap<String, usize>, change: &Change) {
    match change {
        Change::Put(name, node) => {
            // A node has one name: that it had another, or did not have it yet, goes with the same change.
            names.retain(|_, other| other != node);
            names.insert(name.clone(), *node);
        }
        Change::Gone(name) => {
            names.remove(name);
        }
    }
}

fn read_tree(path: &Path, name: &str, found: &mut BTreeMap<String, Option<Vec<u8>>>) {
    if path.is_dir() {
        found.insert(name.to_owned(), None);
        for child in bellora::disk::names(path).unwrap() {
            read_tree(&path.join(&child), &format!("{name}/{child}"), found);
        }
    } else {
        found.insert(name.to_owned(), Some(std::fs::read(path).unwrap()));
    }
}

/// A path as points name it: the times in the names of event files would make every run's points others.
fn name_of(path: &Path) -> String {
    let shown = path.display().to_string();
    let part = |part: &str| match part.bytes().all(|b| b.is_ascii_digit()) && part.len() >= 10 {
        true => "TIME".to_owned(),
        false => part.to_owned(),
    };
    if shown.is_empty() { ".".to_owned() } else { shown.split('.').map(part).collect::<Vec<_>>().join(".") }
}

impl Disk for FaultyDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        self.act("create folder", path, |inside, _| {
            LocalDisk.create_folder(path)?;
            let root = inside.root.clone();
            let beneath = path.ancestors().filter(|above| above.starts_with(&root)).collect::<Vec<_>>();
            for folder in beneath.into_iter().rev() {
                if inside.find(folder).is_none() {
                    let node = inside.add(Node::folder());
                    inside.change(folder, |name| Change::Put(name, node));
                }
            }
            Ok(())
        })
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.act("create", path, |inside, _| {
            let file = LocalDisk.create(path)?;
            if !path.starts_with(&inside.root) {
                return Ok(file);
            }
            let node = inside.file(path);
            let Node::File { now, .. } = &mut inside.nodes[node] else { panic!("no file: {path:?}") };
            now.clear();
            Ok(Box::new(FaultyFile { disk: self.clone(), path: path.to_owned(), node, file }))
        })
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.act("open", path, |inside, _| {
            let file = LocalDisk.append(path)?;
            if !path.starts_with(&inside.root) {
                return Ok(file);
            }
            let node = inside.file(path);
            Ok(Box::new(FaultyFile { disk: self.clone(), path: path.to_owned(), node, file }))
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        // By the new name: it says more.
        self.act("rename to", to, |inside, _| {
            assert_eq!(from.parent(), to.parent(), "a rename from one folder to another is not modelled");
            LocalDisk.rename(from, to)?;
            if let Some(node) = inside.find(from) {
                inside.change(to, |name| Change::Put(name, node));
            }
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.act("delete", path, |inside, _| {
            LocalDisk.remove_file(path)?;
            inside.change(path, Change::Gone);
            Ok(())
        })
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.act("delete folder", path, |inside, _| {
            LocalDisk.remove_folder(path)?;
            inside.change(path, Change::Gone);
            Ok(())
        })
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.act("sync folder", path, |inside, _| {
            // The real disk need not be waited for, but the folder must be there.
            path.read_dir()?;
            if let Some(node) = inside.find(path)
                && let Node::Folder { now, synced, changes } = &mut inside.nodes[node]
            {
                synced.clone_from(now);
                changes.clear();
            }
            Ok(())
        })
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.act("ask for room", path, |_, _| LocalDisk.free_bytes(path))
    }
}

#[derive(Debug)]
struct FaultyFile {
    disk: FaultyDisk,
    /// The name that it was opened by.
    path: PathBuf,
    node: usize,
    file: Box<dyn DiskFile>,
}

impl DiskFile for FaultyFile {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.disk.act("write", &self.path, |inside, cut| {
            let bytes = if cut == Cut::Half { &bytes[..bytes.len().div_ceil(2)] } else { bytes };
            let n_bytes = self.file.write(bytes)?;
            let Node::File { now, .. } = &mut inside.nodes[self.node] else { unreachable!() };
            now.extend_from_slice(&bytes[..n_bytes]);
            Ok(n_bytes)
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.act("sync", &self.path, |inside, _| {
            let Node::File { now, synced } = &mut inside.nodes[self.node] else { unreachable!() };
            synced.clone_from(now);
            Ok(())
        })
    }
}

/// Writes a file of its own, then replaces another by the product's way.
fn replace(disk: &dyn Disk, root: &Path) -> Result<(), String> {
    let said = |error: io::Error| error.to_string();
    disk.create_folder(&root.join("a/b")).map_err(said)?;
    disk.sync_folder(root).map_err(said)?;
    let file = disk.create(&root.join("a/b/new")).map_err(said)?;
    bellora::disk::write_all(&*file, b"never synced").map_err(said)?;
    let log = disk.append(&root.join("log")).map_err(said)?;
    bellora::disk::write_all(&*log, b"two\n").map_err(said)?;
    log.sync().map_err(said)?;
    bellora::disk::write_all(&*log, b"three\n").map_err(said)?;
    bellora::disk::put_file(disk, &root.join("kept"), b"the new text").map_err(|error| error.to_string())
}

fn old_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("kept"), "the old text").unwrap();
    std::fs::write(dir.path().join("log"), "one\n").unwrap();
    dir
}

#[test]
fn every_operation_can_be_made_to_fail() {
    let dir = old_folder();
    let disk = FaultyDisk::new(dir.path());
    replace(&disk, dir.path()).unwrap();
    let done: Vec<String> = disk.done().iter().map(ToString::to_string).collect();
    let expected = [
        "create folder 1 of a/b",
        "sync folder 1 of .",
        "create 1 of a/b/new",
        "write 1 of a/b/new",
        "open 1 of log",
        "write 1 of log",
        "sync 1 of log",
        "write 2 of log",
        "create 1 of .kept.new",
        "write 1 of .kept.new",
        "sync 1 of .kept.new",
        "rename to 1 of kept",
        "sync folder 2 of .",
    ];
    assert_eq!(done, expected);
    assert_eq!(disk.written_past(), [""; 0]);
    std::fs::write(dir.path().join("a/past"), "").unwrap();
    std::fs::write(dir.path().join("kept"), "changed").unwrap();
    assert_eq!(disk.written_past(), ["/a/past", "/kept"]);
    for point in disk.done() {
        for (fault, words) in
            [(Fault::Broken, "os error 5"), (Fault::Full { torn: false, n_refused: 1 }, "os error 28")]
        {
            let dir = old_folder();
            let disk = FaultyDisk::failing(dir.path(), &point, fault);
            let error = replace(&disk, dir.path()).unwrap_err();
            assert!(error.contains(words) && disk.has_failed(), "{point}: {error}");
            assert_eq!(disk.written_past(), [""; 0], "{point}");
            // Once: after it all is well.
            replace(&disk, dir.path()).unwrap();
        }
    }
}

#[test]
fn a_full_disk_tears_a_write_and_refuses_until_there_is_room() {
    let dir = old_folder();
    let point = Point { operation: "write", path: "log".to_owned(), nth: 1 };
    let disk = FaultyDisk::failing(dir.path(), &point, Fault::Full { torn: true, n_refused: 2 });
    let log = disk.append(&dir.path().join("log")).unwrap();
    assert_eq!(log.write(b"four").unwrap(), 2);
    assert_eq!(log.write(b"ur").unwrap_err().kind(), ErrorKind::StorageFull);
    // What needs no room goes on.
    log.sync().unwrap();
    assert_eq!(disk.create(&dir.path().join("x")).unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(log.write(b"ur").unwrap(), 2);
    assert_eq!(std::fs::read(dir.path().join("log")).unwrap(), b"one\nfour");
}

#[test]
fn a_power_cut_keeps_what_was_synced_and_may_keep_the_rest() {
    let dir = old_folder();
    let plain = FaultyDisk::new(dir.path());
    replace(&plain, dir.path()).unwrap();
    // What was seen after any cut: the file that is replaced, the one that nobody synced, the end of the log.
    let mut seen = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
    let mut lost_inside = false;
    for (at, point) in plain.done().into_iter().enumerate() {
        for seed in 0..24 {
            let dir = old_folder();
            let disk = FaultyDisk::failing(dir.path(), &point, Fault::PowerCut);
            replace(&disk, dir.path()).unwrap_err();
            replace(&disk, dir.path()).expect_err("power is off");
            disk.after_power_cut(seed);
            let read = |name: &str| std::fs::read(dir.path().join(name)).ok();
            let log = read("log").unwrap();
            assert!(log.starts_with(b"one\n"), "{point}");
            let is_synced = at > 6;
            assert!(!is_synced || log.starts_with(b"one\ntwo\n"), "{point}: {log:?}");
            assert!(at < 2 || dir.path().join("a").is_dir(), "{point}: a was synced");
            lost_inside |= at > 2 && !dir.path().join("a/b").is_dir();
            let kept = read("kept").unwrap();
            let is_whole = kept == b"the old text" || kept == b"the new text";
            assert!(is_whole, "{point}: {kept:?}");
            seen[0].insert(Some(kept));
            seen[1].insert(read("a/b/new").filter(|bytes| bytes.len() < 12 || *bytes == b"never synced"));
            seen[2].insert(is_synced.then(|| log[8..].to_vec()).filter(|end| end.len() < 6 || end == b"three\n"));
        }
    }
    assert!(lost_inside, "only the name of a was synced, not what it holds");
    let texts = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect::<BTreeSet<_>>();
    let seen = seen.map(|seen| seen.into_iter().flatten().collect::<BTreeSet<_>>());
    assert_eq!(seen[0], texts(&["the old text", "the new text"]));
    assert_eq!(seen[1], texts(&["", "never ", "never synced"]));
    assert_eq!(seen[2], texts(&["", "thr", "three\n"]));
}
