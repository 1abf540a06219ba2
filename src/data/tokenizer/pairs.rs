//! Pairs of neighbouring symbols and what they make.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// What two neighbouring symbols make: `rank << 32 | piece`, the lowest rank merged first; or [`BRIDGE`].
pub(super) type Pair = u64;

/// Nothing, though the two may stand side by side in some piece: no place where a text falls into segments.
pub(super) const BRIDGE: Pair = u64::MAX;

/// No symbol: a character that no piece contains.
pub(super) const NONE: u32 = u32::MAX;

/// (left symbol, right symbol), as [`key`] joins them, to what they make.
pub(super) type Pairs = HashMap<u64, Pair, BuildHasherDefault<PairHasher>>;

/// A pair of symbols as one number.
pub(super) fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Hashes a pair of symbols: one multiplication, then the high bits brought down.
#[derive(Default)]
pub(super) struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0 ^ u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }
}
