//! Training: what a run reads ([`setup`]), one update ([`step`]), and the life of a run directory ([`run`]).

pub mod banner;
pub mod probe;
pub mod run;
pub mod setup;
pub mod step;
