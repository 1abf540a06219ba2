//! How far a long piece of work is, for whoever watches: a person at the console, or a supervisor that would take silence for a
//! hang.
//!
//! What works says so here and knows nothing of those who watch. Nothing is said unless somebody does.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// A piece of work that goes on. It has ended when this is dropped.
#[derive(Debug)]
pub struct Work {
    state: Arc<State>,
}

/// What is known of a piece of work.
#[derive(Debug)]
pub struct State {
    what: Cow<'static, str>,
    unit: &'static str,
    total: u64,
    done: AtomicU64,
    started: Instant,
}

/// Told whenever work gets on: often, and from any thread.
pub type Listener = fn(&State);

static LISTENER: OnceLock<Listener> = OnceLock::new();
static GOING_ON: Mutex<Vec<Weak<State>>> = Mutex::new(Vec::new());

/// Has `listener` told of every advance from now on; the first one stays.
pub fn listen(listener: Listener) {
    let _ = LISTENER.set(listener);
}

/// The work that was begun last and goes on still.
pub fn current() -> Option<Arc<State>> {
    going_on().iter().rev().find_map(Weak::upgrade)
}

impl Work {
    /// Begins work of which `total` units are to be done.
    pub fn begin(what: impl Into<Cow<'static, str>>, unit: &'static str, total: u64) -> Self {
        let state =
            Arc::new(State { what: what.into(), unit, total, done: AtomicU64::new(0), started: Instant::now() });
        let mut going_on = going_on();
        going_on.retain(|work| work.strong_count() > 0);
        going_on.push(Arc::downgrade(&state));
        Self { state }
    }

    /// Some more units are done.
    pub fn advance(&self, units: u64) {
        self.state.done.fetch_add(units, Ordering::Relaxed);
        if let Some(listener) = LISTENER.get() {
            listener(&self.state);
        }
    }
}

impl State {
    /// What is done, as a phrase: `tokenising data/rows.jsonl`.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The units that are done, and all of them.
    pub fn units(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed).min(self.total), self.total)
    }

    /// How long it goes on.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// One line: what, how much of it, how fast, how long still.
    pub fn line(&self) -> String {
        let (done, total) = self.units();
        let (secs, percent) = (self.elapsed().as_secs_f64(), 100.0 * done as f64 / total.max(1) as f64);
        if done == 0 {
            return format!("{}: 0 of {total} {}, {secs:.0} s so far", self.what, self.unit);
        }
        let rate = done as f64 / secs.max(1e-3);
        let left = (total - done) as f64 / rate;
        let digits = if rate < 10.0 { 1 } else { 0 };
        format!(
            "{}: {done} of {total} {unit} ({percent:.0} %), {rate:.digits$} {unit}/s, {left:.0} s left",
            self.what,
            unit = self.unit
        )
    }
}

fn going_on() -> MutexGuard<'static, Vec<Weak<State>>> {
    GOING_ON.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_much_is_done() {
        let work = Work::begin("loading", "layers", 8);
        assert_eq!(work.state.line(), "loading: 0 of 8 layers, 0 s so far");
        work.advance(2);
        assert!(work.state.line().starts_with("loading: 2 of 8 layers (25 %), "), "{}", work.state.line());
        work.advance(100);
        assert_eq!(work.state.units(), (8, 8));
    }
}
