//! The tests, one binary.
#![expect(clippy::unwrap_used, reason = "a test that unwraps nothing has failed, and says where")]
#![expect(clippy::print_stdout, reason = "a test says the largest difference it met")]

mod attention;
mod bad_input;
mod base_files;
mod bench;
mod cli;
mod comm;
mod compat;
mod config;
mod conversations;
mod data;
mod device;
mod faults;
mod faulty_disk;
mod fp16;
mod going_on;
mod golden;
mod gradcheck;
mod invariance;
mod kills;
mod log;
mod machines;
mod manifest;
mod meeting;
mod memory_limits;
mod model_gradcheck;
mod moved_runs;
mod nccl;
mod non_finite;
mod out_of_memory;
mod place;
mod plan;
mod ranges;
mod ranks;
mod refused_memory;
mod replay;
mod resume;
mod rows;
mod selftest;
mod support;
mod tidy;
mod tokenizer_folders;
mod tokens;
mod verify;
