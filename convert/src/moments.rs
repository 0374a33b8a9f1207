//! Second moments of the matrices' inputs, as `fewbit calibrate --moments` counts them: see there for the format.
//!
//! They are read an expert at a time, since those of a large model take gigabytes.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fewbit::gguf::{self, TensorInfo, names};
use fewbit::quant::BlockType;

use crate::checkpoint::{HEADER_MEMORY, Tensor};
use crate::error::{Error, Result};
use crate::imatrix::fault;
use crate::round::{AVERAGE_TOKENS, ENOUGH_TOKENS, RawWindow};

/// Most bytes of an expert's moments that are read at once: those of Mixtral 8x22B's widest matrix, whole rows.
const MAX_BYTES: u64 = 2 << 30;

/// A file of statistics that holds moments.
#[derive(Debug)]
pub struct Moments {
    path: PathBuf,
    file: File,
    tensors: HashMap<String, TensorInfo>,
    /// Tokens that each expert saw, by the names of `tensors`.
    counts: HashMap<String, Vec<f32>>,
}

impl Moments {
    /// Opens a file of statistics; `None` if it has no moments.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let mut magic = [0; 4];
        if file.read_exact_at(&mut magic, 0).is_err() || &magic != b"GGUF" {
            return Ok(None);
        }
        let gguf = gguf::read_within(path, HEADER_MEMORY)?;
        let mut moments = Self {
            path: path.to_owned(),
            file,
            tensors: HashMap::new(),
            counts: HashMap::new(),
        };
        for info in &gguf.tensors {
            if let Some(name) = info.name.strip_suffix(".moments") {
                if info.kind != BlockType::F32 || gguf.files.len() != 1 {
                    return Err(fault(path, format!("{}: not F32 in one file", info.name)));
                }
                let counts = gguf.tensor(&format!("{name}.counts"));
                if let Some(counts) =
                    counts.filter(|counts| counts.kind == BlockType::F32 && counts.bytes < 1 << 16)
                {
                    let counts = moments.floats(counts.offset, counts.elements())?;
                    moments.counts.insert(name.to_owned(), counts);
                }
                moments.tensors.insert(name.to_owned(), info.clone());
            }
        }
        Ok((!moments.tensors.is_empty()).then_some(moments))
    }

    /// Columns of the widest windows.
    pub fn width(&self) -> usize {
        let widths = self.tensors.values().map(TensorInfo::columns);
        widths.max().unwrap_or(0)
    }

    /// The name under which the moments of a tensor's input stand, if they do.
    ///
    /// # Errors
    /// If they are another model's.
    pub fn of(&self, tensor: &Tensor) -> Result<Option<String>> {
        let name = match names::parse(&tensor.name) {
            Some(block) => {
                let part = names::same_input(block.part);
                match block.experts {
                    names::Experts::None => names::block(block.layer, part),
                    _ => names::experts(block.layer, part),
                }
            }
            None => tensor.name.clone(),
        };
        let Some(info) = self.tensors.get(&name) else {
            return Ok(None);
        };
        let experts = tensor.shape.get(2).copied().unwrap_or(1);
        let found = [1, 2].map(|i| info.shape.get(i).copied().unwrap_or(1));
        let width = info.columns();
        if found != [tensor.columns(), experts]
            || width > found[0]
            || (4 * width * found[0]) as u64 > MAX_BYTES
        {
            let what = format!(
                "{}: moments {:?}, the model has {} columns × {experts} experts: made from another model?",
                info.name,
                info.shape,
                tensor.columns()
            );
            return Err(fault(&self.path, what));
        }
        Ok(Some(name))
    }

    /// The moments of an expert's input, window by window.
    ///
    /// # Errors
    /// If the file cannot be read, or they are no numbers.
    pub fn read(&self, name: &str, expert: usize) -> Result<Vec<RawWindow>> {
        let info = &self.tensors[name];
        let (width, columns) = (info.shape[0], info.shape[1]);
        let experts = info.shape.get(2).copied().unwrap_or(1);
        let len = width * columns;
        let read = |expert: usize| {
            let offset = info.offset + (4 * len * expert) as u64;
            self.floats(offset, len)
        };
        let mut moments = read(expert)?;
        // An expert that saw few tokens leans on its neighbours.
        if let Some(counts) = self
            .counts
            .get(name)
            .filter(|counts| counts.len() == experts && experts > 1)
        {
            let total: f64 = counts.iter().map(|&count| f64::from(count)).sum();
            if f64::from(counts[expert]) < ENOUGH_TOKENS && total > 0.0 {
                let share = (AVERAGE_TOKENS / total) as f32;
                for other in 0..experts {
                    let theirs = if other == expert {
                        moments.clone()
                    } else {
                        read(other)?
                    };
                    for (sum, theirs) in moments.iter_mut().zip(theirs) {
                        *sum += share * theirs;
                    }
                }
            }
        }
        if let Some(bad) = moments.iter().position(|x| !x.is_finite()) {
            let what = format!(
                "{}: expert {expert}, value {bad} is {}: calibrate again",
                info.name, moments[bad]
            );
            return Err(fault(&self.path, what));
        }
        let windows = moments.chunks(width * width).enumerate();
        Ok(windows
            .map(|(index, window)| {
                // The last window of a row may be narrower than its rows are long.
                let len = window.len() / width;
                let rows = window.chunks_exact(width);
                RawWindow {
                    start: index * width,
                    moments: rows.flat_map(|row| &row[..len]).copied().collect(),
                    len,
                }
            })
            .collect())
    }

    fn floats(&self, offset: u64, len: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0_f32; len];
        self.file
            .read_exact_at(bytemuck::cast_slice_mut(&mut values), offset)
            .map_err(Error::io("read", &self.path))?;
        Ok(values)
    }
}
