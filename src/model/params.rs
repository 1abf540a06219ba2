//! All trainable parameters in one flat fp32 buffer; named tensors are views of it.
//!
//! Reductions, clipping, AdamW and checkpoints work on the flat buffers and need no per-tensor code. The order is
//! embed, blocks, head; tensors that share a product (the `lora_A` of q, k and v) adjoin without a gap.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::model::config::LlamaConfig;
use crate::model::lora::{LoraSpec, PEFT_PREFIX, Projection, Table};

/// Every group of tensors starts at a multiple of this many fp32 elements (256 bytes).
const ALIGNMENT: i64 = 64;

/// The rows of a half-precision head are a multiple of this.
const HEAD_ROWS: i64 = 64;

/// One trainable tensor's place in the flat buffers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key in an adapter file of PEFT.
    pub name: String,
    /// `[rows, columns]`.
    pub shape: [i64; 2],
    /// First element in the flat buffers.
    pub offset: i64,
}

impl Entry {
    /// Number of elements.
    pub fn numel(&self) -> i64 {
        self.shape[0] * self.shape[1]
    }
}

/// Where every trainable tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    entries: Vec<Entry>,
    /// Where the tensors of each block begin, and where those of the last end.
    blocks: Vec<i64>,
    len: i64,
}

/// A stretch of the flat buffers whose gradients are complete together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bucket {
    /// The head.
    Head(Range<i64>),
    /// The tensors of a block.
    Block(usize, Range<i64>),
    /// The embedding table, by its place among the entries: few of its rows have a gradient.
    Embed(usize),
}

/// The key of an adapter matrix in PEFT's files; `matrix` is `lora_A` or `lora_B`.
pub fn lora_key(projection: Projection, layer: usize, matrix: &str) -> String {
    format!("{PEFT_PREFIX}{}.{matrix}.weight", projection.module(layer))
}

/// The key of a trained table in PEFT's files.
pub fn table_key(table: Table) -> String {
    format!("{PEFT_PREFIX}{}", table.base_key())
}

/// The projections of a block that share one input, and so one stacked `lora_A`.
pub const INPUT_GROUPS: [&[Projection]; 4] = [
    &[Projection::Q, Projection::K, Projection::V],
    &[Projection::O],
    &[Projection::Gate, Projection::Up],
    &[Projection::Down],
];

impl Layout {
    /// Lays the parameters of a run out; `vocab_size` counts grown rows too.
    pub fn new(config: &LlamaConfig, lora: &LoraSpec, vocab_size: i64) -> Self {
        let mut layout = Self { entries: Vec::new(), blocks: Vec::new(), len: 0 };
        let table = |table: Table| vec![(table_key(table), [vocab_size, config.hidden_size])];
        if lora.trains(Table::Embed) {
            layout.push_group(table(Table::Embed));
        }
        for layer in 0..config.num_hidden_layers {
            layout.align();
            layout.blocks.push(layout.len);
            for group in INPUT_GROUPS {
                let adapted: Vec<Projection> = group.iter().copied().filter(|p| lora.adapts(*p)).collect();
                let a = |p: &Projection| (lora_key(*p, layer, "lora_A"), [lora.r, p.shape(config)[1]]);
                layout.push_group(adapted.iter().map(a).collect());
                for p in adapted {
                    layout.push_group(vec![(lora_key(p, layer, "lora_B"), [p.shape(config)[0], lora.r])]);
                }
            }
        }
        if lora.trains(Table::Head) {
            layout.align();
        }
        layout.blocks.push(layout.len);
        if lora.trains(Table::Head) {
            layout.push_group(table(Table::Head));
        }
        layout
    }

    fn align(&mut self) {
        self.len = (self.len + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }

    fn push_group(&mut self, tensors: Vec<(String, [i64; 2])>) {
        self.align();
        for (name, shape) in tensors {
            let entry = Entry { name, shape, offset: self.len };
            self.len += entry.numel();
            self.entries.push(entry);
        }
    }

    /// The tensors in the order of the buffer.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of trainable parameters (without the gaps).
    pub fn n_params(&self) -> i64 {
        self.entries.iter().map(Entry::numel).sum()
    }

    /// Of those, the parameters of tables.
    pub fn n_table_params(&self) -> i64 {
        let tables = Table::ALL.iter().filter_map(|table| self.index_of(&table_key(*table)));
        tables.map(|index| self.entries[index].numel()).sum()
    }

    /// Elements of a flat buffer, gaps included.
    pub fn buffer_len(&self) -> i64 {
        self.len
    }

    /// The buckets in the order in which backward completes them.
    pub fn buckets(&self) -> Vec<Bucket> {
        let (head, embed) = (self.index_of(&table_key(Table::Head)), self.index_of(&table_key(Table::Embed)));
        let head = head.map(|index| Bucket::Head(self.entries[index].offset..self.len));
        let blocks = self.blocks.windows(2).enumerate().rev();
        let blocks = blocks.map(|(layer, bounds)| Bucket::Block(layer, bounds[0]..bounds[1]));
        head.into_iter().chain(blocks).chain(embed.map(Bucket::Embed)).collect()
    }

    /// Elements that the compute copy has beyond the buffer: the padding of a trained head, which stands last.
    pub fn head_padding(&self, compute: Kind) -> i64 {
        let is_head = |entry: &&Entry| entry.name == table_key(Table::Head);
        self.entries
            .last()
            .filter(is_head)
            .map_or(0, |head| (padded_head_rows(head.shape[0], compute) - head.shape[0]) * head.shape[1])
    }

    /// The position of a tensor among [`Self::entries`].
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|e| e.name == name)
    }

    /// A view of one tensor in a flat buffer of this layout.
    pub fn view(&self, flat: &Tensor, index: usize) -> Result<Tensor> {
        self.stacked(flat, index, 1)
    }

    /// A view of `n` adjoining tensors of equal width, one below the other.
    pub fn stacked(&self, flat: &Tensor, first: usize, n: usize) -> Result<Tensor> {
        let entries = &self.entries[first..first + n];
        let rows: i64 = entries.iter().map(|e| e.shape[0]).sum();
        let columns = entries[0].shape[1];
        Ok(flat.f_narrow(0, entries[0].offset, rows * columns)?.f_view([rows, columns])?)
    }
}

/// The rows of a head as products read it: in half precision a multiple of 64, the rows added being zero, since GPUs are
/// quick with such shapes alone.
pub fn padded_head_rows(vocab_size: i64, compute: Kind) -> i64 {
    match compute {
        Kind::Half | Kind::BFloat16 => (vocab_size + HEAD_ROWS - 1) / HEAD_ROWS * HEAD_ROWS,
        _ => vocab_size,
    }
}

/// The parameters: fp32 masters and the copies that the products read.
#[derive(Debug)]
pub struct ParamBuffer {
    layout: Layout,
    master: Tensor,
    /// The masters themselves in fp32; else a copy, the padding of a trained head behind it.
    compute: Tensor,
}

impl ParamBuffer {
    /// Allocates zeroed parameters whose products run in `compute` precision.
    pub fn new(layout: Layout, compute: Kind, device: Device) -> Result<Self> {
        let master = Tensor::f_zeros([layout.buffer_len()], (Kind::Float, device))?;
        let compute = match compute {
            Kind::Float => master.shallow_clone(),
            _ => Tensor::f_zeros([layout.buffer_len() + layout.head_padding(compute)], (compute, device))?,
        };
        Ok(Self { layout, master, compute })
    }

    /// Where the tensors lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The flat fp32 masters `[P]`.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// One tensor's fp32 master.
    pub fn master_view(&self, index: usize) -> Result<Tensor> {
        self.layout.view(&self.master, index)
    }

    /// The copy of adjoining tensors that products read; refreshed in place, so views of it stay valid.
    pub fn compute_stacked(&self, first: usize, n: usize) -> Result<Tensor> {
        self.layout.stacked(&self.compute, first, n)
    }

    /// The copy of a trained head `[P, D]` that products read, with its padding.
    pub fn compute_head(&self, index: usize) -> Result<Tensor> {
        let Entry { shape: [rows, columns], offset, .. } = self.layout.entries()[index];
        let rows = padded_head_rows(rows, self.compute.kind());
        Ok(self.compute.f_narrow(0, offset, rows * columns)?.f_view([rows, columns])?)
    }

    /// Brings the compute copy up to date with the masters; call it after every change of them.
    pub fn refresh_compute(&mut self) -> Result<()> {
        if self.compute.kind() != Kind::Float {
            self.compute.f_narrow(0, 0, self.layout.len)?.f_copy_(&self.master)?;
        }
        Ok(())
    }

    /// Names and fp32 masters in the order of the buffer.
    pub fn named(&self) -> Result<Vec<(String, Tensor)>> {
        named_views(&self.layout, &self.master)
    }
}

/// Names and copies on the CPU of any flat buffer of a layout: it may change while they are written.
pub fn named_copies(layout: &Layout, flat: &Tensor) -> Result<Vec<(String, Tensor)>> {
    named_views(layout, &flat.f_to_device_(Device::Cpu, Kind::Float, false, true)?)
}

/// Names and views of any flat buffer of a layout.
pub fn named_views(layout: &Layout, flat: &Tensor) -> Result<Vec<(String, Tensor)>> {
    (0..layout.entries().len()).map(|i| Ok((layout.entries()[i].name.clone(), layout.view(flat, i)?))).collect()
}

/// The gradients of all parameters, fp32, laid out as they are.
#[derive(Debug)]
pub struct Gradients {
    layout: Layout,
    flat: Tensor,
}

impl Gradients {
    /// Allocates zeroed gradients.
    pub fn new(layout: &Layout, device: Device) -> Result<Self> {
        Ok(Self { layout: layout.clone(), flat: Tensor::f_zeros([layout.buffer_len()], (Kind::Float, device))? })
    }

    /// The flat buffer `[P]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Sets all gradients to zero.
    pub fn zero(&mut self) -> Result<()> {
        let _ = self.flat.f_zero_()?;
        Ok(())
    }

    /// The gradient of one tensor.
    pub fn view(&self, index: usize) -> Result<Tensor> {
        self.layout.view(&self.flat, index)
    }

    /// The gradients of adjoining tensors of equal width, one below the other.
    pub fn stacked(&self, first: usize, n: usize) -> Result<Tensor> {
        self.layout.stacked(&self.flat, first, n)
    }
}
