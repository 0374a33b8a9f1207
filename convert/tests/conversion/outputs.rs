//! What is written, under which names, and what is never touched.

use std::fs;
use std::process::Command;

use fewbit::gguf::with_suffix;
use fewbit_convert::recipe::Mix;
use fewbit_convert::{Error, Options};
use safetensors::Dtype;

use crate::common::*;

fn forced(mix: Mix) -> Options {
    Options {
        force: true,
        ..Options::new(mix)
    }
}

#[test]
fn an_input_named_as_a_file_beside_the_output_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_hf(&folder, &config(0), Dtype::BF16, &random_model(0));
    let (source, _) = converted(&folder, Mix::F32);
    let output = dir.path().join("out.gguf");
    for suffix in ["", ".partial", ".partial.json", ".partial.json.new"] {
        let input = with_suffix(&output, suffix);
        fs::hard_link(&source, &input).unwrap(); // another name does not hide it
        let before = fs::read(&source).unwrap();
        for input in [&input, &source] {
            let error = convert(input, &output, &forced(Mix::Q8_0)).unwrap_err();
            assert!(
                matches!(error, Error::OutputIsInput(_)),
                "{suffix}: {error}"
            );
        }
        assert!(fs::read(&input).unwrap() == before, "{suffix}");
        fs::remove_file(&input).unwrap();
    }
    let imatrix = with_suffix(&output, ".partial");
    fs::write(&imatrix, "statistics").unwrap();
    let options = Options {
        imatrix: Some(imatrix.clone()),
        ..forced(Mix::Q8_0)
    };
    let error = convert(&source, &output, &options).unwrap_err();
    assert!(matches!(error, Error::OutputIsInput(_)), "{error}");
    assert_eq!(fs::read(&imatrix).unwrap(), b"statistics");
}

#[test]
fn an_output_that_is_a_folder_is_refused_first() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    for force in [false, true] {
        let options = Options {
            force,
            ..Options::new(Mix::Q8_0)
        };
        let error = convert(&nowhere, dir.path(), &options).unwrap_err();
        assert!(matches!(error, Error::OutputIsFolder(_)), "{error}");
    }
    let synth = Command::new(env!("CARGO_BIN_EXE_fewbit-convert"))
        .args(["synth", "mistral-7b", "--type", "Q4_K_M", "--force"])
        .arg(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8(synth.stderr).unwrap();
    assert!(said.contains("name the file"), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn nothing_lies_beside_a_finished_output() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    write_hf(&folder, &config(0), Dtype::BF16, &random_model(0));
    let output = dir.path().join("out.gguf");
    for options in [Options::new(Mix::Q8_0), forced(Mix::Q4_0)] {
        convert(&folder, &output, &options).unwrap();
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["m", "out.gguf"]);
    }
}
