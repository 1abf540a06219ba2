//! Training: what a run reads ([`setup`]), what the machine decides ([`settle`]), one update ([`step`]), what is told of one that
//! went wrong ([`non_finite`]), the micro-batch tried
//! before it ([`probe`]), and the life of a run directory ([`run`]).

pub mod banner;
pub mod non_finite;
pub mod probe;
pub mod run;
pub mod settle;
pub mod setup;
pub mod step;
