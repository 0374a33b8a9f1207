//! Models in several files.

use super::*;

/// Writes a model of three splits, one tensor each; returns the first's path.
fn write_splits(folder: &Path, tensors_said: i32) -> PathBuf {
    for number in 0..3_u16 {
        let mut metadata = Metadata::new();
        if number == 0 {
            metadata.insert("general.name", "split");
        }
        metadata.insert("split.no", number);
        metadata.insert("split.tensors.count", tensors_said);
        // The writer makes single files only: the count is patched in after its layout check.
        metadata.insert("split.count", 1_u16);
        let path = split(folder, usize::from(number) + 1);
        write(
            &path,
            &metadata,
            &[decl(&format!("t{number}"), BlockType::F32, &[8])],
        );
        patch(&path, "split.count", 3);
    }
    split(folder, 1)
}

fn split(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("model-{number:05}-of-00003.gguf"))
}

/// Sets the u16 value of a key in place.
fn patch(path: &Path, key: &str, value: u16) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes
        .windows(key.len())
        .position(|window| window == key.as_bytes())
        .unwrap();
    bytes[at + key.len() + 4..][..2].copy_from_slice(&value.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

fn read_refusal(path: &Path) -> String {
    gguf::read(path).expect_err("refused").to_string()
}

#[test]
fn the_first_split_brings_the_others() {
    let folder = TempDir::new().unwrap();
    let read = gguf::read(&write_splits(folder.path(), 3)).unwrap();
    assert_eq!(
        read.files,
        [1, 2, 3].map(|number| split(folder.path(), number))
    );
    assert_eq!(read.metadata.str("general.name").unwrap(), Some("split"));
    for (number, tensor) in read.tensors.iter().enumerate() {
        assert_eq!(
            (tensor.name.as_str(), tensor.file),
            (format!("t{number}").as_str(), number)
        );
    }
    assert_eq!(read.tensor("t2").unwrap().file, 2);
}

#[test]
fn another_split_than_the_first_is_refused_naming_the_first() {
    let folder = TempDir::new().unwrap();
    write_splits(folder.path(), 3);
    let message = read_refusal(&split(folder.path(), 2));
    assert_says(
        &message,
        &[
            "model-00002-of-00003.gguf",
            "split 2 of 3",
            "model-00001-of-00003.gguf",
        ],
    );
}

#[test]
fn a_missing_split_is_named() {
    let folder = TempDir::new().unwrap();
    let first = write_splits(folder.path(), 3);
    fs::remove_file(split(folder.path(), 3)).unwrap();
    assert_says(
        &read_refusal(&first),
        &["model-00003-of-00003.gguf", "missing", "split 3 of 3"],
    );
}

#[test]
fn splits_of_different_models_are_refused() {
    let folder = TempDir::new().unwrap();
    let first = write_splits(folder.path(), 4);
    assert_says(
        &read_refusal(&first),
        &["split.tensors.count", "is 4", "hold 3"],
    );

    let first = write_splits(folder.path(), 3);
    patch(&split(folder.path(), 2), "split.no", 2);
    assert_says(
        &read_refusal(&first),
        &["model-00002-of-00003.gguf", "split.no", "needs 1"],
    );

    let first = write_splits(folder.path(), 3);
    patch(&split(folder.path(), 2), "split.count", 4);
    assert_says(
        &read_refusal(&first),
        &[
            "model-00002-of-00003.gguf",
            "split.count",
            "not of one model",
        ],
    );

    let first = write_splits(folder.path(), 3);
    fs::copy(split(folder.path(), 2), split(folder.path(), 3)).unwrap();
    patch(&split(folder.path(), 3), "split.no", 2);
    assert_says(
        &read_refusal(&first),
        &["model-00003-of-00003.gguf", "tensor t1", "twice"],
    );
}

#[test]
fn a_renamed_split_is_refused() {
    let folder = TempDir::new().unwrap();
    let first = write_splits(folder.path(), 3);
    let renamed = folder.path().join("model.gguf");
    fs::copy(&first, &renamed).unwrap();
    assert_says(
        &read_refusal(&renamed),
        &["model.gguf", "split 1 of 3", "-00001-of-00003.gguf"],
    );

    let alone = folder.path().join("other-00001-of-00002.gguf");
    write(&alone, &Metadata::new(), &[]);
    assert_says(
        &read_refusal(&alone),
        &["named as split 1 of 2", "split.count"],
    );
}
