//! The program: reads the command line, runs the command, turns its result into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    bellora::cli::main()
}
