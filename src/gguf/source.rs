//! A file on the way through its header. Nothing that the file says is believed before it is
//! compared with the bytes that remain, and nothing is allocated before that.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use byteorder::{LittleEndian, ReadBytesExt};

use super::value::ValueType;
use super::{Array, Error, Value};

/// Memory that the headers of one model may take. The largest vocabularies need a tenth.
pub(super) const MAX_MEMORY: u64 = 512 << 20;
/// Arrays may lie in arrays this deep.
const MAX_DEPTH: usize = 4;
/// Longest key and tensor name.
const MAX_NAME: u64 = 65535;

/// What is being read, for messages.
pub(super) enum Place {
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
pub(super) struct Source<'a, R> {
    input: R,
    pub path: &'a Path,
    /// Bytes of the whole file.
    pub len: u64,
    /// Bytes that were read; at most `len`.
    pub position: u64,
    pub place: Place,
    /// What may still be allocated.
    memory: &'a mut u64,
}

impl<'a, R: Read> Source<'a, R> {
    /// A file of `len` bytes; headers may still take `memory`.
    pub fn new(input: R, len: u64, path: &'a Path, memory: &'a mut u64) -> Self {
        Self {
            input,
            path,
            len,
            position: 0,
            place: Place::Header,
            memory,
        }
    }

    /// The type of a pair's value or of an array's elements.
    pub fn value_type(&mut self) -> Result<ValueType, Error> {
        let start = self.position;
        let id = self.u32()?;
        ValueType::from_id(id).ok_or_else(|| {
            self.malformed(
                start,
                format!("value type {id} does not exist (0 to 12 do)"),
            )
        })
    }

    /// A pair's value.
    pub fn value(&mut self, kind: ValueType) -> Result<Value, Error> {
        match kind {
            ValueType::String => return Ok(Value::String(self.string(u64::MAX)?)),
            ValueType::Array => return Ok(Value::Array(self.array(0)?)),
            _ => self.claim(kind.min_bytes(), "the value")?,
        }
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
            ValueType::String | ValueType::Array => unreachable!("returned above"),
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
    pub fn name(&mut self) -> Result<String, Error> {
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

    /// The first bytes, by which files are told apart: up to four.
    pub fn magic(&mut self) -> Result<Vec<u8>, Error> {
        self.bytes(self.len.min(4) as usize)
    }

    pub fn u32(&mut self) -> Result<u32, Error> {
        self.claim(4, "a number")?;
        self.input
            .read_u32::<LittleEndian>()
            .map_err(|e| self.io(e))
    }

    pub fn u64(&mut self) -> Result<u64, Error> {
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
    pub fn need(&self, bytes: u64, what: impl Fn() -> String) -> Result<(), Error> {
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

    /// Takes `bytes` from what headers may allocate.
    pub fn allocate(&mut self, bytes: u64) -> Result<(), Error> {
        match self.memory.checked_sub(bytes) {
            Some(left) => {
                *self.memory = left;
                Ok(())
            }
            None => Err(self.malformed(
                self.position,
                format!(
                    "the header takes too much memory: {bytes} bytes more, {} are left to it",
                    self.memory
                ),
            )),
        }
    }

    /// An error about the present place; `offset` tells where in it.
    pub fn malformed(&self, offset: u64, problem: impl Into<String>) -> Error {
        Error::Malformed {
            path: self.path.to_owned(),
            offset,
            what: self.place.to_string(),
            problem: problem.into(),
        }
    }

    pub fn not_gguf(&self, reason: impl Into<String>) -> Error {
        Error::NotGguf {
            path: self.path.to_owned(),
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
