//! The update: learning rate, loss scale, gradient norm and clipping, AdamW.

pub mod adamw;
pub mod clip;
pub mod scaler;
pub mod schedule;
