//! Counts bytes that are held, as they come and go.

use std::cell::Cell;

use crate::plan::parts::MemoryPart;

/// Bytes by part; the index is the part's own.
pub(super) type Bytes = [i64; MemoryPart::ALL.len()];

/// Counts what is held, and remembers the most.
#[derive(Debug, Default)]
pub(super) struct Meter {
    live: Cell<Bytes>,
    peak: Cell<Bytes>,
}

impl Meter {
    fn change(&self, part: MemoryPart, bytes: i64) {
        let mut live = self.live.get();
        live[part as usize] += bytes;
        self.live.set(live);
        if total(&live) > total(&self.peak.get()) {
            self.peak.set(live);
        }
    }

    /// Bytes that are held now.
    pub(super) fn live(&self) -> i64 {
        total(&self.live.get())
    }

    pub(super) fn hold(&self, part: MemoryPart, bytes: i64) -> Held<'_> {
        self.change(part, bytes);
        Held { meter: self, part, bytes }
    }

    /// The most since the last call.
    pub(super) fn take_peak(&self) -> Bytes {
        self.peak.replace(self.live.get())
    }
}

fn total(bytes: &Bytes) -> i64 {
    bytes.iter().sum()
}

/// A tensor of which only the size is known.
#[derive(Debug)]
pub(super) struct Held<'m> {
    meter: &'m Meter,
    part: MemoryPart,
    pub(super) bytes: i64,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.meter.change(self.part, -self.bytes);
    }
}
