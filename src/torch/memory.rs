//! How much memory a device has and uses: on a GPU by libtorch's allocator, on a CPU by the resident memory of the process.

use std::ffi::c_int;
use std::path::Path;

use tch::Device;

use super::cuda::check_op;
use super::host_memory::{self, Bound, Room, proc_bytes};
use crate::error::{Error, Result};

unsafe extern "C" {
    fn bellora_release_freed_memory();
    fn bellora_refuse_allocation(nth: i64) -> i64;
    fn bellora_cuda_memory(device_index: c_int, out: *mut i64) -> c_int;
    fn bellora_cuda_reset_peak(device_index: c_int) -> c_int;
    fn bellora_cuda_release_cached() -> c_int;
    fn bellora_cuda_synchronize(device_index: c_int) -> c_int;
}

/// The allocator of a GPU, in bytes.
struct CudaMemory {
    allocated: u64,
    allocated_peak: u64,
    reserved: u64,
    free: u64,
    reserved_peak: u64,
    retries: u64,
}

fn cuda_memory(index: usize) -> Result<CudaMemory> {
    let mut out = [0; 6];
    // SAFETY: the shim writes the six numbers.
    check_op("CUDA allocator", unsafe { bellora_cuda_memory(index as c_int, out.as_mut_ptr()) })?;
    let [allocated, allocated_peak, reserved, free, reserved_peak, retries] =
        out.map(|n| u64::try_from(n).unwrap_or(0));
    Ok(CudaMemory { allocated, allocated_peak, reserved, free, reserved_peak, retries })
}

/// Bytes in use: those of live tensors on a GPU, the resident memory of the process on a CPU.
///
/// # Errors
/// A GPU or system that does not say.
pub fn in_use_bytes(device: Device) -> Result<u64> {
    match device {
        Device::Cuda(index) => Ok(cuda_memory(index)?.allocated),
        _ => proc_bytes("/proc/self/status", "VmRSS:"),
    }
}

/// The most that [`in_use_bytes`] has been since [`reset_peak`] (or the start).
///
/// # Errors
/// A GPU or system that does not say.
pub fn peak_bytes(device: Device) -> Result<u64> {
    match device {
        Device::Cuda(index) => Ok(cuda_memory(index)?.allocated_peak),
        _ => proc_bytes("/proc/self/status", "VmHWM:"),
    }
}

/// What a GPU's allocator did besides handing memory out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocatorCounts {
    /// Bytes that it held of the device at most, used or not, since [`reset_peak`] (or the start).
    pub reserved_peak_bytes: u64,
    /// How often since the start it had to give unused memory back to the device before an allocation succeeded.
    pub retries: u64,
}

/// Asks a GPU's allocator; `None` on a CPU, which has none of its own.
///
/// # Errors
/// A GPU that does not say.
pub fn allocator_counts(device: Device) -> Result<Option<AllocatorCounts>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let CudaMemory { reserved_peak, retries, .. } = cuda_memory(index)?;
    Ok(Some(AllocatorCounts { reserved_peak_bytes: reserved_peak, retries }))
}

/// Has [`peak_bytes`] begin anew from what is in use now.
///
/// # Errors
/// A GPU or system that does not do so.
pub fn reset_peak(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => {
            // SAFETY: it takes a number.
            check_op("CUDA allocator", unsafe { bellora_cuda_reset_peak(index as c_int) })
        }
        _ => {
            // Linux: 5 resets the peak of the resident set.
            let path = Path::new("/proc/self/clear_refs");
            std::fs::write(path, "5").map_err(Error::io("write", path))
        }
    }
}

/// What can still be allocated: on a GPU what the device has free and what the allocator holds without using it; on a CPU
/// what the process may still take.
///
/// # Errors
/// A GPU or system that does not say.
pub fn room(device: Device) -> Result<Room> {
    match device {
        Device::Cuda(index) => {
            let memory = cuda_memory(index)?;
            let bytes = memory.free + memory.reserved.saturating_sub(memory.allocated);
            Ok(Room { bytes, bound: Bound::Machine })
        }
        _ => host_memory::room(),
    }
}

/// Its bytes, as [`room`].
///
/// # Errors
/// As [`room`].
pub fn free_bytes(device: Device) -> Result<u64> {
    Ok(room(device)?.bytes)
}

/// Gives memory that the allocator keeps without using it back to the device, or to the system.
///
/// # Errors
/// A GPU that refuses.
pub fn release_cached(device: Device) -> Result<()> {
    match device {
        // SAFETY: it takes nothing.
        Device::Cuda(_) => check_op("CUDA allocator", unsafe { bellora_cuda_release_cached() }),
        _ => {
            // SAFETY: it takes nothing.
            unsafe { bellora_release_freed_memory() };
            Ok(())
        }
    }
}

/// Has the `nth` allocation of a CPU tensor that this thread makes from now on fail (0: none), and gives how many it has made
/// since the last call. For tests of what happens when memory runs out; it sees the allocations that
/// [`keep_freed_memory`](super::keep_freed_memory) governs.
pub fn refuse_allocation(nth: u64) -> u64 {
    // SAFETY: it takes a number.
    unsafe { bellora_refuse_allocation(nth.cast_signed()) }.cast_unsigned()
}

/// Waits until everything that was queued on a device is done.
///
/// # Errors
/// Work that failed on the device.
pub fn synchronize(device: Device) -> Result<()> {
    match device {
        // SAFETY: it takes a number.
        Device::Cuda(index) => check_op("CUDA device", unsafe { bellora_cuda_synchronize(index as c_int) }),
        _ => Ok(()),
    }
}
