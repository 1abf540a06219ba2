//! Which thread takes signals.
//!
//! The products that oneDNN compiles for fp32 use the stack pointer as a register of their own. A handler that the system runs
//! on top of one writes its frame wherever that points: the heap was seen to be damaged by single signals. So no thread that
//! computes may take one that has a handler.

use std::ffi::c_int;

/// glibc's `sigset_t`: a bit for each signal, of which the lowest is signal 1.
#[repr(C)]
struct SignalSet([u64; 16]);

const SIG_BLOCK: c_int = 0;
const SIG_UNBLOCK: c_int = 1;

/// The disposition of a signal that is thrown away.
const SIG_IGN: usize = 1;

unsafe extern "C" {
    fn signal(signal: c_int, handler: usize) -> usize;
    fn pthread_sigmask(how: c_int, set: *const SignalSet, old: *mut SignalSet) -> c_int;
}

/// Has the whole process throw a signal away.
pub fn ignore(number: c_int) {
    // SAFETY: no handler of ours is installed, and one that was there before is not asked for. The call can only fail for a
    // number that is no signal, which changes nothing.
    let _ = unsafe { signal(number, SIG_IGN) };
}

/// Keeps signals from this thread, and from those that it starts from now on.
pub fn block(signals: &[c_int]) {
    change(SIG_BLOCK, signals);
}

/// Lets this thread take signals again.
pub fn unblock(signals: &[c_int]) {
    change(SIG_UNBLOCK, signals);
}

fn change(how: c_int, signals: &[c_int]) {
    let mut set = SignalSet([0; 16]);
    for signal in signals {
        set.0[0] |= 1 << (signal - 1);
    }
    // SAFETY: the set is as large as the C library's own, and is only read; no old mask is asked for. The call can only fail
    // for another first argument.
    let _ = unsafe { pthread_sigmask(how, &raw const set, std::ptr::null_mut()) };
}
