//! What goes over a connection between two ranks: frames of a header of 28 bytes, little-endian, and a payload.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `BLC` and the version of the protocol |
//! | 1 | 1 piece, 2 farewell, 3 leave |
//! | 1 | low half: operation (all_reduce, reduce_scatter, all_gather, broadcast, barrier), high half: dtype |
//! | 2 | the root of a broadcast |
//! | 8 | number of the operation, from 1 |
//! | 8 | bytes of the whole tensor |
//! | 4 | bytes of the payload |

use std::fmt;

use tch::Kind;

const MAGIC: [u8; 4] = *b"BLC\x01";
pub(super) const HEADER_LEN: usize = 28;
/// The most that a frame carries. Every connection has a buffer of that size.
pub(super) const PIECE: usize = 256 << 10;

/// The collective operations; a barrier is the announcement alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum OpKind {
    AllReduce = 1,
    ReduceScatter = 2,
    AllGather = 3,
    Broadcast = 4,
    Barrier = 5,
}

impl OpKind {
    const ALL: [Self; 5] = [Self::AllReduce, Self::ReduceScatter, Self::AllGather, Self::Broadcast, Self::Barrier];

    /// Whether numbers are added up, and not only copied.
    pub(super) fn adds(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter)
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        })
    }
}

/// What tensors hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Dtype {
    None = 0,
    Fp32 = 1,
    Fp64 = 2,
    U8 = 3,
    I64 = 4,
}

impl Dtype {
    const ALL: [Self; 5] = [Self::None, Self::Fp32, Self::Fp64, Self::U8, Self::I64];

    /// The dtype of a tensor, where it can be sent.
    pub(super) fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Float => Some(Self::Fp32),
            Kind::Double => Some(Self::Fp64),
            Kind::Uint8 => Some(Self::U8),
            Kind::Int64 => Some(Self::I64),
            _ => None,
        }
    }

    /// Whether it has sums.
    pub(super) fn is_float(self) -> bool {
        matches!(self, Self::Fp32 | Self::Fp64)
    }

    /// Bytes of an element.
    pub(super) fn size(self) -> usize {
        match self {
            Self::None | Self::U8 => 1,
            Self::Fp32 => 4,
            Self::Fp64 | Self::I64 => 8,
        }
    }
}

/// One operation of the queue; ranks that agree have equal ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) number: u64,
    pub(super) kind: OpKind,
    pub(super) dtype: Dtype,
    pub(super) root: u16,
    pub(super) n_bytes: u64,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, kind, dtype, root, n_bytes } = self;
        write!(f, "operation {number} ({kind}")?;
        let n_elements = n_bytes / dtype.size() as u64;
        match dtype {
            Dtype::None => {}
            Dtype::Fp32 => write!(f, " of {n_elements} fp32")?,
            Dtype::Fp64 => write!(f, " of {n_elements} fp64")?,
            Dtype::U8 => write!(f, " of {n_elements} u8")?,
            Dtype::I64 => write!(f, " of {n_elements} i64")?,
        }
        if *kind == OpKind::Broadcast {
            write!(f, " from rank {root}")?;
        }
        f.write_str(")")
    }
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Tag {
    /// A part of the tensor; the first of an operation is empty and announces it.
    Piece = 1,
    /// The sender gives up in this operation; the payload says why.
    Farewell = 2,
    /// The sender has left in good order after this operation.
    Leave = 3,
}

pub(super) fn header(tag: Tag, operation: &Operation, payload: usize) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = tag as u8;
    bytes[5] = operation.kind as u8 | (operation.dtype as u8) << 4;
    bytes[6..8].copy_from_slice(&operation.root.to_le_bytes());
    bytes[8..16].copy_from_slice(&operation.number.to_le_bytes());
    bytes[16..24].copy_from_slice(&operation.n_bytes.to_le_bytes());
    bytes[24..].copy_from_slice(&(payload as u32).to_le_bytes());
    bytes
}

/// Reads a header; `None` if it is none, or has a payload that no frame carries.
pub(super) fn read_header(bytes: &[u8; HEADER_LEN]) -> Option<(Tag, Operation, usize)> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let ([tag, what], rest) = rest.split_first_chunk::<2>()?;
    let (root, rest) = rest.split_first_chunk::<2>()?;
    let (number, rest) = rest.split_first_chunk::<8>()?;
    let (n_bytes, rest) = rest.split_first_chunk::<8>()?;
    let payload = u32::from_le_bytes(rest.try_into().ok()?) as usize;
    let tag = [Tag::Piece, Tag::Farewell, Tag::Leave].into_iter().find(|known| *known as u8 == *tag)?;
    let operation = Operation {
        number: u64::from_le_bytes(*number),
        kind: OpKind::ALL.into_iter().find(|kind| *kind as u8 == what & 15)?,
        dtype: Dtype::ALL.into_iter().find(|dtype| *dtype as u8 == what >> 4)?,
        root: u16::from_le_bytes(*root),
        n_bytes: u64::from_le_bytes(*n_bytes),
    };
    (*magic == MAGIC && payload <= PIECE).then_some((tag, operation, payload))
}
