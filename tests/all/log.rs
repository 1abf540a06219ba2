//! What a run tells: metrics without gaps or repeats after a resume, event files that TensorBoard reads, and lines that
//! outlast a full disk.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bellora::disk::{Disk, DiskFile, LocalDisk};
use bellora::engine::metrics::StepMetrics;
use bellora::error::Error;
use bellora::log::{EvalMetrics, EventFile, LogSettings, MetricsFile, RunLog};

/// A disk with little room, which can fail to sync and then loses what was not synced.
#[derive(Debug, Default)]
struct CrampedDisk(Arc<Cramped>);

#[derive(Debug, Default)]
struct Cramped {
    /// The bytes that can still be written.
    room: AtomicUsize,
    /// Whether the next sync fails.
    fails_to_sync: AtomicBool,
    /// What was renamed, by the new names.
    renamed: Mutex<Vec<String>>,
}

#[derive(Debug)]
struct CrampedFile {
    disk: Arc<Cramped>,
    path: PathBuf,
    file: Box<dyn DiskFile>,
    n_synced: AtomicUsize,
}

impl CrampedDisk {
    /// Gives the disk as the product takes it, and its inside.
    fn with_room(bytes: usize) -> (Arc<dyn Disk>, Arc<Cramped>) {
        let disk = Self::default();
        disk.0.room.store(bytes, Ordering::SeqCst);
        let inside = disk.0.clone();
        (Arc::new(disk), inside)
    }

    fn file(&self, path: &Path, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        let n_synced = AtomicUsize::new(path.metadata().unwrap().len() as usize);
        Box::new(CrampedFile { disk: self.0.clone(), path: path.to_owned(), file, n_synced })
    }
}

impl Disk for CrampedDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.create_folder(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.file(path, LocalDisk.create(path)?))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.file(path, LocalDisk.append(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.renamed.lock().unwrap().push(to.file_name().unwrap().to_string_lossy().into_owned());
        LocalDisk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove_folder(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        LocalDisk.sync_folder(path)
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(self.0.room.load(Ordering::SeqCst) as u64)
    }
}

impl DiskFile for CrampedFile {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let n_bytes = bytes.len().min(self.disk.room.load(Ordering::SeqCst));
        if n_bytes == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = self.file.write(&bytes[..n_bytes])?;
        self.disk.room.fetch_sub(written, Ordering::SeqCst);
        Ok(written)
    }

    fn sync(&self) -> io::Result<()> {
        if self.disk.fails_to_sync.swap(false, Ordering::SeqCst) {
            let lost = OpenOptions::new().write(true).open(&self.path)?;
            lost.set_len(self.n_synced.load(Ordering::SeqCst) as u64)?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.sync()?;
        self.n_synced.store(self.path.metadata()?.len() as usize, Ordering::SeqCst);
        Ok(())
    }
}

fn step(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        loss: Some(1.0 / step as f64),
        grad_norm: Some(0.1 + 0.2),
        lr: 4e-4,
        samples: 64,
        tokens: 11_200,
        label_tokens: 6_528,
        step_secs: 2.5,
        tokens_per_s: 4480.0,
        loss_scale: 1.0,
        skipped: false,
    }
}

fn eval(step: u64) -> EvalMetrics {
    EvalMetrics { step, eval_loss: 1.5, perplexity: 4.48, samples: 10, label_tokens: 900, eval_secs: 1.0 }
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Names each line by its kind and step.
fn kinds(path: &Path) -> Vec<String> {
    let kind = |line: &serde_json::Value| if line.get("loss").is_some() { "update" } else { "eval" };
    lines(path).iter().map(|line| format!("{} {}", kind(line), line["step"])).collect()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn metrics_have_the_contracts_keys_and_all_digits() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, path) = (LocalDisk::shared(), dir.path().join("metrics.jsonl"));
    let mut metrics = MetricsFile::create(&disk, &path).unwrap();
    metrics.step(&step(3)).unwrap();
    metrics.step(&StepMetrics { loss: None, grad_norm: Some(f64::INFINITY), skipped: true, ..step(4) }).unwrap();
    metrics.eval(&EvalMetrics { perplexity: f64::NAN, ..eval(4) }).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        text,
        concat!(
            r#"{"step":3,"loss":0.3333333333333333,"grad_norm":0.30000000000000004,"lr":0.0004,"samples":64,"#,
            r#""tokens":11200,"label_tokens":6528,"step_secs":2.5,"tokens_per_s":4480.0,"#,
            r#""loss_scale":1.0,"skipped":false}"#,
            "\n",
            r#"{"step":4,"loss":null,"grad_norm":null,"lr":0.0004,"samples":64,"#,
            r#""tokens":11200,"label_tokens":6528,"step_secs":2.5,"tokens_per_s":4480.0,"#,
            r#""loss_scale":1.0,"skipped":true}"#,
            "\n",
            r#"{"step":4,"eval_loss":1.5,"perplexity":null,"samples":10,"label_tokens":900,"eval_secs":1.0}"#,
            "\n",
        )
    );
    for third in [0.1 + 0.2, 1.0 / 3.0, 5e-324, 1.7976931348623157e308] {
        let mut again = MetricsFile::create(&disk, &path).unwrap();
        again.step(&StepMetrics { loss: Some(third), ..step(1) }).unwrap();
        assert_eq!(lines(&path)[0]["loss"].as_f64(), Some(third));
    }
}

#[test]
fn a_resumed_metrics_file_has_every_line_once() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, path) = (LocalDisk::shared(), dir.path().join("metrics.jsonl"));
    let mut metrics = MetricsFile::create(&disk, &path).unwrap();
    for i in 1..=7 {
        metrics.step(&step(i)).unwrap();
        if i % 2 == 0 {
            metrics.eval(&eval(i)).unwrap();
        }
    }
    drop(metrics);
    // Killed while the last line was being written, and then resumed from the checkpoint of step 4.
    let whole = std::fs::read_to_string(&path).unwrap();
    let before: Vec<_> = whole.lines().take(6).map(str::to_owned).collect();
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let mut metrics = MetricsFile::resume(&disk, &path, 4).unwrap();
    assert_eq!(metrics.n_lines(), 6);
    for i in 5..=6 {
        metrics.step(&step(i)).unwrap();
    }
    assert_eq!(metrics.n_lines(), 8);
    let expected = ["update 1", "update 2", "eval 2", "update 3", "update 4", "eval 4", "update 5", "update 6"];
    assert_eq!(kinds(&path), expected);
    let after = std::fs::read_to_string(&path).unwrap();
    assert!(after.lines().take(6).eq(before.iter()), "kept lines are kept byte for byte");
    assert_eq!(files(dir.path()), std::slice::from_ref(&path), "nothing is left beside it");
    // A last line that lost only its line break is whole, and the next one does not run into it.
    std::fs::write(&path, after.trim_end()).unwrap();
    MetricsFile::resume(&disk, &path, 6).unwrap().step(&step(7)).unwrap();
    assert_eq!(kinds(&path)[6..], ["update 5", "update 6", "update 7"].map(String::from)[..]);
    // Metrics that were taken away do not keep a run from going on.
    std::fs::remove_file(&path).unwrap();
    MetricsFile::resume(&disk, &path, 6).unwrap().step(&step(7)).unwrap();
    assert_eq!(kinds(&path), ["update 7"]);
}

/// One event as far as these tests look: step, and the scalars by tag, or what else it is.
#[derive(Debug, PartialEq)]
enum Event {
    Version(String),
    Start(u64),
    Scalars(u64, BTreeMap<String, f32>),
}

/// Reads an event file by the published format, on its own: checksums bit by bit, protocol buffers by hand.
fn events(path: &Path) -> Vec<Event> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut events = Vec::new();
    while !rest.is_empty() {
        let length = take(&mut rest, 8);
        assert_eq!(take(&mut rest, 4), masked(length), "the checksum of a length");
        let event = take(&mut rest, u64::from_le_bytes(length.try_into().unwrap()) as usize);
        assert_eq!(take(&mut rest, 4), masked(event), "the checksum of an event");
        let fields = fields(event);
        assert!(matches!(fields[0], (1, Field::Fixed(_))), "wall time comes first");
        let step =
            fields.iter().find_map(|field| if let (2, Field::Varint(step)) = field { Some(*step) } else { None });
        let step = step.unwrap_or(0);
        events.push(match fields.last().unwrap() {
            (3, Field::Bytes(version)) => Event::Version(String::from_utf8(version.to_vec()).unwrap()),
            (7, Field::Bytes([8, 1])) => Event::Start(step),
            (5, Field::Bytes(summary)) => Event::Scalars(step, scalars(summary)),
            other => panic!("an event with {other:?}"),
        });
    }
    events
}

fn scalars(summary: &[u8]) -> BTreeMap<String, f32> {
    let value = |field: &(u64, Field<'_>)| {
        let (1, Field::Bytes(value)) = field else { panic!("a summary with {field:?}") };
        match &fields(value)[..] {
            [(1, Field::Bytes(tag)), (2, Field::Fixed(number))] => {
                (String::from_utf8(tag.to_vec()).unwrap(), f32::from_le_bytes((*number).try_into().unwrap()))
            }
            other => panic!("a value with {other:?}"),
        }
    };
    fields(summary).iter().map(value).collect()
}

#[derive(Debug)]
enum Field<'a> {
    Varint(u64),
    Fixed(&'a [u8]),
    Bytes(&'a [u8]),
}

fn fields(mut message: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let field = match key & 7 {
            0 => Field::Varint(varint(&mut message)),
            1 => Field::Fixed(take(&mut message, 8)),
            5 => Field::Fixed(take(&mut message, 4)),
            2 => {
                let length = varint(&mut message) as usize;
                Field::Bytes(take(&mut message, length))
            }
            other => panic!("wire type {other}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut number = 0;
    for shift in (0..).step_by(7) {
        let byte = take(bytes, 1)[0];
        number |= u64::from(byte & 127) << shift;
        if byte < 128 {
            break;
        }
    }
    number
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, tail) = bytes.split_at(n);
    *bytes = tail;
    head
}

fn masked(bytes: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    let crc = !crc;
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn expected_scalars(metrics: &StepMetrics) -> Event {
    let values = [
        ("train/loss", metrics.loss),
        ("train/grad_norm", metrics.grad_norm),
        ("train/lr", Some(metrics.lr)),
        ("train/tokens_per_s", Some(metrics.tokens_per_s)),
    ];
    let known = values.into_iter().filter_map(|(tag, value)| Some((tag.to_owned(), value? as f32)));
    Event::Scalars(metrics.step, known.collect())
}

#[test]
fn event_files_hold_every_point_and_a_resume_voids_later_ones() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tensorboard");
    let far = StepMetrics { loss: None, lr: 0.0, ..step((1 << 40) + 7) };
    let mut first = EventFile::create(&LocalDisk::shared(), &folder, 1).unwrap();
    first.step(&step(1)).unwrap();
    first.step(&far).unwrap();
    first.eval(&eval(300)).unwrap();
    // Two more within the second: each name sorts after the one before.
    for first_step in [2, 3] {
        EventFile::create(&LocalDisk::shared(), &folder, first_step).unwrap().step(&step(first_step)).unwrap();
    }
    let version = || Event::Version("brain.Event:2".to_owned());
    let eval = Event::Scalars(300, BTreeMap::from([("eval/loss".to_owned(), 1.5)]));
    let read: Vec<_> = files(&folder).iter().map(|path| events(path)).collect();
    assert_eq!(read[0], [version(), Event::Start(1), expected_scalars(&step(1)), expected_scalars(&far), eval]);
    assert_eq!(read[1], [version(), Event::Start(2), expected_scalars(&step(2))]);
    assert_eq!(read[2], [version(), Event::Start(3), expected_scalars(&step(3))]);
    assert_eq!(read.len(), 3);
}

#[test]
fn a_run_log_keeps_metrics_for_every_update_and_the_rest_as_often_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let settings = LogSettings { last_step: 0, last_lines: None, total_steps: 10, log_every: 2, is_silent: false };
    let mut log = RunLog::open(&LocalDisk::shared(), dir.path(), settings).unwrap();
    log.banner(&["base: toy", "updates: 10"]).unwrap();
    for i in 1..=5 {
        log.step(&step(i)).unwrap();
    }
    log.step(&StepMetrics { loss: None, skipped: true, ..step(6) }).unwrap();
    log.eval(&eval(6)).unwrap();
    log.warn("one row was cut").unwrap();
    log.flush().unwrap();
    let expected = [
        "base: toy",
        "updates: 10",
        "step 2/10  loss 0.5000  grad norm 0.3000  lr 4.00e-4  4480 tokens/s  ETA 20 s",
        "step 4/10  loss 0.2500  grad norm 0.3000  lr 4.00e-4  4480 tokens/s  ETA 15 s",
        "step 6/10  loss -  grad norm 0.3000  lr 4.00e-4  4480 tokens/s  ETA 10 s  (update skipped)",
        "step 6  eval loss 1.5000  perplexity 4.480  10 samples  1 s",
        "warning: one row was cut",
    ];
    let text = || std::fs::read_to_string(dir.path().join("train.log")).unwrap();
    assert_eq!(text().lines().collect::<Vec<_>>(), expected);
    drop(log);

    let settings =
        LogSettings { last_step: 4, last_lines: Some(4), total_steps: 20_000, log_every: 0, is_silent: false };
    let mut log = RunLog::open(&LocalDisk::shared(), dir.path(), settings).unwrap();
    log.note("resumed").unwrap();
    log.step(&step(5)).unwrap();
    drop(log);
    assert_eq!(text().lines().skip(expected.len()).collect::<Vec<_>>(), ["resumed"], "0 is never");
    let updates = (1..=5).map(|i| format!("update {i}"));
    assert_eq!(kinds(&dir.path().join("metrics.jsonl")), updates.collect::<Vec<_>>());
    let steps = |events: Vec<Event>| {
        let step = |event| {
            if let Event::Scalars(step, _) = event { Some(step) } else { None }
        };
        events.into_iter().filter_map(step).collect::<Vec<_>>()
    };
    let [first, second] = &files(&dir.path().join("tensorboard"))[..] else { panic!("two sessions, two files") };
    assert_eq!(steps(events(first)), [2, 4, 6, 6]);
    assert_eq!(events(second)[1..], [Event::Start(5)]);

    // From the start again: nothing of the old metrics stays.
    let settings = LogSettings { last_step: 0, last_lines: None, total_steps: 1, log_every: 1, is_silent: false };
    RunLog::open(&LocalDisk::shared(), dir.path(), settings).unwrap();
    assert_eq!(lines(&dir.path().join("metrics.jsonl")), [] as [serde_json::Value; 0]);
}

fn train_log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("train.log")).unwrap()
}

/// The steps that the metrics and the newest event file tell of.
fn told_steps(dir: &Path) -> (Vec<String>, Vec<u64>) {
    let newest = files(&dir.join("tensorboard")).pop().unwrap();
    let step = |event| if let Event::Scalars(step, _) = event { Some(step) } else { None };
    (kinds(&dir.join("metrics.jsonl")), events(&newest).into_iter().filter_map(step).collect())
}

fn updates(steps: std::ops::RangeInclusive<u64>) -> Vec<String> {
    steps.map(|i| format!("update {i}")).collect()
}

#[test]
fn a_full_disk_keeps_lines_waiting_and_loses_none() {
    // Wherever the room ends, within a line or between two.
    for room in (0..2200).step_by(131) {
        let dir = tempfile::tempdir().unwrap();
        let (disk, inside) = CrampedDisk::with_room(room);
        let settings = LogSettings { last_step: 0, last_lines: None, total_steps: 10, log_every: 1, is_silent: false };
        let mut log = RunLog::open(&disk, dir.path(), settings).unwrap();
        let durable = log.durable();
        for i in 1..=6 {
            log.step(&step(i)).unwrap();
        }
        assert_eq!(log.n_lines(), 6);
        // A checkpoint must not be written now.
        let refused = durable.sync().unwrap_err();
        let Error::Io { doing: "write", path, source } = &refused else { panic!("{refused}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        assert!(path.starts_with(dir.path()), "{refused}");
        assert!(log.flush().is_err());
        // A few bytes more at every line, then enough.
        for i in 7..=8 {
            inside.room.fetch_add(11, Ordering::SeqCst);
            log.step(&step(i)).unwrap();
        }
        inside.room.store(1 << 20, Ordering::SeqCst);
        log.note("on we go").unwrap();
        durable.sync().unwrap();
        log.step(&step(9)).unwrap();
        let after = train_log(dir.path());
        let [begun, ended] =
            ["no room on the disk", "there is room on the disk again"].map(|w| after.matches(w).count());
        assert_eq!((begun, ended), (1, 1), "{room}: {after}");
        assert_eq!(after.lines().filter(|line| line.starts_with("step ")).count(), 9, "{room}: {after}");
        assert_eq!(told_steps(dir.path()), (updates(1..=9), (1..=9).collect()), "{room}");
    }
}

#[test]
fn a_sync_that_fails_loses_no_line_either() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, inside) = CrampedDisk::with_room(1 << 20);
    let settings = LogSettings { last_step: 0, last_lines: None, total_steps: 10, log_every: 1, is_silent: false };
    let mut log = RunLog::open(&disk, dir.path(), settings).unwrap();
    for i in 1..=8 {
        log.step(&step(i)).unwrap();
        if i % 2 == 0 {
            inside.fails_to_sync.store(i % 4 == 0, Ordering::SeqCst);
            assert_eq!(log.flush().is_err(), i % 4 == 0);
        }
    }
    assert!(kinds(&dir.path().join("metrics.jsonl")).len() < 8, "the last sync lost lines");
    // Where the lines that were lost find no room at first, they wait.
    inside.room.store(100, Ordering::SeqCst);
    log.step(&step(9)).unwrap();
    assert!(log.flush().is_err());
    inside.room.store(1 << 20, Ordering::SeqCst);
    log.step(&step(10)).unwrap();
    log.flush().unwrap();
    assert_eq!(told_steps(dir.path()), (updates(1..=10), (1..=10).collect()));
    assert!(train_log(dir.path()).contains("no room on the disk") && train_log(dir.path()).contains("again"));
    assert!(inside.renamed.lock().unwrap().contains(&"metrics.jsonl".to_owned()));
}

/// A log that nobody syncs would be held in memory for ever.
#[test]
fn much_that_was_not_synced_is_synced_by_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, inside) = CrampedDisk::with_room(1 << 24);
    let settings = LogSettings { last_step: 0, last_lines: None, total_steps: 10, log_every: 1, is_silent: false };
    let mut log = RunLog::open(&disk, dir.path(), settings).unwrap();
    inside.fails_to_sync.store(true, Ordering::SeqCst);
    let line = "x".repeat(1000);
    for _ in 0..1200 {
        log.record(&line).unwrap();
    }
    assert!(!inside.fails_to_sync.load(Ordering::SeqCst), "nothing was synced");
    assert_eq!(train_log(dir.path()).lines().filter(|l| *l == line).count(), 1200);
}

#[test]
fn a_resume_says_when_lines_of_the_metrics_are_missing() {
    let dir = tempfile::tempdir().unwrap();
    let settings = LogSettings { last_step: 0, last_lines: None, total_steps: 10, log_every: 1, is_silent: false };
    let mut log = RunLog::open(&LocalDisk::shared(), dir.path(), settings).unwrap();
    for i in 1..=5 {
        log.step(&step(i)).unwrap();
    }
    log.eval(&eval(5)).unwrap();
    log.record("for the file alone").unwrap();
    assert_eq!(log.n_lines(), 6);
    drop(log);
    let whole = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    assert!(train_log(dir.path()).ends_with("\nfor the file alone\n"));
    for (contents, last_lines, is_told) in [
        (whole.clone(), Some(6), false),
        (whole.clone(), None, false),
        (whole.lines().skip(1).map(|line| format!("{line}\n")).collect(), Some(6), true),
        (format!("{whole}{}\n", whole.lines().next().unwrap()), Some(6), true),
        // Lines of later steps come again and are not missed.
        (format!("{whole}{{\"step\":6}}\n{{\"ste"), Some(6), false),
    ] {
        std::fs::write(dir.path().join("metrics.jsonl"), &contents).unwrap();
        std::fs::remove_file(dir.path().join("train.log")).unwrap();
        let settings = LogSettings { last_step: 5, last_lines, total_steps: 10, log_every: 1, is_silent: false };
        let log = RunLog::open(&LocalDisk::shared(), dir.path(), settings).unwrap();
        let told = train_log(dir.path());
        assert_eq!(!told.is_empty(), is_told, "{told}");
        if is_told {
            let found = format!("metrics.jsonl has {} lines of the steps up to 5, but had 6", log.n_lines());
            assert!(told.starts_with("warning: ") && told.contains(&found), "{told}");
        }
    }
}
