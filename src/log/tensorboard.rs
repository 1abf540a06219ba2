//! TensorBoard event files.
//!
//! A file is a sequence of records: the length as 8 bytes, its masked CRC-32C, an `Event` in protocol buffers, its
//! masked CRC-32C, all little-endian. The messages are those of TensorFlow's `event.proto` and `summary.proto`, as far
//! as scalars need them.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::file::LogFile;
use super::metrics::EvalMetrics;
use crate::disk::{self, Disk};
use crate::engine::metrics::StepMetrics;
use crate::error::Result;

/// How every event file's name begins; TensorBoard looks for it.
const PREFIX: &str = "events.out.tfevents.";

/// `SessionLog.SessionStatus.START`.
const START: i32 = 1;

/// An event file that is being written. Every record is handed to the system at once: a killed process loses none.
#[derive(Debug)]
pub struct EventFile {
    pub(super) file: Arc<LogFile>,
}

impl EventFile {
    /// Begins a new event file in a folder, which is created if need be.
    ///
    /// Points of `first_step` and later in older files of the folder are void from here on: the file says that a
    /// session starts with that step.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn create(disk: &Arc<dyn Disk>, dir: &Path, first_step: u64) -> Result<Self> {
        disk::make_folder(&**disk, dir)?;
        // TensorBoard reads a folder's files in the order of their names, whatever the clock said when they were made.
        let path = dir.join(format!("{PREFIX}{:010}.bellora", next_stamp(dir)?));
        let mut events = Self { file: Arc::new(LogFile::create(disk, &path)?) };
        events.record(0, What::FileVersion("brain.Event:2".to_owned()))?;
        events.record(first_step, What::SessionLog(SessionLog { status: START }))?;
        Ok(events)
    }

    /// Writes the points of an update; what it lacks has none.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        let values = [
            ("train/loss", step.loss),
            ("train/grad_norm", step.grad_norm),
            ("train/lr", Some(step.lr)),
            ("train/tokens_per_s", Some(step.tokens_per_s)),
        ];
        self.scalars(step.step, &values)
    }

    /// Writes the point of an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn eval(&mut self, eval: &EvalMetrics) -> Result<()> {
        self.scalars(eval.step, &[("eval/loss", Some(eval.eval_loss))])
    }

    fn scalars(&mut self, step: u64, values: &[(&str, Option<f64>)]) -> Result<()> {
        let values = values.iter().filter_map(|(tag, value)| {
            let scalar = Scalar::SimpleValue((*value)? as f32);
            Some(Value { tag: (*tag).to_owned(), scalar: Some(scalar) })
        });
        self.record(step, What::Summary(Summary { value: values.collect() }))
    }

    fn record(&mut self, step: u64, what: What) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let event = Event { wall_time, step: step as i64, what: Some(what) }.encode_to_vec();
        let length = (event.len() as u64).to_le_bytes();
        let record = [&length[..], &masked_crc(&length), &event, &masked_crc(&event)].concat();
        self.file.append(&record)
    }
}

/// Holds every record of an event file against its checksums and counts them. A record that is torn at the end, as a kill
/// leaves it, is not counted; readers stop there.
///
/// # Errors
/// Where the first record is that is not as it was written, in bytes from the start.
pub fn count_records(file: &[u8]) -> std::result::Result<usize, usize> {
    let (mut rest, mut n_records) = (file, 0);
    while let Some((head, after)) = rest.split_at_checked(12) {
        let damaged = file.len() - rest.len();
        let (length, crc) = head.split_at(8);
        if masked_crc(length) != crc {
            return Err(damaged);
        }
        let length = length.iter().rev().fold(0, |length: usize, byte| length << 8 | usize::from(*byte));
        let Some((event, crc)) = length.checked_add(4).and_then(|end| after.get(..end)).map(|all| all.split_at(length))
        else {
            break;
        };
        if masked_crc(event) != crc {
            return Err(damaged);
        }
        rest = &after[length + 4..];
        n_records += 1;
    }
    Ok(n_records)
}

/// Gives the time of day in seconds, or more where a file of the folder bears that time or a later one.
fn next_stamp(dir: &Path) -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut stamp = now;
    for name in disk::names(dir)? {
        let older = name.strip_prefix(PREFIX).and_then(|rest| rest.split('.').next()?.parse::<u64>().ok());
        stamp = stamp.max(older.map_or(0, |older| older + 1));
    }
    Ok(stamp)
}

/// Gives the checksum in the form of TFRecord files: rotated and offset, so that checksums of checksums stay sound.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "Scalar", tags = "2")]
    scalar: Option<Scalar>,
}

/// A member of the schema's `oneof value`: written even when it is 0, which a plain field would leave out.
#[derive(Clone, PartialEq, prost::Oneof)]
enum Scalar {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}
