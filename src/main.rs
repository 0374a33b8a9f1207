//! The `fewbit` command; everything is in [`fewbit::cli`].

fn main() -> std::process::ExitCode {
    fewbit::cli::main()
}
