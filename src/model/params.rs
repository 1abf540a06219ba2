//! All trainable parameters in one flat fp32 buffer; named tensors are views of it.
//!
//! Reductions, clipping, AdamW and checkpoints work on the flat buffers and need no per-tensor code. The order is
//! embed, blocks, head; tensors that share a product (the `lora_A` of q, k and v) adjoin without a gap.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::model::lora::{LoraSpec, PEFT_PREFIX};
use crate::model::shape::{ModelShape, Projection, Table};

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
    /// In the order of the buffers, of which they are all.
    buckets: Vec<Bucket>,
    len: i64,
}

/// A stretch of the flat buffers whose gradients are complete together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// What lies in it.
    pub holds: Holds,
    /// Its elements, gaps included.
    pub range: Range<i64>,
}

/// The tensors of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// The embedding table: few of its rows have a gradient.
    Embed,
    /// Those of a block.
    Block(usize),
    /// The head.
    Head,
}

/// The stretches of the flat buffers that one rank keeps the optimizer's state of and updates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    ranges: Vec<Range<i64>>,
}

impl Shard {
    /// Number of elements.
    pub fn numel(&self) -> i64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Its views of a flat buffer of the whole.
    pub fn of_whole(&self, flat: &Tensor) -> Result<Vec<Tensor>> {
        self.ranges.iter().map(|range| Ok(flat.f_narrow(0, range.start, range.end - range.start)?)).collect()
    }

    /// The same views of a buffer that holds the shard and nothing else.
    pub fn of_packed(&self, packed: &Tensor) -> Result<Vec<Tensor>> {
        let mut offset = 0;
        let view = |range: &Range<i64>| {
            let numel = range.end - range.start;
            offset += numel;
            Ok(packed.f_narrow(0, offset - numel, numel)?)
        };
        self.ranges.iter().map(view).collect()
    }

    /// A copy of the shard alone.
    pub fn packed(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_cat(&self.of_whole(flat)?, 0)?)
    }
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
    /// Lays the parameters of a run on one rank out; `vocab_size` counts grown rows too.
    pub fn new(config: &ModelShape, lora: &LoraSpec, vocab_size: i64) -> Self {
        Self::for_ranks(config, lora, vocab_size, 1)
    }

    /// Lays the parameters out so that every bucket can be cut into equal parts, one a rank.
    pub fn for_ranks(config: &ModelShape, lora: &LoraSpec, vocab_size: i64, n_ranks: usize) -> Self {
        let mut layout = Self { entries: Vec::new(), buckets: Vec::new(), len: 0 };
        let table = |table: Table| vec![(table_key(table), [vocab_size, config.hidden_size])];
        if lora.trains(Table::Embed) {
            layout.push_group(table(Table::Embed));
            layout.end_bucket(Holds::Embed, n_ranks);
        }
        for layer in 0..config.num_hidden_layers {
            for group in INPUT_GROUPS {
                let adapted: Vec<Projection> = group.iter().copied().filter(|p| lora.adapts(*p)).collect();
                let a = |p: &Projection| (lora_key(*p, layer, "lora_A"), [lora.r, p.shape(config)[1]]);
                layout.push_group(adapted.iter().map(a).collect());
                for p in adapted {
                    layout.push_group(vec![(lora_key(p, layer, "lora_B"), [p.shape(config)[0], lora.r])]);
                }
            }
            layout.end_bucket(Holds::Block(layer), n_ranks);
        }
        if lora.trains(Table::Head) {
            layout.push_group(table(Table::Head));
            layout.end_bucket(Holds::Head, n_ranks);
        }
        layout
    }

    fn align(&mut self, to: i64) {
        self.len = (self.len + to - 1) / to * to;
    }

    fn end_bucket(&mut self, holds: Holds, n_ranks: usize) {
        self.align(ALIGNMENT * n_ranks as i64);
        let start = self.buckets.last().map_or(0, |bucket| bucket.range.end);
        self.buckets.push(Bucket { holds, range: start..self.len });
    }

    fn push_group(&mut self, tensors: Vec<(String, [i64; 2])>) {
        self.align(ALIGNMENT);
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

    /// The buckets, whose ranges are the buffer without gaps: the embedding table, the blocks from the first, the head.
    /// Backward completes them from the last to the first.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// All of the buffers, as one shard.
    pub fn whole(&self) -> Shard {
        Shard { ranges: std::iter::once(0..self.len).collect() }
    }

    /// The part of each bucket that a rank of so many keeps; a layout for as many ranks has equal ones.
    pub fn shard(&self, rank: usize, n_ranks: usize) -> Shard {
        let part = |bucket: &Bucket| {
            let numel = (bucket.range.end - bucket.range.start) / n_ranks as i64;
            let start = bucket.range.start + rank as i64 * numel;
            start..start + numel
        };
        Shard { ranges: self.buckets.iter().map(part).collect() }
    }

    /// Elements that the compute copy has beyond the buffer: what of a trained head's padding does not fit into it.
    pub fn head_padding(&self, compute: Kind) -> i64 {
        let is_head = |entry: &&Entry| entry.name == table_key(Table::Head);
        self.entries.last().filter(is_head).map_or(0, |head| {
            let end = head.offset + padded_head_rows(head.shape[0], compute) * head.shape[1];
            (end - self.len).max(0)
        })
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
    /// What this rank updates.
    shard: Shard,
    /// Of all parameters; after [`Self::keep`] in half precision of the shard alone.
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
        Ok(Self { shard: layout.whole(), layout, master, compute })
    }

    /// Leaves the masters of all but a shard to other ranks. In fp32 all stay: products read them.
    pub fn keep(&mut self, shard: Shard) -> Result<()> {
        if self.compute.kind() != Kind::Float {
            self.master = shard.packed(&self.master)?;
        }
        self.shard = shard;
        Ok(())
    }

    /// Gives up the masters where products do not read them: nothing is to be trained.
    pub fn keep_for_reading(&mut self) -> Result<()> {
        if self.compute.kind() != Kind::Float {
            self.master = Tensor::f_empty([0i64], (Kind::Float, self.device()))?;
            self.shard = Shard { ranges: Vec::new() };
        }
        Ok(())
    }

    /// What this rank updates.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Whether other ranks update the rest.
    pub fn is_sharded(&self) -> bool {
        self.shard.numel() < self.layout.len
    }

    /// Where the tensors lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where they are.
    pub fn device(&self) -> Device {
        self.master.device()
    }

    /// The flat fp32 masters `[P]`, if this rank has those of all parameters.
    pub fn master(&self) -> Option<&Tensor> {
        (self.master.numel() as i64 == self.layout.len).then_some(&self.master)
    }

    /// The masters of the shard.
    pub fn shard_masters(&self) -> Result<Vec<Tensor>> {
        match self.master() {
            Some(master) => self.shard.of_whole(master),
            None => self.shard.of_packed(&self.master),
        }
    }

    /// One tensor's fp32 master, before [`Self::keep`].
    pub fn master_view(&self, index: usize) -> Result<Tensor> {
        self.layout.view(&self.master, index)
    }

    /// The flat buffer `[P]` that products read: in fp32 the masters themselves.
    pub fn compute(&self) -> Result<Tensor> {
        Ok(self.compute.f_narrow(0, 0, self.layout.len)?)
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

    /// Brings the compute copy of the shard up to date with its masters; call it after every change of them.
    pub fn refresh_compute(&mut self) -> Result<()> {
        if self.compute.kind() != Kind::Float {
            for (mut copy, master) in self.shard.of_whole(&self.compute)?.into_iter().zip(self.shard_masters()?) {
                copy.f_copy_(&master)?;
            }
        }
        Ok(())
    }

    /// Names and fp32 masters in the order of the buffer, before [`Self::keep`].
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    #[test]
    fn shards_of_any_number_of_ranks_are_equal_and_are_the_whole() {
        let shape = shapes::open("smollm2-135m", None, &[]).unwrap();
        let lora = LoraSpec { r: 3, target_modules: vec![Projection::Q, Projection::Down], ..LoraSpec::none() };
        for modules_to_save in [vec![], vec![Table::Embed], vec![Table::Embed, Table::Head]] {
            let lora = LoraSpec { modules_to_save, ..lora.clone() };
            for n_ranks in 1..=9 {
                let layout = Layout::for_ranks(&shape, &lora, 1001, n_ranks);
                let mut ranges: Vec<_> = (0..n_ranks).flat_map(|rank| layout.shard(rank, n_ranks).ranges).collect();
                ranges.sort_by_key(|range| range.start);
                let ends = ranges.iter().scan(0, |end, range| Some(std::mem::replace(end, range.end)));
                assert!(ends.eq(ranges.iter().map(|range| range.start)), "{n_ranks} ranks: {ranges:?}");
                assert_eq!(ranges.last().unwrap().end, layout.buffer_len());
                let numel = layout.shard(0, n_ranks).numel();
                assert!((1..n_ranks).all(|rank| layout.shard(rank, n_ranks).numel() == numel), "{n_ranks} ranks");
                assert!(ranges.iter().all(|range| range.start % ALIGNMENT == 0));
                assert_eq!(layout.n_params(), Layout::new(&shape, &lora, 1001).n_params());
            }
        }
    }
}
