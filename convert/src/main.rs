//! The `fewbit-convert` command.

fn main() {}
