//! The tests, one binary.
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing has failed, and says where")]

mod config;
mod data;
mod gradcheck;
mod log;
mod manifest;
mod tokens;
