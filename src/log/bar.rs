//! Long work on the console: a bar on a terminal, a line every ten seconds elsewhere.

use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::console;
use crate::progress::{self, State};

/// How often a terminal is drawn anew, and how often a line is written elsewhere.
const DRAWN_EVERY: Duration = Duration::from_millis(250);
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Work that is done by then is not worth a bar.
const WORTH_A_BAR: Duration = Duration::from_secs(1);

/// Starts a thread that shows what goes on until the program ends.
pub fn show_progress() {
    // Without a thread work goes on in silence.
    let _ = std::thread::Builder::new().name("progress".to_owned()).spawn(show);
}

fn show() {
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
    if bar.is_hidden() {
        loop {
            std::thread::sleep(LINE_EVERY);
            if let Some(work) = worth_showing(LINE_EVERY) {
                console::say(&format!("{}\n", work.line()));
            }
        }
    }
    if let Ok(style) = ProgressStyle::with_template("{bar:10} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    loop {
        std::thread::sleep(DRAWN_EVERY);
        match worth_showing(WORTH_A_BAR) {
            // A run's own line is the only one that moves.
            Some(work) if console::tell_of_work(work.line()) => bar.finish_and_clear(),
            Some(work) => {
                let (done, total) = work.units();
                bar.reset();
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(console::spoken(&work.line()));
            }
            None => bar.finish_and_clear(),
        }
    }
}

fn worth_showing(after: Duration) -> Option<Arc<State>> {
    progress::current().filter(|work| work.elapsed() >= after)
}
