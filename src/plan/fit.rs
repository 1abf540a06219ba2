//! Whether what is needed fits into what there is.

use crate::error::{Error, Result};
use crate::torch::host_memory::Room;

/// Refuses what takes more memory than there is; `place` and `hint` are the error's.
///
/// # Errors
/// [`Error::Invalid`] with both numbers.
pub fn expect_to_fit(place: &str, needed: i64, room: &Room, hint: &str) -> Result<()> {
    let free = i64::try_from(room.bytes).unwrap_or(i64::MAX);
    if needed <= free {
        return Ok(());
    }
    let what = format!("needs {} of memory, and {} are {}", gib(needed), gib(free), room.bound);
    Err(Error::invalid(place, what).hint(hint))
}

/// Bytes in GiB, as people read them.
pub fn gib(bytes: i64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)) }
}
