//! What a run tells: metrics without gaps or repeats after a resume, event files that TensorBoard reads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bellora::log::{EvalMetrics, EventFile, LogSettings, MetricsFile, RunLog, StepMetrics};

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
    let path = dir.path().join("metrics.jsonl");
    let mut metrics = MetricsFile::create(&path).unwrap();
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
        let mut again = MetricsFile::create(&path).unwrap();
        again.step(&StepMetrics { loss: Some(third), ..step(1) }).unwrap();
        assert_eq!(lines(&path)[0]["loss"].as_f64(), Some(third));
    }
}

#[test]
fn a_resumed_metrics_file_has_every_line_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut metrics = MetricsFile::create(&path).unwrap();
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
    let mut metrics = MetricsFile::resume(&path, 4).unwrap();
    for i in 5..=6 {
        metrics.step(&step(i)).unwrap();
    }
    let expected = ["update 1", "update 2", "eval 2", "update 3", "update 4", "eval 4", "update 5", "update 6"];
    assert_eq!(kinds(&path), expected);
    let after = std::fs::read_to_string(&path).unwrap();
    assert!(after.lines().take(6).eq(before.iter()), "kept lines are kept byte for byte");
    assert_eq!(files(dir.path()), std::slice::from_ref(&path), "nothing is left beside it");
    // A last line that lost only its line break is whole, and the next one does not run into it.
    std::fs::write(&path, after.trim_end()).unwrap();
    MetricsFile::resume(&path, 6).unwrap().step(&step(7)).unwrap();
    assert_eq!(kinds(&path)[6..], ["update 5", "update 6", "update 7"].map(String::from)[..]);
    // Metrics that were taken away do not keep a run from going on.
    std::fs::remove_file(&path).unwrap();
    MetricsFile::resume(&path, 6).unwrap().step(&step(7)).unwrap();
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
    let mut first = EventFile::create(&folder, 1).unwrap();
    first.step(&step(1)).unwrap();
    first.step(&far).unwrap();
    first.eval(&eval(300)).unwrap();
    // Two more within the second: each name sorts after the one before.
    for first_step in [2, 3] {
        EventFile::create(&folder, first_step).unwrap().step(&step(first_step)).unwrap();
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
    let settings = LogSettings { last_step: 0, total_steps: 10, log_every: 2 };
    let mut log = RunLog::open(dir.path(), settings).unwrap();
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

    let settings = LogSettings { last_step: 4, total_steps: 20_000, log_every: 0 };
    let mut log = RunLog::open(dir.path(), settings).unwrap();
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
    let settings = LogSettings { last_step: 0, total_steps: 1, log_every: 1 };
    RunLog::open(dir.path(), settings).unwrap();
    assert_eq!(lines(&dir.path().join("metrics.jsonl")), [] as [serde_json::Value; 0]);
}
