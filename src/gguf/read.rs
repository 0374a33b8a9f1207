//! The reader: a header's pairs and tensor table, checked, and the splits of a model.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use indexmap::IndexMap;

use super::source::{MAX_MEMORY, Place, Source};
use super::{
    DEFAULT_ALIGNMENT, Error, Gguf, KEY_ALIGNMENT, MAGIC, MAX_DIMS, Metadata, TensorInfo, split,
    tensor_bytes,
};
use crate::quant::BlockType;

/// Least bytes of a pair: an empty key, a type, a value of one byte.
const MIN_PAIR_BYTES: u64 = 8 + 4 + 1;
/// Least bytes of a tensor's description: an empty name, one dimension.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;
/// Memory of a pair in the map, its heap strings apart: entry and hash table slots.
const PAIR_MEMORY: u64 = 128;
/// Memory of a tensor's description, its name apart: entry, extents, index, order by offset.
const TENSOR_MEMORY: u64 = 256;
/// Bounds of `general.alignment`.
const ALIGNMENTS: std::ops::RangeInclusive<u32> = 8..=1 << 20;

/// Opens a GGUF file; the first file of a split model brings the others.
pub fn read(path: &Path) -> Result<Gguf, Error> {
    read_within(path, MAX_MEMORY)
}

/// As [`read`]; the headers of all files may take about `memory` bytes.
pub fn read_within(path: &Path, mut memory: u64) -> Result<Gguf, Error> {
    split::check_is_first(path)?;
    let mut model = begin(path, open(path, 0, &mut memory)?)?;
    for path in split::others(path, &model.metadata)? {
        let number = model.files.len();
        let part = open(&path, number, &mut memory)?;
        split::check_member(number, &part.metadata, &model.metadata)?;
        model.files.push(path);
        append(&mut model, part.tensors)?;
    }
    split::check_tensor_count(&model)?;
    Ok(model)
}

/// Reads a model that is one file from any reader of `len` bytes; `path` names it in errors.
pub fn parse(input: impl Read, len: u64, path: &Path) -> Result<Gguf, Error> {
    let mut memory = MAX_MEMORY;
    begin(path, parse_part(input, len, path, 0, &mut memory)?)
}

/// A model whose first file is `part`.
fn begin(path: &Path, part: Part) -> Result<Gguf, Error> {
    let mut model = Gguf {
        files: vec![path.to_owned()],
        metadata: part.metadata,
        tensors: Vec::new(),
        index: HashMap::new(),
    };
    append(&mut model, part.tensors)?;
    Ok(model)
}

/// Adds a file's tensors; a name may stand once in all files.
fn append(model: &mut Gguf, tensors: Vec<Described>) -> Result<(), Error> {
    for Described { info, entry } in tensors {
        match model.index.entry(info.name.clone()) {
            Entry::Occupied(known) => {
                let first = &model.tensors[*known.get()];
                return Err(Error::Malformed {
                    path: model.files[info.file].clone(),
                    offset: entry,
                    what: format!("tensor {}", info.name),
                    problem: format!(
                        "stands twice, first in {}",
                        model.files[first.file].display()
                    ),
                });
            }
            Entry::Vacant(slot) => slot.insert(model.tensors.len()),
        };
        model.tensors.push(info);
    }
    Ok(())
}

/// One file of a model.
struct Part {
    metadata: Metadata,
    tensors: Vec<Described>,
}

/// A tensor and the place of its description in the header, for messages.
struct Described {
    info: TensorInfo,
    entry: u64,
}

fn open(path: &Path, number: usize, memory: &mut u64) -> Result<Part, Error> {
    let failed = |cause| Error::Io {
        path: path.to_owned(),
        action: "open the file",
        cause,
    };
    // Asked before it is opened: opening a pipe waits for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(Error::NotGguf {
            path: path.to_owned(),
            reason: "is not a regular file; name a .gguf file".to_owned(),
        });
    }
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    parse_part(BufReader::new(file), len, path, number, memory)
}

fn parse_part(
    input: impl Read,
    len: u64,
    path: &Path,
    file: usize,
    memory: &mut u64,
) -> Result<Part, Error> {
    let mut source = Source::new(input, len, path, memory);
    source.magic_and_version()?;
    let tensor_count = source.u64()?;
    let pair_count = source.u64()?;
    let metadata = source.metadata(pair_count)?;
    let alignment = source.alignment(&metadata)?;
    let mut tensors = source.tensor_table(tensor_count, file)?;
    source.place_tensors(&mut tensors, alignment)?;
    Ok(Part { metadata, tensors })
}

impl<R: Read> Source<'_, R> {
    fn magic_and_version(&mut self) -> Result<(), Error> {
        let magic = self.magic()?;
        if magic != MAGIC {
            return Err(self.not_gguf(foreign(&magic)));
        }
        match self.u32()? {
            2 | 3 => Ok(()),
            1 => Err(self.not_gguf(
                "is GGUF version 1, which is not read; make a newer file from the original checkpoint",
            )),
            version if (1..=0xffff).contains(&version.swap_bytes()) => Err(self.not_gguf(
                "is a big-endian GGUF file, which is not read; convert it with gguf_convert_endian.py of the gguf package",
            )),
            version => Err(self.not_gguf(format!("is GGUF version {version}; versions 2 and 3 are read"))),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<Metadata, Error> {
        self.need(count.saturating_mul(MIN_PAIR_BYTES), || {
            format!("{count} metadata keys")
        })?;
        self.allocate(count.saturating_mul(PAIR_MEMORY))?;
        let mut entries = IndexMap::with_capacity(count as usize);
        for number in 0..count {
            self.place = Place::PairNumber(number);
            let start = self.position;
            let key = self.name()?;
            self.place = Place::Pair(key.clone());
            if entries.contains_key(&key) {
                return Err(self.malformed(start, "stands twice"));
            }
            let kind = self.value_type()?;
            let value = self.value(kind)?;
            entries.insert(key, value);
        }
        self.place = Place::Header;
        Ok(Metadata::of_file(self.path, entries))
    }

    fn alignment(&self, metadata: &Metadata) -> Result<u64, Error> {
        let Some(alignment) = metadata.u32(KEY_ALIGNMENT)? else {
            return Ok(DEFAULT_ALIGNMENT);
        };
        if !ALIGNMENTS.contains(&alignment) || !alignment.is_power_of_two() {
            let problem = format!("is {alignment}, needs a power of two from 8 to 1048576");
            return Err(metadata.error(KEY_ALIGNMENT, problem));
        }
        Ok(alignment.into())
    }

    /// The descriptions; offsets still count from the start of the data.
    fn tensor_table(&mut self, count: u64, file: usize) -> Result<Vec<Described>, Error> {
        self.need(count.saturating_mul(MIN_TENSOR_BYTES), || {
            format!("the table of {count} tensors")
        })?;
        self.allocate(count.saturating_mul(TENSOR_MEMORY))?;
        let mut tensors = Vec::with_capacity(count as usize);
        for number in 0..count {
            self.place = Place::TensorNumber(number);
            let entry = self.position;
            let name = self.name()?;
            // The index by name holds it a second time.
            self.allocate(name.len() as u64)?;
            self.place = Place::Tensor(name.clone());
            let info = self.tensor(name, file)?;
            tensors.push(Described { info, entry });
        }
        Ok(tensors)
    }

    fn tensor(&mut self, name: String, file: usize) -> Result<TensorInfo, Error> {
        let start = self.position;
        let dims = self.u32()? as usize;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(self.malformed(
                start,
                format!("has {dims} dimensions; 1 to {MAX_DIMS} are possible"),
            ));
        }
        let start = self.position;
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            let at = self.position;
            let extent = self.u64()?;
            if extent == 0 {
                return Err(self.malformed(at, "an extent is zero"));
            }
            shape.push(
                usize::try_from(extent)
                    .map_err(|_| self.malformed(at, format!("extent {extent} is too large")))?,
            );
        }
        if shape
            .iter()
            .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
            .is_none()
        {
            return Err(self.malformed(start, format!("shape {shape:?} overflows")));
        }
        let at = self.position;
        let id = self.u32()?;
        let kind = BlockType::from_id(id).ok_or_else(|| self.malformed(at, unknown_type(id)))?;
        let bytes = tensor_bytes(kind, &shape).ok_or_else(|| {
            let block = kind.block_len();
            let problem = match shape[0] % block {
                0 => format!("shape {shape:?} overflows"),
                _ => format!(
                    "rows of {} weights are not filled by {kind} blocks of {block}",
                    shape[0]
                ),
            };
            self.malformed(start, problem)
        })?;
        Ok(TensorInfo {
            name,
            kind,
            shape,
            file,
            offset: self.u64()?,
            bytes,
        })
    }

    /// Turns offsets into the file's and checks that the tensors lie in it, side by side.
    fn place_tensors(&mut self, tensors: &mut [Described], alignment: u64) -> Result<(), Error> {
        // Alignment is at most 1 MiB and the position at most the file's length.
        let data = self.position.next_multiple_of(alignment);
        for Described { info, entry } in tensors.iter_mut() {
            let what = || format!("tensor {}", info.name);
            let malformed = |problem| Error::Malformed {
                path: self.path.to_owned(),
                offset: *entry,
                what: what(),
                problem,
            };
            if info.offset % alignment != 0 {
                return Err(malformed(format!(
                    "offset {} is no multiple of the alignment {alignment}",
                    info.offset
                )));
            }
            let offset = data
                .checked_add(info.offset)
                .ok_or_else(|| malformed(format!("offset {} overflows", info.offset)))?;
            if offset
                .checked_add(info.bytes)
                .is_none_or(|end| end > self.len)
            {
                return Err(Error::Truncated {
                    path: self.path.to_owned(),
                    offset,
                    what: what(),
                    needed: info.bytes,
                    len: self.len,
                });
            }
            info.offset = offset;
        }

        let mut order: Vec<&Described> = tensors.iter().collect();
        order.sort_unstable_by_key(|tensor| tensor.info.offset);
        for pair in order.windows(2) {
            let (before, after) = (&pair[0].info, &pair[1].info);
            if before.offset + before.bytes > after.offset {
                return Err(Error::Malformed {
                    path: self.path.to_owned(),
                    offset: pair[1].entry,
                    what: format!("tensor {}", after.name),
                    problem: format!(
                        "begins at byte {}, inside tensor {} (bytes {} to {})",
                        after.offset,
                        before.name,
                        before.offset,
                        before.offset + before.bytes
                    ),
                });
            }
        }
        Ok(())
    }
}

/// What a file that does not begin as GGUF files do is instead, and the remedy.
fn foreign(start: &[u8]) -> String {
    match start {
        b"" => "is empty; download it again".to_owned(),
        b"lmgg" | b"tjgg" | b"fmgg" | b"algg" => {
            "is in a format older than GGUF, which is not read; make a GGUF file from the original checkpoint".to_owned()
        }
        [b'P', b'K', ..] => {
            "is a zip archive (a PyTorch checkpoint?), not a GGUF file; convert the checkpoint's safetensors with fewbit-convert"
                .to_owned()
        }
        b"vers" => "is a Git LFS pointer, not the file itself; fetch it with git lfs pull".to_owned(),
        [b'<', ..] => "is a web page, not a GGUF file; download it again".to_owned(),
        _ => format!("is not a GGUF file: it begins with \"{}\", not with \"GGUF\"", start.escape_ascii()),
    }
}

fn unknown_type(id: u32) -> String {
    match BlockType::name_of_id(id) {
        Some(name) => format!(
            "type {name} (id {id}) is not supported; requantize from the original checkpoint"
        ),
        None => format!("type id {id} does not exist"),
    }
}
