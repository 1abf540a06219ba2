//! What operations are for: a device and a dtype. Which form of an operation runs is decided by this alone, and this is
//! decided once, where a model is loaded.

use tch::{Device, Kind};

use crate::device;

/// The device and dtype that operations are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Where the tensors lie.
    pub device: Device,
    /// Their dtype.
    pub kind: Kind,
    /// The compute capability of a GPU; zeros for a CPU.
    pub capability: (u32, u32),
}

/// The forms that an operation on rows has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The row kernels of the CPU: one pass over memory. Operands are contiguous.
    CpuRows,
    /// libtorch's own ops: every device and dtype, and the judge of the others.
    Plain,
}

impl Target {
    /// The target of a device at hand and a dtype.
    pub fn new(device: Device, kind: Kind) -> Self {
        Self { device, kind, capability: if device.is_cuda() { device::capability() } else { (0, 0) } }
    }

    /// Whether the tensors lie on the CPU.
    pub fn is_cpu(self) -> bool {
        self.device == Device::Cpu
    }

    /// The form of RMSNorm, SwiGLU, RoPE and cross entropy.
    pub fn rows(self) -> Form {
        if self.is_cpu() && matches!(self.kind, Kind::Float | Kind::BFloat16) { Form::CpuRows } else { Form::Plain }
    }

    /// The form of dropout, whose kernel knows every dtype.
    pub fn dropout(self) -> Form {
        if self.is_cpu() { Form::CpuRows } else { Form::Plain }
    }
}
