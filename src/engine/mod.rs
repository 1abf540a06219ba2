//! One update: [`step`] is the place to start. [`optim`] has AdamW and what decides an update; [`reduce`] sums gradients over
//! the ranks, [`gather`] brings shards together, [`copies`] all of them for a checkpoint; [`probe`] measures a micro-batch of the greatest size beforehand, and
//! [`micro_batch_size`] makes them smaller where memory runs out; [`non_finite`] tells of an update whose numbers are not.
//!
//! The engine reads no config and writes no file.

mod copies;
mod gather;
pub mod metrics;
mod micro_batch_size;
pub mod non_finite;
pub mod optim;
pub mod probe;
mod reduce;
pub mod state;
pub mod step;
