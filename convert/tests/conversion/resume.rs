//! A conversion that is cut off goes on where it stopped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fewbit::gguf::with_suffix;
use fewbit_convert::Options;
use fewbit_convert::recipe::Mix;
use safetensors::Dtype;

use crate::common::*;

/// Runs the command in a shell that lets no file grow beyond about half the output: for the program,
/// a disk that is full. Every finished tensor is recorded.
fn cut_off(input: &Path, output: &Path, mix: &str) -> Output {
    let script = "ulimit -f 1000 && exec \"$@\""; // 512-byte units in a POSIX shell
    let mut command = Command::new("sh");
    command
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_fewbit-convert")])
        .arg(input)
        .arg(output);
    command
        .args(["--type", mix, "--record-every", "0"])
        .output()
        .unwrap()
}

/// A model and its whole conversion.
fn model(dir: &Path) -> (PathBuf, Vec<u8>) {
    let input = dir.join("m");
    write_hf(&input, &config(4), Dtype::BF16, &random_model(4));
    let (whole, _) = converted(&input, Mix::Q8_0);
    (input, fs::read(whole).unwrap())
}

#[test]
fn a_full_disk_is_an_error_and_the_next_run_goes_on_to_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let (input, whole) = model(dir.path());
    let output = dir.path().join("out.gguf");

    let cut = cut_off(&input, &output, "Q8_0");
    assert_eq!(cut.status.code(), Some(1), "{cut:?}");
    let message = String::from_utf8_lossy(&cut.stderr).into_owned();
    assert!(
        message.contains("out.gguf.partial") && message.lines().count() == 1,
        "{message}"
    );
    assert!(!output.exists());

    let report = convert(&input, &output, &Options::new(Mix::Q8_0)).unwrap();
    assert!(report.tensors_kept > 0);
    assert!(fs::read(&output).unwrap() == whole);
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        left.iter()
            .all(|name| !name.to_string_lossy().contains("partial")),
        "{left:?}"
    );
}

#[test]
fn other_arguments_start_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (input, whole) = model(dir.path());
    let output = dir.path().join("out.gguf");
    cut_off(&input, &output, "BF16");
    let report = convert(&input, &output, &Options::new(Mix::Q8_0)).unwrap();
    assert_eq!(report.tensors_kept, 0);
    assert!(fs::read(&output).unwrap() == whole);
}

#[test]
fn changed_weights_start_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (input, whole) = model(dir.path());
    let output = dir.path().join("out.gguf");
    cut_off(&input, &output, "Q8_0");
    write_hf(&input, &config(4), Dtype::BF16, &random_model(4)); // the same weights, but a later file
    let report = convert(&input, &output, &Options::new(Mix::Q8_0)).unwrap();
    assert_eq!(report.tensors_kept, 0);
    assert!(fs::read(&output).unwrap() == whole);
}

#[test]
fn a_damaged_partial_file_starts_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (input, whole) = model(dir.path());
    let output = dir.path().join("out.gguf");
    cut_off(&input, &output, "Q8_0");
    fs::write(with_suffix(&output, ".partial"), "overwritten").unwrap();
    let report = convert(&input, &output, &Options::new(Mix::Q8_0)).unwrap();
    assert_eq!(report.tensors_kept, 0);
    assert!(fs::read(&output).unwrap() == whole);
}
