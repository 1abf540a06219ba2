//! The life of a run: what it reads ([`setup`]), what `auto` becomes on this machine ([`resolve_auto`]), where it begins
//! ([`begin`]), and what it does until its end ([`training_loop`]) in a folder ([`folder`]). Afterwards: an update once more
//! ([`replay`]), and whether the folder is whole ([`verify`]). One update is the engine's.

pub mod banner;
pub mod begin;
pub mod checkpointing;
mod disagreements;
pub mod folder;
mod identity;
mod lock;
mod memory_check;
mod parts;
pub mod replay;
pub mod requests;
pub mod resolve_auto;
mod resume_position;
pub mod setup;
pub mod start;
pub mod training_loop;
pub mod verify;
