//! The small trained Mixtral in `fixtures/`, converted, and variants of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewbit::engine::{Engine, Options};
use fewbit::gguf::{self, Gguf, Metadata, TensorDecl, names};
use fewbit_convert::{Options as Conversion, convert};
use tempfile::TempDir;

/// The five languages of the held-out texts.
pub const LANGUAGES: [&str; 5] = ["en", "fr", "de", "es", "it"];

/// A path below `quant-tests/fixtures/`.
pub fn path(inside: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(inside)
}

/// A held-out text, by language.
pub fn text(language: &str) -> String {
    let path = path(&format!("text/{language}.txt"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The `fewbit` binary beside the tests.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let profile = test.parent().and_then(Path::parent);
    let profile = profile.expect("tests lie in a folder of the profile's");
    let binary = profile.join(format!("fewbit{}", std::env::consts::EXE_SUFFIX));
    assert!(
        binary.is_file(),
        "{} is not built; `cargo test` without -p builds it, as does `cargo build`",
        binary.display()
    );
    binary
}

/// A model file in a folder of its own, deleted when dropped.
pub struct ModelFile {
    _dir: TempDir,
    /// The file.
    pub path: PathBuf,
}

impl ModelFile {
    fn in_new_dir(name: &str) -> Self {
        let dir = TempDir::new().expect("a temporary folder");
        let path = dir.path().join(name);
        Self { _dir: dir, path }
    }

    /// Loads the model.
    pub fn load(&self, options: &Options) -> Arc<Engine> {
        Engine::load(&self.path, options).expect("the fixture loads")
    }
}

/// The trained fixture, converted with `--type mix`.
pub fn tiny_mixtral(mix: &str) -> ModelFile {
    converted(&path("tiny-mixtral"), mix)
}

/// A checkpoint, or another GGUF file, converted with `--type mix --allow-requantize`.
pub fn converted(checkpoint: &Path, mix: &str) -> ModelFile {
    let file = ModelFile::in_new_dir("model.gguf");
    let mut options = Conversion::new(mix.parse().expect("a known mix"));
    options.allow_requantize = true;
    let bar = indicatif::ProgressBar::hidden();
    convert(checkpoint, &file.path, &options, &bar)
        .unwrap_or_else(|error| panic!("{}: {error}", checkpoint.display()));
    file
}

/// A model in memory, to be changed and written again.
pub struct Parts {
    /// Metadata of the file.
    pub metadata: Metadata,
    /// Tensors with their bytes.
    pub tensors: Vec<(TensorDecl, Vec<u8>)>,
}

impl Parts {
    /// Reads a file whole.
    pub fn read(path: &Path) -> Self {
        let gguf: Gguf = gguf::read(path).expect("the file is sound");
        let bytes = std::fs::read(path).expect("the file can be read");
        let tensors = gguf.tensors.iter().map(|tensor| {
            let decl = TensorDecl {
                name: tensor.name.clone(),
                kind: tensor.kind,
                shape: tensor.shape.clone(),
            };
            let start = tensor.offset as usize;
            (decl, bytes[start..start + tensor.bytes as usize].to_vec())
        });
        Self {
            tensors: tensors.collect(),
            metadata: gguf.metadata,
        }
    }

    /// The tensor called `name`.
    pub fn tensor(&mut self, name: &str) -> &mut (TensorDecl, Vec<u8>) {
        let found = self.tensors.iter_mut().find(|(decl, _)| decl.name == name);
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The same with one tensor an expert, as in files from before April 2024.
    pub fn per_expert(mut self) -> Self {
        let split = |(decl, bytes): (TensorDecl, Vec<u8>)| {
            let name = names::parse(&decl.name);
            let Some(name) = name.filter(|name| name.experts == names::Experts::All) else {
                return vec![(decl, bytes)];
            };
            let size = bytes.len() / decl.shape[2];
            let expert = |(index, bytes): (usize, &[u8])| {
                let decl = TensorDecl {
                    name: names::expert(name.layer, name.part, index),
                    kind: decl.kind,
                    shape: decl.shape[..2].to_vec(),
                };
                (decl, bytes.to_vec())
            };
            bytes.chunks(size).enumerate().map(expert).collect()
        };
        self.tensors = self.tensors.into_iter().flat_map(split).collect();
        self
    }

    /// Writes the model to a file of its own.
    pub fn write(&self) -> ModelFile {
        let file = ModelFile::in_new_dir("variant.gguf");
        let mut metadata = self.metadata.clone();
        metadata.remove_arrangement();
        let tensors: Vec<_> = self
            .tensors
            .iter()
            .map(|(decl, bytes)| (decl.clone(), &bytes[..]))
            .collect();
        gguf::write_whole(&file.path, &metadata, &tensors).expect("the variant is sound");
        file
    }
}
