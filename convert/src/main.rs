//! The `fewbit-convert` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    fewbit_convert::cli::main()
}
