//! Puts the git revision and the build's target features into `fewbit --version`.

use std::path::Path;
use std::process::Command;

fn main() {
    let revision = git(&["rev-parse", "--short=12", "HEAD"]);
    let revision = revision.as_deref().unwrap_or("no git revision");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    let target = std::env::var("TARGET").unwrap_or_default();
    println!("cargo::rustc-env=FEWBIT_REVISION={revision}");
    println!("cargo::rustc-env=FEWBIT_TARGET={target}");
    println!("cargo::rustc-env=FEWBIT_TARGET_FEATURES={features}");
    println!("cargo::rerun-if-changed=build.rs");
    // Grows with each commit and checkout. A file that does not exist would have all built anew each time.
    let moves = git(&["rev-parse", "--git-path", "logs/HEAD"]);
    if let Some(moves) = moves.filter(|moves| Path::new(moves).exists()) {
        println!("cargo::rerun-if-changed={moves}");
    }
}

/// What git prints, where there is git and a repository.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
