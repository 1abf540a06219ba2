//! The console: a progress line on a terminal, plain lines elsewhere, on stderr and without colour.
//!
//! A thread of its own writes, because a terminal can stop taking output (Ctrl-S, a full pipe) and a closed one gives
//! errors: neither may touch the training. What the console misses stands in `train.log`.

use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Messages that may wait for a slow console; later ones are dropped.
const N_WAITING: usize = 1024;

/// How long the end of the log waits for the console to catch up.
const PATIENCE: Duration = Duration::from_secs(1);

/// The rank that stands in front of each line of this process, where nobody else puts it there.
static SPEAKER: OnceLock<usize> = OnceLock::new();

/// From here on, all that this process says begins with `[rank N]`.
pub fn speak_as_rank(rank: usize) {
    // The first name stays.
    let _ = SPEAKER.set(rank);
}

/// Writes lines to standard error; a console that is gone is no reason to fail.
pub fn say(lines: &str) {
    let _ = std::io::stderr().write_all(spoken(lines).as_bytes());
}

/// The lines, each with its speaker.
pub(super) fn spoken(lines: &str) -> String {
    match SPEAKER.get() {
        None => lines.to_owned(),
        Some(rank) => lines.split_inclusive('\n').map(|line| format!("[rank {rank}] {line}")).collect(),
    }
}

enum Message {
    /// A line that stays.
    Line(String),
    /// How far the run is: on a terminal a line that is written over, elsewhere one that stays.
    Progress(u64, String),
    /// How far the work of a step, an evaluation or a save is: shown on a terminal until the next progress.
    Work(String),
    /// Answered when everything before it has been written and the progress line taken away.
    Finish(SyncSender<()>),
}

/// The console of the run that goes on.
static OF_A_RUN: Mutex<Option<SyncSender<Message>>> = Mutex::new(None);

/// Hands the state of some work to the console of the run that goes on; false where there is none.
pub(super) fn tell_of_work(text: String) -> bool {
    match &*OF_A_RUN.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(console) => {
            let _ = console.try_send(Message::Work(text));
            true
        }
        None => false,
    }
}

/// The sending end.
pub(super) struct Console {
    messages: SyncSender<Message>,
}

impl Console {
    /// Starts the thread that writes.
    pub(super) fn start(total_steps: u64) -> Self {
        let (messages, inbox) = sync_channel(N_WAITING);
        // Without a thread the run goes on in silence: the inbox is gone, and sending to it does nothing.
        let _ = std::thread::Builder::new().name("console".to_owned()).spawn(move || write_all(&inbox, total_steps));
        *OF_A_RUN.lock().unwrap_or_else(PoisonError::into_inner) = Some(messages.clone());
        Self { messages }
    }

    /// Says nothing.
    pub(super) fn silent() -> Self {
        // Nobody reads what is sent.
        Self { messages: sync_channel(0).0 }
    }

    /// Prints a line.
    pub(super) fn line(&self, text: String) {
        let _ = self.messages.try_send(Message::Line(text));
    }

    /// Shows how far the run is.
    pub(super) fn progress(&self, step: u64, text: String) {
        let _ = self.messages.try_send(Message::Progress(step, text));
    }
}

impl Drop for Console {
    /// Waits, but not for long, until everything has been written.
    fn drop(&mut self) {
        *OF_A_RUN.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let (done, answer) = sync_channel(1);
        if self.messages.try_send(Message::Finish(done)).is_ok() {
            // Late or never, there is nothing else to do about it.
            let _ = answer.recv_timeout(PATIENCE);
        }
    }
}

fn write_all(inbox: &Receiver<Message>, total_steps: u64) {
    let bar = ProgressBar::with_draw_target(Some(total_steps), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{bar:10} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    // Hidden: stderr is no terminal, or one that cannot move its cursor.
    let is_plain = bar.is_hidden();
    for message in inbox {
        match message {
            Message::Line(text) if is_plain => say(&format!("{text}\n")),
            Message::Line(text) => bar.println(spoken(&text)),
            Message::Progress(_, text) if is_plain => say(&format!("{text}\n")),
            Message::Progress(step, text) => {
                bar.set_position(step);
                bar.set_message(spoken(&text));
            }
            Message::Work(_) if is_plain => {}
            Message::Work(text) => bar.set_message(spoken(&text)),
            Message::Finish(done) => {
                bar.finish_and_clear();
                let _ = done.send(());
            }
        }
    }
}
