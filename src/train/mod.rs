//! Training: what a run reads ([`setup`]), what the machine decides ([`settle`]), one update ([`step`]), what is told of one
//! that went wrong ([`non_finite`]), the micro-batch tried before the first ([`probe`]), where a run begins ([`begin`]), and
//! its life ([`run`]) in a folder ([`run_dir`]). Afterwards: an update once more ([`replay`]), and whether the folder is whole
//! ([`verify`]).

pub mod banner;
pub mod begin;
mod disagreements;
mod gather;
mod identity;
pub mod keep;
mod lock;
mod micro_batch_size;
pub mod non_finite;
mod parts;
pub mod probe;
mod reduce;
pub mod replay;
pub mod requests;
mod room;
pub mod run;
pub mod run_dir;
pub mod settle;
pub mod setup;
mod stand;
pub mod step;
pub mod verify;
