//! The converter against llama-quantize: every tensor's type, and every byte.
//!
//! `cargo test -p quant-tests --features ggml --test conformance_quantize`
#![cfg(feature = "ggml")]

use std::fs;
use std::path::{Path, PathBuf};

use fewbit::gguf::{self, Gguf, Metadata, TensorDecl, Value, write_whole};
use fewbit::plan::Shape;
use fewbit::quant::BlockType::{self, *};
use fewbit_convert::Options;
use fewbit_convert::recipe::{Mix, RecipeModel, RecipeTensor, assign, ftype_id};
use ggml_sys_bindings as ggml;
use indicatif::ProgressBar;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use regex::Regex;

#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    experts: usize,
    hidden: usize,
    ffn: usize,
    tied: bool,
    /// Type of the matrices before they are quantized.
    source: BlockType,
}

const DENSE: Model = Model {
    name: "dense",
    layers: 4,
    heads: 4,
    kv_heads: 1,
    experts: 0,
    hidden: 256,
    ffn: 512,
    tied: false,
    source: F32,
};
const MIXTURE: Model = Model {
    name: "mixture",
    layers: 3,
    kv_heads: 2,
    experts: 8,
    ffn: 256,
    source: F16,
    ..DENSE
};
/// As SmolLM2: rows that blocks of 256 do not fill, and no output head.
const NARROW: Model = Model {
    name: "narrow",
    layers: 3,
    heads: 9,
    kv_heads: 3,
    hidden: 576,
    tied: true,
    source: BF16,
    ..DENSE
};

impl Model {
    fn metadata(self) -> Metadata {
        let count = |n: usize| Value::U32(n as u32);
        let mut metadata: Metadata = [
            ("general.architecture", Value::String("llama".to_owned())),
            ("llama.block_count", count(self.layers)),
            ("llama.context_length", count(512)),
            ("llama.embedding_length", count(self.hidden)),
            ("llama.feed_forward_length", count(self.ffn)),
            ("llama.attention.head_count", count(self.heads)),
            ("llama.attention.head_count_kv", count(self.kv_heads)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.vocab_size", count(32)),
        ]
        .into_iter()
        .collect();
        if self.experts > 0 {
            metadata.insert("llama.expert_count", count(self.experts));
            metadata.insert("llama.expert_used_count", count(2));
        }
        metadata
    }

    /// The tensors as llama.cpp's converter would type them, with at most `rows` rows each.
    fn tensors(self, rows: usize) -> Vec<TensorDecl> {
        let shape = Shape::from_metadata(&self.metadata()).unwrap();
        let decl = |(name, mut shape): (String, Vec<usize>)| {
            if let Some(extent) = shape.get_mut(1)
                && !name.contains("ffn_gate_inp")
            {
                *extent = rows.min(*extent);
            }
            let float = shape.len() == 1 || name.contains("ffn_gate_inp");
            TensorDecl {
                name,
                kind: if float { F32 } else { self.source },
                shape,
            }
        };
        shape.tensors(self.tied).into_iter().map(decl).collect()
    }

    /// Writes a file of random weights; rows differ in scale, as they do in trained models.
    fn write(self, path: &Path, rows: usize) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.layers as u64);
        let mut weights = |tensor: &TensorDecl| {
            let encode = tensor.kind.encoder().unwrap();
            let columns = tensor.shape[0];
            let mut bytes = vec![0; tensor.bytes().unwrap() as usize];
            for row in bytes.chunks_exact_mut(tensor.kind.row_bytes(columns).unwrap()) {
                let scale = 0.01 * rng.random_range(0.1..4.0_f32);
                let sum = |rng: &mut ChaCha8Rng| {
                    (0..4).map(|_| rng.random_range(-1.0..1.0_f32)).sum::<f32>()
                };
                let weights: Vec<f32> = (0..columns).map(|_| scale * sum(&mut rng)).collect();
                encode(&weights, None, row);
            }
            bytes
        };
        let tensors = self.tensors(rows);
        let data: Vec<Vec<u8>> = tensors.iter().map(&mut weights).collect();
        let pairs: Vec<(TensorDecl, &[u8])> = tensors
            .into_iter()
            .zip(data.iter().map(Vec::as_slice))
            .collect();
        write_whole(path, &self.metadata(), &pairs).unwrap();
    }

    /// Importance of the matrices inside the layers, but for one that calibration has missed.
    fn imatrix(self) -> Vec<(String, Vec<f32>)> {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        self.tensors(1 << 20)
            .into_iter()
            .filter(|t| {
                t.shape.len() > 1 && t.name.starts_with("blk.") && t.name != "blk.1.attn_q.weight"
            })
            .map(|t| {
                let columns = t.shape[0] * t.shape.get(2).unwrap_or(&1);
                let weight = |_| rng.random_range(0.0..1.0_f32).powi(4);
                (t.name, (0..columns).map(weight).collect())
            })
            .collect()
    }
}

/// The imatrix in a file that the converter reads: sums over one token.
fn write_imatrix(path: &Path, imatrix: &[(String, Vec<f32>)], model: Model) {
    let mut tensors = Vec::new();
    let ones = [1.0_f32; 8];
    for (name, weights) in imatrix {
        let experts = if name.contains("_exps") {
            model.experts
        } else {
            1
        };
        let decl = |suffix, columns| TensorDecl {
            name: format!("{name}.{suffix}"),
            kind: F32,
            shape: vec![columns, experts],
        };
        tensors.push((
            decl("in_sum2", weights.len() / experts),
            bytemuck::cast_slice(weights),
        ));
        tensors.push((decl("counts", 1), bytemuck::cast_slice(&ones[..experts])));
    }
    let metadata = [
        ("general.type", Value::String("imatrix".to_owned())),
        (
            "imatrix.datasets",
            Value::Array(gguf::Array::String(vec!["random".to_owned()])),
        ),
        ("imatrix.chunk_count", Value::U32(1)),
        ("imatrix.chunk_size", Value::U32(512)),
    ];
    write_whole(path, &metadata.into_iter().collect(), &tensors).unwrap();
}

/// Name, type, shape and bytes of every tensor, by name.
fn contents(path: &Path) -> Vec<(String, BlockType, Vec<usize>, Vec<u8>)> {
    let file: Gguf = gguf::read(path).unwrap();
    let bytes = fs::read(path).unwrap();
    let mut tensors: Vec<_> = file
        .tensors
        .into_iter()
        .map(|t| {
            (
                t.name,
                t.kind,
                t.shape,
                bytes[t.offset as usize..][..t.bytes as usize].to_vec(),
            )
        })
        .collect();
    tensors.sort();
    tensors
}

struct Files {
    folder: tempfile::TempDir,
    model: Model,
}

impl Files {
    fn new(model: Model, rows: usize) -> Self {
        ggml::log_errors_only();
        let files = Self {
            folder: tempfile::tempdir().unwrap(),
            model,
        };
        model.write(&files.path("source.gguf"), rows);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Quantizes with both and compares all tensors.
    fn compare(&self, mix: Mix, imatrix: Option<&[(String, Vec<f32>)]>) {
        let (source, ours, theirs) = (
            self.path("source.gguf"),
            self.path("ours.gguf"),
            self.path("theirs.gguf"),
        );
        let mut options = Options {
            force: true,
            ..Options::new(mix)
        };
        if let Some(imatrix) = imatrix {
            let path = self.path("imatrix.gguf");
            write_imatrix(&path, imatrix, self.model);
            options.imatrix = Some(path);
        }
        fewbit_convert::convert(&source, &ours, &options, &ProgressBar::hidden()).unwrap();
        let quantize = ggml::Quantize {
            file_type: ftype_id(mix),
            imatrix: imatrix.unwrap_or(&[]),
            ..Default::default()
        };
        quantize.run(&source, &theirs).unwrap();

        let (ours, theirs) = (contents(&ours), contents(&theirs));
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let case = format!(
                "{}, {mix}, imatrix {}: {}",
                self.model.name,
                imatrix.is_some(),
                ours.0
            );
            assert_eq!(
                (&ours.0, ours.1, &ours.2),
                (&theirs.0, theirs.1, &theirs.2),
                "{case}"
            );
            let parts = ours.3.iter().zip(&theirs.3).position(|(a, b)| a != b);
            assert_eq!(parts, None, "{case} ({}): first byte that differs", ours.1);
        }
    }
}

#[test]
fn files_equal_llama_quantizes_byte_for_byte() {
    assert!(
        !ggml::contracts_multiply_add(),
        "build the oracle without -Ctarget-cpu: its bits are then the reference's"
    );
    for model in [DENSE, MIXTURE, NARROW] {
        let files = Files::new(model, 1 << 20);
        let imatrix = model.imatrix();
        for mix in Mix::all() {
            files.compare(mix, None);
            files.compare(mix, Some(&imatrix));
        }
    }
}

#[test]
fn types_equal_llama_quantizes_for_every_mix_and_kind_of_model() {
    let models = [
        DENSE,
        Model {
            name: "one layer",
            layers: 1,
            ..DENSE
        },
        Model {
            name: "8 layers, tied",
            layers: 8,
            tied: true,
            ..DENSE
        },
        Model {
            name: "32 layers, heads apart",
            layers: 32,
            kv_heads: 4,
            ..DENSE
        },
        Model {
            name: "32 layers, heads shared",
            layers: 32,
            ..DENSE
        },
        Model {
            name: "80 layers, heads apart",
            layers: 80,
            kv_heads: 4,
            ..DENSE
        },
        Model {
            name: "80 layers, heads shared",
            layers: 80,
            ..DENSE
        },
        MIXTURE,
        Model {
            name: "mixture of 32 layers",
            layers: 32,
            ..MIXTURE
        },
        Model {
            name: "mixture of 56 layers, tied",
            layers: 56,
            tied: true,
            ..MIXTURE
        },
        Model {
            name: "mixture of 4",
            layers: 8,
            experts: 4,
            ..MIXTURE
        },
        Model {
            name: "mixture of narrow rows",
            heads: 9,
            kv_heads: 3,
            hidden: 576,
            ffn: 352,
            ..MIXTURE
        },
        Model {
            layers: 30,
            ..NARROW
        },
        Model {
            name: "rows of 100",
            heads: 2,
            hidden: 100,
            ffn: 300,
            ..DENSE
        },
        Model {
            name: "rows of 96, tied",
            hidden: 96,
            ffn: 352,
            tied: true,
            ..DENSE
        },
    ];
    let overrides: [(&str, BlockType); 2] =
        [("blk\\.[01]\\.(attn_v|ffn_down)", Q5_K), ("attn_v", Q3_K)];
    for model in models {
        let files = Files::new(model, 2);
        // Its presence alone changes types.
        let imatrix = [("nothing".to_owned(), vec![1.0])];
        for mix in Mix::all() {
            compare_types(&files, mix, &[], &[]);
            compare_types(&files, mix, &imatrix, &[]);
            // llama-quantize drops overrides where the mix is not quantized; ours heeds them.
            if mix.base().block_len() > 1 {
                compare_types(&files, mix, &[], &overrides);
            }
        }
    }
}

fn compare_types(
    files: &Files,
    mix: Mix,
    imatrix: &[(String, Vec<f32>)],
    overrides: &[(&str, BlockType)],
) {
    let Model {
        name,
        layers,
        heads,
        kv_heads,
        experts,
        ..
    } = files.model;
    let theirs = files.path("theirs.gguf");
    let by_id: Vec<(&str, u32)> = overrides
        .iter()
        .map(|&(pattern, kind)| (pattern, kind.id()))
        .collect();
    let quantize = ggml::Quantize {
        file_type: ftype_id(mix),
        imatrix,
        overrides: &by_id,
    };
    quantize.run(&files.path("source.gguf"), &theirs).unwrap();
    let theirs = gguf::read(&theirs).unwrap();

    let decls = files.model.tensors(2);
    let tensors: Vec<RecipeTensor> = decls
        .iter()
        .map(|t| RecipeTensor {
            name: &t.name,
            shape: &t.shape,
            source: t.kind,
        })
        .collect();
    let overrides: Vec<(Regex, BlockType)> = overrides
        .iter()
        .map(|&(pattern, kind)| (Regex::new(pattern).unwrap(), kind))
        .collect();
    let model = RecipeModel {
        layers,
        heads,
        kv_heads,
        experts,
        imatrix: !imatrix.is_empty(),
    };
    let ours = assign(mix, &model, &overrides, &tensors).unwrap();
    assert_eq!(ours.len(), theirs.tensors.len());
    for (tensor, choice) in decls.iter().zip(ours) {
        let theirs = theirs.tensor(&tensor.name).unwrap().kind;
        let case = format!(
            "{name}, {mix}, imatrix {}, {} overrides",
            model.imatrix,
            overrides.len()
        );
        assert_eq!(choice.kind, theirs, "{case}: {}", tensor.name);
    }
}
