//! Importance matrices: for each tensor and expert, the mean squared activation of every column.
//!
//! Read as llama-quantize reads them (`common/imatrix-loader.cpp`, `tools/quantize`), so that the
//! same file leads to the same bits. Two forms are in the wild:
//!
//! - GGUF: F32 tensors `<weight>.in_sum2` `[columns, experts]`, sums of squares, and
//!   `<weight>.counts` `[1, experts]`, over how many tokens. An expert that saw none weighs all columns alike.
//! - Legacy (`.dat`): a count of entries; each a name, a number of calls, a number of values, the
//!   values; then optionally the number of chunks and the name of the text.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use byteorder::{ByteOrder, LittleEndian};
use fewbit::gguf::{self, Gguf, Metadata, TensorInfo, Value};
use fewbit::quant::BlockType;

use crate::checkpoint::{HEADER_MEMORY, Tensor};
use crate::error::{Error, Result};
use crate::round::{AVERAGE_TOKENS, ENOUGH_TOKENS};

/// Most bytes that are read: Mixtral 8x22B has 14 M columns, 56 MB. (A GGUF file may hold other things too.)
const MAX_BYTES: u64 = 128 << 20;

/// Most entries of a legacy file: one a matrix, of which Mixtral 8x22B has 561.
const MAX_ENTRIES: usize = 1 << 16;

/// An importance matrix, ready for use.
#[derive(Debug)]
pub struct Imatrix {
    path: PathBuf,
    values: HashMap<String, Vec<f32>>,
    /// Tokens that each expert saw, where there are several.
    counts: HashMap<String, Vec<f32>>,
    dataset: Option<String>,
    chunks: u32,
}

/// An expert whose own statistics are too few.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thin {
    /// The tensor.
    pub tensor: String,
    /// The expert.
    pub expert: usize,
    /// Tokens that it saw.
    pub tokens: u64,
    /// Whether it leans on its layer's average; where no expert of the layer saw a token, all columns count alike.
    pub by_average: bool,
}

impl Imatrix {
    /// Reads a file of either form.
    pub fn read(path: &Path) -> Result<Imatrix> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let len = file.metadata().map_err(Error::io("open", path))?.len();
        let mut magic = [0; 4];
        let is_gguf = len >= 4 && file.read_exact_at(&mut magic, 0).is_ok() && &magic == b"GGUF";
        if len > MAX_BYTES && !is_gguf {
            return Err(too_many(path, len));
        }
        let imatrix = if is_gguf {
            from_gguf(path, &file)?
        } else {
            from_legacy(path, &file, len)?
        };
        for (name, values) in &imatrix.values {
            if let Some(column) = values.iter().position(|v| !v.is_finite()) {
                return Err(fault(
                    path,
                    format!(
                        "{name}: value {column} is {}: calibrate again",
                        values[column]
                    ),
                ));
            }
        }
        Ok(imatrix)
    }

    /// Importance weights of a tensor, `columns × experts` of them; nothing where the file has none for it.
    ///
    /// # Errors
    /// If it has some and their number does not fit, except for the token embedding's (as in llama-quantize:
    /// files exist that hold them in another size).
    pub fn of(&self, tensor: &Tensor) -> Result<Option<&[f32]>> {
        let experts = tensor.shape.get(2).copied().unwrap_or(1);
        match self.values.get(&tensor.name) {
            Some(values) if values.len() == tensor.columns() * experts => Ok(Some(values)),
            Some(values) if tensor.name != gguf::names::TOKEN_EMBD => {
                let (found, columns) = (values.len(), tensor.columns());
                let what = format!(
                    "{}: {found} values, the model has {columns} columns × {experts} experts: made from another model?",
                    tensor.name
                );
                Err(fault(&self.path, what))
            }
            _ => Ok(None),
        }
    }

    /// As [`of`](Self::of), where experts that saw few tokens lean on their layer's average. This is for
    /// rounding otherwise than llama-quantize does, which knows nothing of it.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn smoothed(&self, tensor: &Tensor) -> Result<Option<Vec<f32>>> {
        let Some(values) = self.of(tensor)? else {
            return Ok(None);
        };
        let mut values = values.to_vec();
        let counts = self.counts.get(&tensor.name);
        let total: f32 = counts.iter().flat_map(|counts| counts.iter()).sum();
        let Some(counts) = counts.filter(|_| total > 0.0) else {
            return Ok(Some(values));
        };
        let columns = tensor.columns();
        let mut average = vec![0.0; columns];
        for (values, &count) in values.chunks_exact(columns).zip(counts) {
            for (sum, value) in average.iter_mut().zip(values) {
                *sum += value * count / total;
            }
        }
        for (values, &count) in values.chunks_exact_mut(columns).zip(counts) {
            if is_thin(count) {
                let theirs = AVERAGE_TOKENS as f32;
                for (value, average) in values.iter_mut().zip(&average) {
                    *value = (*value * count + average * theirs) / (count + theirs);
                }
            }
        }
        Ok(Some(values))
    }

    /// An expert's share of the tokens that a tensor's experts saw; 1 where nothing is known of them.
    pub fn share(&self, tensor: &str, expert: usize) -> f32 {
        let counts = self.counts.get(tensor);
        let share = counts.and_then(|counts| {
            let total: f32 = counts.iter().sum();
            (total > 0.0).then(|| counts.get(expert).copied().unwrap_or(0.0) / total)
        });
        share.unwrap_or(1.0)
    }

    /// The experts that [`smoothed`](Self::smoothed) lets lean.
    pub fn thin<'a>(&'a self, tensors: &'a [Tensor]) -> impl Iterator<Item = Thin> + 'a {
        tensors.iter().flat_map(|tensor| {
            let counts = self.counts.get(&tensor.name).map_or(&[][..], Vec::as_slice);
            let any = counts.iter().any(|&count| count > 0.0);
            let thin = counts.iter().copied().enumerate();
            let thin = thin.filter(|&(_, count)| is_thin(count));
            thin.map(move |(expert, count)| Thin {
                tensor: tensor.name.clone(),
                expert,
                tokens: count as u64,
                by_average: any,
            })
        })
    }

    /// The error of an imatrix without importance weights for any of a model's matrices.
    pub fn fits_nothing(&self) -> Error {
        fault(
            &self.path,
            "has entries for none of the model's matrices: made from another model?",
        )
    }

    /// Notes in the output's metadata what guided its encoding, under llama-quantize's keys.
    pub fn describe(&self, meta: &mut Metadata) {
        let text = |s: &str| Value::String(truncated(s).to_owned());
        meta.insert("quantize.imatrix.file", text(&self.path.to_string_lossy()));
        if let Some(dataset) = &self.dataset {
            meta.insert("quantize.imatrix.dataset", text(dataset));
        }
        meta.insert(
            "quantize.imatrix.entries_count",
            Value::U32(self.values.len() as u32),
        );
        if self.chunks > 0 {
            meta.insert("quantize.imatrix.chunks_count", Value::U32(self.chunks));
        }
    }
}

fn is_thin(tokens: f32) -> bool {
    f64::from(tokens) < ENOUGH_TOKENS
}

pub(crate) fn fault(path: &Path, what: impl Into<String>) -> Error {
    Error::Imatrix {
        path: path.to_owned(),
        what: what.into(),
    }
}

fn too_many(path: &Path, len: u64) -> Error {
    fault(path, format!("{len} bytes are too many for an imatrix"))
}

/// llama-quantize keeps 127 bytes of such strings.
fn truncated(s: &str) -> &str {
    let mut end = s.len().min(127);
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    &s[..end]
}

fn from_gguf(path: &Path, file: &File) -> Result<Imatrix> {
    let gguf = gguf::read_within(path, HEADER_MEMORY)?;
    let meta = &gguf.metadata;
    for key in [
        "imatrix.datasets",
        "imatrix.chunk_count",
        "imatrix.chunk_size",
    ] {
        if !meta.contains(key) {
            return Err(fault(
                path,
                format!("metadata key {key} is missing: not an imatrix"),
            ));
        }
    }
    let datasets = meta.strings("imatrix.datasets")?;
    let mut pairs: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for info in &gguf.tensors {
        if let Some(name) = info.name.strip_suffix(".in_sum2") {
            pairs.entry(name).or_default()[0] = Some(info);
        } else if let Some(name) = info.name.strip_suffix(".counts") {
            pairs.entry(name).or_default()[1] = Some(info);
        }
    }
    let infos = pairs.values().flatten().flatten();
    let len = infos.map(|info| info.bytes).sum();
    if len > MAX_BYTES {
        return Err(too_many(path, len));
    }
    let (mut values, mut tokens) = (HashMap::new(), HashMap::new());
    for (name, pair) in pairs {
        let [Some(sums), Some(counts)] = pair else {
            return Err(fault(
                path,
                format!("{name}: .in_sum2 without .counts, or the reverse"),
            ));
        };
        let mut sums = floats(&gguf, path, file, sums)?;
        let counts = floats(&gguf, path, file, counts)?;
        if !sums.len().is_multiple_of(counts.len()) {
            return Err(fault(
                path,
                format!(
                    "{name}: {} sums do not fit {} counts",
                    sums.len(),
                    counts.len()
                ),
            ));
        }
        let columns = sums.len() / counts.len();
        for (expert, &count) in sums.chunks_exact_mut(columns).zip(&counts) {
            let count = count.round();
            expert
                .iter_mut()
                .for_each(|sum| *sum = if count > 0.0 { *sum / count } else { 1.0 });
        }
        values.insert(name.to_owned(), sums);
        if counts.len() > 1 {
            tokens.insert(name.to_owned(), counts);
        }
    }
    if values.is_empty() {
        return Err(fault(path, "holds no .in_sum2 tensors: not an imatrix"));
    }
    let dataset = datasets.and_then(|d| d.first().map(|d| d.to_string()));
    Ok(Imatrix {
        path: path.to_owned(),
        values,
        counts: tokens,
        dataset,
        chunks: meta.u32("imatrix.chunk_count")?.unwrap_or(0),
    })
}

fn floats(gguf: &Gguf, path: &Path, file: &File, info: &TensorInfo) -> Result<Vec<f32>> {
    if info.kind != BlockType::F32 || gguf.files.len() != 1 {
        return Err(fault(
            path,
            format!("{}: is {}, not F32 in one file", info.name, info.kind),
        ));
    }
    let mut bytes = vec![0; info.bytes as usize];
    file.read_exact_at(&mut bytes, info.offset)
        .map_err(Error::io("read", path))?;
    Ok(bytes.chunks_exact(4).map(LittleEndian::read_f32).collect())
}

fn from_legacy(path: &Path, file: &File, len: u64) -> Result<Imatrix> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)
        .map_err(Error::io("read", path))?;
    let mut reader = Legacy {
        path,
        bytes: &bytes,
        at: 0,
    };
    let entries = reader.count("the number of entries")?;
    if entries == 0 {
        return Err(fault(
            path,
            "neither a GGUF imatrix nor a legacy one with entries",
        ));
    }
    if entries > MAX_ENTRIES {
        return Err(fault(
            path,
            format!("{entries} entries are too many: not an imatrix"),
        ));
    }
    let mut values = HashMap::new();
    for entry in 0..entries {
        let name_len = reader.count("a name's length")?;
        let name = String::from_utf8_lossy(reader.take(name_len, "a name")?).into_owned();
        let calls = reader.count("a number of calls")?;
        let n = reader.count("a number of values")?;
        if n == 0 {
            return Err(fault(path, format!("entry {entry} ({name}) has no values")));
        }
        let raw = reader.take(n.saturating_mul(4), "values")?;
        let scale = |v: f32| if calls > 0 { v / calls as f32 } else { v };
        values.insert(
            name,
            raw.chunks_exact(4)
                .map(|b| scale(LittleEndian::read_f32(b)))
                .collect(),
        );
    }
    // What follows is missing in the oldest files.
    let chunks = reader.count("the number of chunks").unwrap_or(0);
    let dataset = reader
        .count("a length")
        .and_then(|n| reader.take(n, "the text's name"))
        .ok();
    let dataset = dataset
        .map(|d| String::from_utf8_lossy(d).into_owned())
        .filter(|d| !d.is_empty());
    Ok(Imatrix {
        path: path.to_owned(),
        values,
        counts: HashMap::new(),
        dataset,
        chunks: chunks as u32,
    })
}

/// A cursor over a legacy file.
struct Legacy<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Legacy<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some((taken, _)) = rest.split_at_checked(n) else {
            return Err(fault(
                self.path,
                format!(
                    "offset {}: {what} needs {n} bytes, {} remain",
                    self.at,
                    rest.len()
                ),
            ));
        };
        self.at += n;
        Ok(taken)
    }

    /// A non-negative i32.
    fn count(&mut self, what: &str) -> Result<usize> {
        let at = self.at;
        let value = LittleEndian::read_i32(self.take(4, what)?);
        usize::try_from(value)
            .map_err(|_| fault(self.path, format!("offset {at}: {what} is {value}")))
    }
}
