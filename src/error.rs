//! The one error type of the library: what went wrong, where, and how to mend it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A result of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// One thing that is wrong with what the user gave: a config key, a file, a row, a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where: `config.toml: train.learning_rate`, `rows.jsonl:17`, `model.safetensors: lm_head.weight`.
    pub place: String,
    /// What was found there and what was expected instead.
    pub what: String,
    /// What to type or change; empty when `what` already says so.
    pub hint: String,
}

impl Fault {
    /// Names a fault at a place.
    pub fn new(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into(), hint: String::new() }
    }

    /// Adds what the user can do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The fault in one line, what can be done about it at the end.
    pub fn in_one_line(&self) -> String {
        if self.hint.is_empty() { self.to_string() } else { format!("{self} ({})", self.hint) }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Faults of the input that can be known before any work starts (exit code 2); all that were found.
    #[error("{}", join(.0))]
    Invalid(Vec<Fault>),
    /// A fault that showed only while running (exit code 1).
    #[error("{0}")]
    Failed(Fault),
    /// An operation of all ranks came to nothing (exit code 75): most likely another one is the cause.
    #[error("{0}")]
    Lost(Fault),
    /// The operating system refused a file operation (exit code 1).
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// The operation as a verb: `read`, `create`, `rename`.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A process of this job failed (its own exit code).
    #[error("{fault}")]
    Job {
        /// The exit code of the process that was the cause.
        exit_code: u8,
        /// Which it was and what it said.
        fault: Fault,
    },
    /// libtorch refused an operation: a defect of this program, or memory that ran out (exit code 1).
    #[error("libtorch: {0}")]
    Torch(String),
    /// A signal asked the run to stop, and it did so in good order (exit code 128 + signal).
    #[error("stopped by {}: {note}", signal_name(*.signal))]
    Interrupted {
        /// The signal's number.
        signal: i32,
        /// What was saved and how to go on.
        note: String,
    },
    /// What another rank of the job says already (this rank's exit code).
    #[error("another rank says why")]
    SaidByAnother {
        /// The exit code of what is wrong.
        exit_code: u8,
    },
}

/// The exit code of a process that lost another one of its job: the same command may well succeed later (`EX_TEMPFAIL` of
/// sysexits.h).
pub const LOST_PEER: u8 = 75;

/// The numbers of the signals that ask a command to stop: SIGHUP, SIGINT, SIGTERM.
pub const STOP_SIGNALS: [usize; 3] = [1, 2, 15];

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => "the end of its terminal",
        2 => "Ctrl-C",
        _ => "SIGTERM",
    }
}

/// Ends what is going on when `stop` holds the number of a signal; `note` says what became of it.
///
/// # Errors
/// [`Error::Interrupted`].
pub fn not_stopped(stop: &AtomicUsize, note: &str) -> Result<()> {
    match stop.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Error::Interrupted { signal: signal as i32, note: note.to_owned() }),
    }
}

/// A path or another word of a command in a hint, quoted where a shell would take it apart or change it.
pub fn shell_quoted(word: &(impl AsRef<std::ffi::OsStr> + ?Sized)) -> String {
    let word = word.as_ref().to_string_lossy();
    let is_plain = |c: char| c.is_alphanumeric() || "_-./:=@%+,".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.into_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

fn join(faults: &[Fault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

impl Error {
    /// A single fault of the input.
    pub fn invalid(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Invalid(vec![Fault::new(place, what)])
    }

    /// A fault that showed while running.
    pub fn failed(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Failed(Fault::new(place, what))
    }

    /// Adds what the user can do about it to the (last) fault.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        match &mut self {
            Self::Invalid(faults) => {
                if let Some(last) = faults.last_mut() {
                    last.hint = hint.into();
                }
            }
            Self::Failed(fault) | Self::Lost(fault) => fault.hint = hint.into(),
            _ => {}
        }
        self
    }

    /// Adds what the user can do about them to the faults that say nothing of it yet.
    pub fn hint_where_none(mut self, hint: &str) -> Self {
        let faults = match &mut self {
            Self::Invalid(faults) => faults.as_mut_slice(),
            Self::Failed(fault) | Self::Lost(fault) => std::slice::from_mut(fault),
            _ => &mut [],
        };
        for fault in faults.iter_mut().filter(|fault| fault.hint.is_empty()) {
            fault.hint = hint.into();
        }
        self
    }

    /// A thread that ended in a panic, with what the panic said.
    pub fn of_panic(place: impl Into<String>, payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("for a reason unknown");
        Self::failed(place, format!("ended in a panic: {text}"))
            .hint("report it with the command, the config and this message")
    }

    /// Gives `map_err` a closure that remembers the operation and the path.
    pub fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { doing, path, source }
    }

    /// The process exit code: 2 for what `check` can know, 1 for a failure while running, 75 where another process of the job
    /// was lost, 128 + signal.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Invalid(_) => 2,
            Self::Failed(_) | Self::Io { .. } | Self::Torch(_) => 1,
            Self::Lost(_) => LOST_PEER,
            Self::Job { exit_code, .. } | Self::SaidByAnother { exit_code } => *exit_code,
            Self::Interrupted { signal, .. } => 128u8.saturating_add(*signal as u8),
        }
    }

    /// Whether libtorch says that a device's memory ran out, in the words of its allocators, CUDA, cuBLAS and oneDNN.
    pub fn is_out_of_memory(&self) -> bool {
        const WORDS: [&str; 7] = [
            "out of memory",
            "can't allocate memory",
            "not enough memory",
            "std::bad_alloc",
            "CUBLAS_STATUS_ALLOC_FAILED",
            // oneDNN, when it finds no room for its scratch memory, or for the code of a product.
            "could not create a primitive",
            "could not execute a primitive",
        ];
        matches!(self, Self::Torch(what) if WORDS.iter().any(|words| what.contains(words)))
    }

    /// What the user can do about an error that is no [`Fault`]; empty where nothing is known.
    pub fn advice(&self) -> &'static str {
        use std::io::ErrorKind;
        match self {
            Self::Invalid(_) | Self::Failed(_) | Self::Lost(_) | Self::Job { .. } => "",
            Self::Interrupted { .. } | Self::SaidByAnother { .. } => "",
            Self::Io { source, .. } => match source.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make room there, or name another place",
                ErrorKind::FileTooLarge => "raise the limit on the size of a file: ulimit -f unlimited",
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    "name a place that you may read and write, or change its permissions"
                }
                _ => "look at that path and the folders above it, or name another place",
            },
            Self::Torch(_) if self.is_out_of_memory() => {
                "the memory ran out: lower train.micro_batch_tokens or data.max_length, or use a machine with more"
            }
            Self::Torch(_) => "this is a defect of bellora: report it with the command, the config and this message",
        }
    }

    /// The faults behind this error, for printing each with its hint.
    pub fn faults(&self) -> &[Fault] {
        match self {
            Self::Invalid(faults) => faults,
            Self::Failed(fault) | Self::Lost(fault) | Self::Job { fault, .. } => std::slice::from_ref(fault),
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::shell_quoted;

    #[test]
    fn a_shell_reads_quoted_words_as_they_are() {
        for plain in ["runs/first", "data/第一.jsonl", "a-b_c.d:e=f@g%h+i,j"] {
            assert_eq!(shell_quoted(plain), plain);
        }
        assert_eq!(shell_quoted(std::path::Path::new("my data/a.jsonl")), "'my data/a.jsonl'");
        for word in ["a b", "it's", "[1]/*.jsonl", "\"$HOME\"", "~/x", "a;b&c|d>e", "`x`", "a\\b", "!!", "", "a\nb"] {
            let said = Command::new("sh").args(["-c", &format!("printf %s {}", shell_quoted(word))]).output();
            assert_eq!(said.map(|said| said.stdout).ok().as_deref(), Some(word.as_bytes()), "{word:?}");
        }
    }
}
