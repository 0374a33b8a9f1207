//! The reader. Nothing that the file says is believed before it is compared with the bytes
//! that remain, and nothing is allocated before that.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use byteorder::{LittleEndian, ReadBytesExt};
use indexmap::IndexMap;

use super::value::ValueType;
use super::{
    Array, DEFAULT_ALIGNMENT, Error, Gguf, KEY_ALIGNMENT, MAGIC, MAX_DIMS, Metadata, TensorInfo,
    Value, split, tensor_bytes,
};
use crate::quant::BlockType;

/// Memory that the headers of one model may take. The largest vocabularies need a tenth.
const MAX_MEMORY: u64 = 512 << 20;
/// Arrays may lie in arrays this deep.
const MAX_DEPTH: usize = 4;
/// Least bytes of a pair: an empty key, a type, a value of one byte.
const MIN_PAIR_BYTES: u64 = 8 + 4 + 1;
/// Least bytes of a tensor's description: an empty name, one dimension.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;
/// Memory of a pair in the map, its heap strings apart: entry and hash table slots.
const PAIR_MEMORY: u64 = 128;
/// Memory of a tensor's description, its name apart: entry, extents, index, order by offset.
const TENSOR_MEMORY: u64 = 256;
/// Longest key and tensor name.
const MAX_NAME: u64 = 65535;
/// Bounds of `general.alignment`.
const ALIGNMENTS: std::ops::RangeInclusive<u32> = 8..=1 << 20;

/// Opens a GGUF file; the first file of a split model brings the others.
pub fn read(path: &Path) -> Result<Gguf, Error> {
    split::check_is_first(path)?;
    let mut memory = MAX_MEMORY;
    let first = open(path, 0, &mut memory)?;
    let splits = split::others(path, &first.metadata)?;

    let mut model = Gguf {
        files: vec![path.to_owned()],
        metadata: first.metadata,
        tensors: Vec::new(),
        index: HashMap::new(),
    };
    append(&mut model, first.tensors)?;
    for (number, path) in splits
        .into_iter()
        .enumerate()
        .map(|(i, path)| (i + 1, path))
    {
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
    let part = parse_part(input, len, path, 0, &mut memory)?;
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
    let io = |action| {
        move |cause| Error::Io {
            path: path.to_owned(),
            action,
            cause,
        }
    };
    let about = std::fs::metadata(path).map_err(io("open the file"))?;
    if !about.is_file() {
        return Err(Error::NotGguf {
            path: path.to_owned(),
            reason: "is not a regular file; name a .gguf file".to_owned(),
        });
    }
    let file = File::open(path).map_err(io("open the file"))?;
    let len = file.metadata().map_err(io("open the file"))?.len();
    parse_part(
        BufReader::with_capacity(1 << 16, file),
        len,
        path,
        number,
        memory,
    )
}

fn parse_part(
    input: impl Read,
    len: u64,
    path: &Path,
    file: usize,
    memory: &mut u64,
) -> Result<Part, Error> {
    let mut source = Source {
        input,
        path,
        len,
        position: 0,
        place: Place::Header,
        memory,
    };
    source.magic_and_version()?;
    let tensor_count = source.u64()?;
    let pair_count = source.u64()?;
    let metadata = source.metadata(pair_count)?;
    let alignment = source.alignment(&metadata)?;
    let mut tensors = source.tensor_table(tensor_count, file)?;
    source.place_tensors(&mut tensors, alignment)?;
    Ok(Part { metadata, tensors })
}

/// What is being read, for messages.
enum Place {
    Header,
    PairNumber(u64),
    Pair(String),
    TensorNumber(u64),
    Tensor(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::PairNumber(number) => write!(f, "metadata key number {number}"),
            Self::Pair(key) => write!(f, "metadata key {key}"),
            Self::TensorNumber(number) => write!(f, "tensor number {number}"),
            Self::Tensor(name) => write!(f, "tensor {name}"),
        }
    }
}

/// A file on the way through its header.
struct Source<'a, R> {
    input: R,
    path: &'a Path,
    len: u64,
    position: u64,
    place: Place,
    /// What may still be allocated.
    memory: &'a mut u64,
}

impl<R: Read> Source<'_, R> {
    fn magic_and_version(&mut self) -> Result<(), Error> {
        let mut magic = [0; 4];
        let there = self.len.min(4) as usize;
        self.position = there as u64;
        self.input
            .read_exact(&mut magic[..there])
            .map_err(|e| self.io(e))?;
        if magic != MAGIC {
            return Err(self.not_gguf(foreign(&magic[..there])));
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

    fn value_type(&mut self) -> Result<ValueType, Error> {
        let start = self.position;
        let id = self.u32()?;
        ValueType::from_id(id).ok_or_else(|| {
            self.malformed(
                start,
                format!("value type {id} does not exist (0 to 12 do)"),
            )
        })
    }

    fn value(&mut self, kind: ValueType) -> Result<Value, Error> {
        self.claim(kind.min_bytes(), "the value")?;
        let input = &mut self.input;
        let value = match kind {
            ValueType::U8 => input.read_u8().map(Value::U8),
            ValueType::I8 => input.read_i8().map(Value::I8),
            ValueType::U16 => input.read_u16::<LittleEndian>().map(Value::U16),
            ValueType::I16 => input.read_i16::<LittleEndian>().map(Value::I16),
            ValueType::U32 => input.read_u32::<LittleEndian>().map(Value::U32),
            ValueType::I32 => input.read_i32::<LittleEndian>().map(Value::I32),
            ValueType::F32 => input.read_f32::<LittleEndian>().map(Value::F32),
            ValueType::U64 => input.read_u64::<LittleEndian>().map(Value::U64),
            ValueType::I64 => input.read_i64::<LittleEndian>().map(Value::I64),
            ValueType::F64 => input.read_f64::<LittleEndian>().map(Value::F64),
            ValueType::Bool => {
                let byte = input.read_u8().map_err(|e| self.io(e))?;
                return Ok(Value::Bool(self.truth(byte, self.position - 1)?));
            }
            // Their length is read, and claimed, by themselves.
            ValueType::String => {
                self.position -= kind.min_bytes();
                return Ok(Value::String(self.string(u64::MAX)?));
            }
            ValueType::Array => {
                self.position -= kind.min_bytes();
                return Ok(Value::Array(self.array(0)?));
            }
        };
        value.map_err(|e| self.io(e))
    }

    fn array(&mut self, depth: usize) -> Result<Array, Error> {
        let start = self.position;
        let kind = self.value_type()?;
        let count = self.u64()?;
        self.need(count.saturating_mul(kind.min_bytes()), || {
            format!("{}, an array of {count} elements,", self.place)
        })?;
        self.allocate(count.saturating_mul(kind.memory()))?;
        let count = count as usize;

        /// Reads numbers in bulk.
        macro_rules! numbers {
            ($variant:ident, $read:ident $(::<$order:ty>)?) => {{
                let mut items = vec![Default::default(); count];
                self.position += count as u64 * kind.min_bytes();
                self.input.$read$(::<$order>)?(&mut items).map_err(|e| self.io(e))?;
                Array::$variant(items)
            }};
        }
        Ok(match kind {
            ValueType::U8 => numbers!(U8, read_exact),
            ValueType::I8 => numbers!(I8, read_i8_into),
            ValueType::U16 => numbers!(U16, read_u16_into::<LittleEndian>),
            ValueType::I16 => numbers!(I16, read_i16_into::<LittleEndian>),
            ValueType::U32 => numbers!(U32, read_u32_into::<LittleEndian>),
            ValueType::I32 => numbers!(I32, read_i32_into::<LittleEndian>),
            ValueType::F32 => numbers!(F32, read_f32_into::<LittleEndian>),
            ValueType::U64 => numbers!(U64, read_u64_into::<LittleEndian>),
            ValueType::I64 => numbers!(I64, read_i64_into::<LittleEndian>),
            ValueType::F64 => numbers!(F64, read_f64_into::<LittleEndian>),
            ValueType::Bool => {
                let first = self.position;
                let bytes = self.bytes(count)?;
                let items = bytes
                    .iter()
                    .zip(first..)
                    .map(|(&byte, at)| self.truth(byte, at));
                Array::Bool(items.collect::<Result<_, _>>()?)
            }
            ValueType::String => {
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(self.string(u64::MAX)?);
                }
                Array::String(items)
            }
            ValueType::Array if depth + 1 >= MAX_DEPTH => {
                return Err(self.malformed(
                    start,
                    format!("arrays lie more than {MAX_DEPTH} deep in each other"),
                ));
            }
            ValueType::Array => {
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(self.array(depth + 1)?);
                }
                Array::Array(items)
            }
        })
    }

    /// A key or a tensor's name.
    fn name(&mut self) -> Result<String, Error> {
        self.string(MAX_NAME)
    }

    fn string(&mut self, max: u64) -> Result<String, Error> {
        let start = self.position;
        let len = self.u64()?;
        if len > max {
            return Err(self.malformed(
                start,
                format!("a name of {len} bytes is too long (at most {max})"),
            ));
        }
        self.need(len, || format!("{}, a string of {len} bytes,", self.place))?;
        self.allocate(len)?;
        let first = self.position;
        String::from_utf8(self.bytes(len as usize)?).map_err(|e| {
            let at = first + e.utf8_error().valid_up_to() as u64;
            self.malformed(at, "a string is not UTF-8")
        })
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

    fn u32(&mut self) -> Result<u32, Error> {
        self.claim(4, "a number")?;
        self.input
            .read_u32::<LittleEndian>()
            .map_err(|e| self.io(e))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.claim(8, "a number")?;
        self.input
            .read_u64::<LittleEndian>()
            .map_err(|e| self.io(e))
    }

    /// The next `count` bytes, which were found to be there.
    fn bytes(&mut self, count: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; count];
        self.position += count as u64;
        self.input.read_exact(&mut bytes).map_err(|e| self.io(e))?;
        Ok(bytes)
    }

    fn truth(&self, byte: u8, at: u64) -> Result<bool, Error> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.malformed(at, format!("a bool is {byte}; 0 and 1 are possible"))),
        }
    }

    /// Checks that `bytes` more bytes are there and steps over them.
    fn claim(&mut self, bytes: u64, part: &str) -> Result<(), Error> {
        self.need(bytes, || format!("{part} of the {}", self.place))?;
        self.position += bytes;
        Ok(())
    }

    /// Checks that `bytes` more bytes are there.
    fn need(&self, bytes: u64, what: impl Fn() -> String) -> Result<(), Error> {
        if bytes <= self.len - self.position {
            return Ok(());
        }
        Err(Error::Truncated {
            path: self.path.to_owned(),
            offset: self.position,
            what: what(),
            needed: bytes,
            len: self.len,
        })
    }

    /// Takes `bytes` from what may be allocated.
    fn allocate(&mut self, bytes: u64) -> Result<(), Error> {
        match self.memory.checked_sub(bytes) {
            Some(left) => {
                *self.memory = left;
                Ok(())
            }
            None => {
                let limit = MAX_MEMORY >> 20;
                Err(self.malformed(
                    self.position,
                    format!("the header would take more than {limit} MiB of memory"),
                ))
            }
        }
    }

    fn malformed(&self, offset: u64, problem: impl Into<String>) -> Error {
        Error::Malformed {
            path: self.path.to_owned(),
            offset,
            what: self.place.to_string(),
            problem: problem.into(),
        }
    }

    fn not_gguf(&self, reason: impl Into<String>) -> Error {
        Error::NotGguf {
            path: PathBuf::from(self.path),
            reason: reason.into(),
        }
    }

    fn io(&self, cause: io::Error) -> Error {
        Error::Io {
            path: self.path.to_owned(),
            action: "read the header",
            cause,
        }
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
