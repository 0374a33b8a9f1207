//! Decodes every weight of a file, in bounded memory, and reports those that are not finite.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::Context;
use indicatif::ProgressBar;
use serde_json::json;

use crate::cli::common::progress;
use crate::gguf::{Gguf, TensorInfo};

/// Weights that are decoded at a time: a multiple of every block's length.
const CHUNK: usize = 1 << 16;

/// A tensor with weights that are not finite.
pub(super) struct Finding {
    pub tensor: String,
    nan: u64,
    infinite: u64,
    /// Row (over all dimensions but the first) and column of the first of them.
    first: (usize, usize),
}

impl Finding {
    pub fn to_json(&self) -> serde_json::Value {
        json!({
            "name": self.tensor,
            "nan": self.nan,
            "inf": self.infinite,
            "row": self.first.0,
            "column": self.first.1,
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            tensor,
            nan,
            infinite,
            first: (row, column),
        } = self;
        write!(
            f,
            "{tensor}: {nan} NaN, {infinite} infinite, the first in row {row}, column {column}"
        )
    }
}

/// Template of the bar over the file's bytes.
const BAR: &str = "check {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";

/// Decodes all tensors, on `threads` threads (on all cores by default), and returns the ones
/// that are not finite in the file's order.
pub(super) fn check(gguf: &Gguf, threads: Option<usize>) -> anyhow::Result<Vec<Finding>> {
    let bar = progress(gguf.tensors.iter().map(|tensor| tensor.bytes).sum(), BAR);
    let next = AtomicUsize::new(0);
    let work = || -> anyhow::Result<Vec<(usize, Finding)>> {
        let mut findings = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(tensor) = gguf.tensors.get(index) else {
                return Ok(findings);
            };
            let path = &gguf.files[tensor.file];
            let finding = File::open(path)
                .and_then(|mut file| check_tensor(tensor, &mut file, &bar))
                .with_context(|| {
                    format!("{}: cannot read tensor {}", path.display(), tensor.name)
                })?;
            findings.extend(finding.map(|finding| (index, finding)));
        }
    };
    let cores = || thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or_else(cores);
    let mut findings = Vec::new();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            findings.extend(worker.join().expect("a worker does not panic")?);
        }
        anyhow::Ok(())
    })?;
    findings.sort_by_key(|(index, _)| *index);
    Ok(findings.into_iter().map(|(_, finding)| finding).collect())
}

fn check_tensor(
    tensor: &TensorInfo,
    file: &mut File,
    bar: &ProgressBar,
) -> std::io::Result<Option<Finding>> {
    let kind = tensor.kind;
    let chunk_bytes = CHUNK / kind.block_len() * kind.block_bytes();
    let mut bytes = vec![0; chunk_bytes.min(tensor.bytes as usize)];
    let mut weights = vec![0.0_f32; CHUNK.min(tensor.elements())];
    let mut finding: Option<Finding> = None;

    file.seek(SeekFrom::Start(tensor.offset))?;
    let mut done = 0;
    while done < tensor.elements() {
        // Rows follow each other without gaps, so a run of blocks may span several.
        let weights = &mut weights[..CHUNK.min(tensor.elements() - done)];
        let bytes = &mut bytes[..weights.len() / kind.block_len() * kind.block_bytes()];
        file.read_exact(bytes)?;
        kind.decode_row(bytes, weights);
        for (index, weight) in weights
            .iter()
            .enumerate()
            .filter(|(_, weight)| !weight.is_finite())
        {
            let at = done + index;
            let finding = finding.get_or_insert_with(|| Finding {
                tensor: tensor.name.clone(),
                nan: 0,
                infinite: 0,
                first: (at / tensor.columns(), at % tensor.columns()),
            });
            finding.nan += u64::from(weight.is_nan());
            finding.infinite += u64::from(weight.is_infinite());
        }
        done += weights.len();
        bar.inc(bytes.len() as u64);
    }
    Ok(finding)
}
