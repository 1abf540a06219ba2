//! The update: learning rate, loss scale, gradient norm and clipping, AdamW.

pub mod adamw;
pub mod control;
pub mod loss_scale;
pub mod schedule;
