//! The writer: version 3, alignment 32, streaming.
//!
//! Sizes are known beforehand, so the whole header is made first ([`Layout`]) and the
//! tensors follow one after the other ([`Writer`]), each padded to the alignment.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use byteorder::{LittleEndian, WriteBytesExt};

use super::{
    Array, DEFAULT_ALIGNMENT, Error, KEY_ALIGNMENT, MAGIC, MAX_DIMS, Metadata, Value, tensor_bytes,
};
use crate::quant::BlockType;

const VERSION: u32 = 3;
/// Longest tensor name that ggml takes (its buffer of 64 bytes ends in a zero).
const MAX_TENSOR_NAME: usize = 63;
/// Longest key by the specification.
const MAX_KEY: usize = 65535;

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDecl {
    /// Name, at most 63 bytes.
    pub name: String,
    /// Type of its rows.
    pub kind: BlockType,
    /// Extents, fastest first: `[columns, rows, experts]`. 1 to 4 of them, none zero.
    pub shape: Vec<usize>,
}

impl TensorDecl {
    /// Bytes it takes; `None` if its blocks do not fill a row or the product overflows.
    pub fn bytes(&self) -> Option<u64> {
        tensor_bytes(self.kind, &self.shape)
    }
}

/// A file's bytes, laid out before they are written: the header and every tensor's place.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The header, padded to the alignment.
    header: Vec<u8>,
    tensors: Vec<Place>,
    len: u64,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Place {
    name: String,
    /// From the start of the file.
    offset: u64,
    bytes: u64,
}

impl Layout {
    /// Lays out a file of these pairs and tensors, in the given order.
    ///
    /// # Errors
    /// If a name or key stands twice or is too long, a shape is not possible, blocks do not
    /// fill a row, or the metadata describes another arrangement of the file (see
    /// [`Metadata::remove_arrangement`]).
    pub fn new(metadata: &Metadata, tensors: &[TensorDecl]) -> Result<Self, Error> {
        check_metadata(metadata)?;
        let mut places = Vec::with_capacity(tensors.len());
        let mut names = HashSet::new();
        let mut data = 0_u64;
        for tensor in tensors {
            if !names.insert(&tensor.name) {
                return Err(wrong(tensor, "stands twice"));
            }
            let bytes = check_tensor(tensor)?;
            let next = data
                .checked_add(bytes)
                .and_then(|end| end.checked_next_multiple_of(DEFAULT_ALIGNMENT));
            places.push(Place {
                name: tensor.name.clone(),
                offset: data,
                bytes,
            });
            data = next.ok_or_else(|| wrong(tensor, "the file's length overflows"))?;
        }

        let mut header = Vec::new();
        encode_header(&mut header, metadata, tensors, &places).expect("a vector takes every byte");
        header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        for place in &mut places {
            place.offset += header.len() as u64;
        }
        let len = header.len() as u64 + data;
        Ok(Self {
            header,
            tensors: places,
            len,
        })
    }

    /// Length of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.len
    }

    /// Number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// Bytes of the tensor at `index`, without padding.
    pub fn tensor_bytes(&self, index: usize) -> u64 {
        self.tensors[index].bytes
    }

    /// Place of the tensor at `index` from the start of the file; one beyond the last tensor
    /// gives the file's end.
    pub fn tensor_offset(&self, index: usize) -> u64 {
        self.tensors
            .get(index)
            .map_or(self.len, |tensor| tensor.offset)
    }
}

fn check_metadata(metadata: &Metadata) -> Result<(), Error> {
    if let Some(alignment) = metadata.u64(KEY_ALIGNMENT)?
        && alignment != DEFAULT_ALIGNMENT
    {
        let problem = format!("is {alignment}, but files are written with {DEFAULT_ALIGNMENT}");
        return Err(metadata.error(KEY_ALIGNMENT, problem));
    }
    if metadata.u64("split.count")?.is_some_and(|count| count > 1) {
        return Err(metadata.error("split.count", "files are written in one piece"));
    }
    match metadata
        .iter()
        .find(|(key, _)| key.len() > MAX_KEY || key.is_empty())
    {
        Some((key, _)) => Err(metadata.error(key, format!("keys have 1 to {MAX_KEY} bytes"))),
        None => Ok(()),
    }
}

/// Checks name and shape; returns the tensor's bytes.
fn check_tensor(tensor: &TensorDecl) -> Result<u64, Error> {
    if tensor.name.is_empty() || tensor.name.len() > MAX_TENSOR_NAME {
        return Err(wrong(
            tensor,
            &format!("names have 1 to {MAX_TENSOR_NAME} bytes"),
        ));
    }
    let shape = &tensor.shape;
    if !(1..=MAX_DIMS).contains(&shape.len()) || shape.contains(&0) {
        let problem =
            format!("shape {shape:?} is not possible: 1 to {MAX_DIMS} extents, none of them zero");
        return Err(wrong(tensor, &problem));
    }
    tensor.bytes().ok_or_else(|| {
        let problem = format!(
            "shape {shape:?} does not fit {} blocks of {}",
            tensor.kind,
            tensor.kind.block_len()
        );
        wrong(tensor, &problem)
    })
}

fn wrong(tensor: &TensorDecl, problem: &str) -> Error {
    Error::Write {
        path: PathBuf::new(),
        what: format!("tensor {}", tensor.name),
        problem: problem.to_owned(),
    }
}

fn encode_header(
    out: &mut Vec<u8>,
    metadata: &Metadata,
    tensors: &[TensorDecl],
    places: &[Place],
) -> io::Result<()> {
    out.extend(MAGIC);
    out.write_u32::<LittleEndian>(VERSION)?;
    out.write_u64::<LittleEndian>(tensors.len() as u64)?;
    out.write_u64::<LittleEndian>(metadata.len() as u64)?;
    for (key, value) in metadata.iter() {
        encode_string(out, key)?;
        out.write_u32::<LittleEndian>(value.value_type() as u32)?;
        encode_value(out, value)?;
    }
    for (tensor, place) in tensors.iter().zip(places) {
        encode_string(out, &tensor.name)?;
        out.write_u32::<LittleEndian>(tensor.shape.len() as u32)?;
        for &extent in &tensor.shape {
            out.write_u64::<LittleEndian>(extent as u64)?;
        }
        out.write_u32::<LittleEndian>(tensor.kind.id())?;
        out.write_u64::<LittleEndian>(place.offset)?;
    }
    Ok(())
}

fn encode_string(out: &mut Vec<u8>, text: &str) -> io::Result<()> {
    out.write_u64::<LittleEndian>(text.len() as u64)?;
    out.write_all(text.as_bytes())
}

fn encode_value(out: &mut Vec<u8>, value: &Value) -> io::Result<()> {
    match value {
        Value::U8(x) => out.write_u8(*x),
        Value::I8(x) => out.write_i8(*x),
        Value::U16(x) => out.write_u16::<LittleEndian>(*x),
        Value::I16(x) => out.write_i16::<LittleEndian>(*x),
        Value::U32(x) => out.write_u32::<LittleEndian>(*x),
        Value::I32(x) => out.write_i32::<LittleEndian>(*x),
        Value::F32(x) => out.write_f32::<LittleEndian>(*x),
        Value::Bool(x) => out.write_u8((*x).into()),
        Value::String(x) => encode_string(out, x),
        Value::Array(x) => encode_array(out, x),
        Value::U64(x) => out.write_u64::<LittleEndian>(*x),
        Value::I64(x) => out.write_i64::<LittleEndian>(*x),
        Value::F64(x) => out.write_f64::<LittleEndian>(*x),
    }
}

fn encode_array(out: &mut Vec<u8>, array: &Array) -> io::Result<()> {
    out.write_u32::<LittleEndian>(array.item_type() as u32)?;
    out.write_u64::<LittleEndian>(array.len() as u64)?;
    match array {
        Array::U8(items) => out.write_all(items),
        Array::I8(items) => items.iter().try_for_each(|&x| out.write_i8(x)),
        Array::U16(items) => items
            .iter()
            .try_for_each(|&x| out.write_u16::<LittleEndian>(x)),
        Array::I16(items) => items
            .iter()
            .try_for_each(|&x| out.write_i16::<LittleEndian>(x)),
        Array::U32(items) => items
            .iter()
            .try_for_each(|&x| out.write_u32::<LittleEndian>(x)),
        Array::I32(items) => items
            .iter()
            .try_for_each(|&x| out.write_i32::<LittleEndian>(x)),
        Array::F32(items) => items
            .iter()
            .try_for_each(|&x| out.write_f32::<LittleEndian>(x)),
        Array::Bool(items) => items.iter().try_for_each(|&x| out.write_u8(x.into())),
        Array::String(items) => items.iter().try_for_each(|x| encode_string(out, x)),
        Array::Array(items) => items.iter().try_for_each(|x| encode_array(out, x)),
        Array::U64(items) => items
            .iter()
            .try_for_each(|&x| out.write_u64::<LittleEndian>(x)),
        Array::I64(items) => items
            .iter()
            .try_for_each(|&x| out.write_i64::<LittleEndian>(x)),
        Array::F64(items) => items
            .iter()
            .try_for_each(|&x| out.write_f64::<LittleEndian>(x)),
    }
}

/// Writes a file as a [`Layout`] announces it, tensor by tensor.
///
/// Renaming the file when it is whole is the caller's part.
pub struct Writer {
    file: BufWriter<File>,
    path: PathBuf,
    layout: Layout,
    /// Tensors that are written whole.
    done: usize,
    /// Bytes of the next one that are written.
    written: u64,
}

impl Writer {
    /// Creates the file (an existing one is overwritten) and writes its header.
    pub fn create(path: &Path, layout: Layout) -> Result<Self, Error> {
        let file = File::create(path).map_err(|cause| failed(path, "create the file", cause))?;
        let mut writer = Self::over(file, path, layout);
        writer
            .file
            .write_all(&writer.layout.header)
            .map_err(|cause| failed(path, "write the header", cause))?;
        Ok(writer)
    }

    /// Opens a file that was cut off, checks that it begins with this layout's header and
    /// goes on after its first `done` tensors. What follows them is cut away.
    pub fn resume(path: &Path, layout: Layout, done: usize) -> Result<Self, Error> {
        let differs = |problem: &str| Error::Write {
            path: path.to_owned(),
            what: "the rest of the file".to_owned(),
            problem: format!("{problem}; start anew"),
        };
        if done > layout.tensor_count() {
            return Err(differs(
                "more tensors are said to be written than there are",
            ));
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|cause| failed(path, "open the file", cause))?;
        let len = file
            .metadata()
            .map_err(|cause| failed(path, "open the file", cause))?
            .len();
        let end = layout.tensor_offset(done);
        if len < end {
            return Err(differs(&format!(
                "it is {len} bytes long, its first {done} tensors take {end}"
            )));
        }
        let mut header = vec![0; layout.header.len()];
        file.read_exact(&mut header)
            .map_err(|cause| failed(path, "read the header", cause))?;
        if header != layout.header {
            return Err(differs("its header is not the one that is to be written"));
        }
        file.set_len(end)
            .and_then(|()| file.seek(SeekFrom::Start(end)))
            .map_err(|cause| failed(path, "continue the file", cause))?;
        let mut writer = Self::over(file, path, layout);
        writer.done = done;
        Ok(writer)
    }

    fn over(file: File, path: &Path, layout: Layout) -> Self {
        Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_owned(),
            layout,
            done: 0,
            written: 0,
        }
    }

    /// Appends to the tensor that is being written; when it is whole, padding follows and
    /// the next one begins.
    ///
    /// # Errors
    /// If the bytes go beyond the tensor's end, or the system cannot write them.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let Some(tensor) = self.layout.tensors.get(self.done) else {
            return Err(self.wrong(
                "the file",
                format!("{} bytes follow the last tensor", bytes.len()),
            ));
        };
        let left = tensor.bytes - self.written;
        if bytes.len() as u64 > left {
            let what = format!("tensor {}", tensor.name);
            return Err(self.wrong(
                &what,
                format!("{} bytes are given, {left} are left", bytes.len()),
            ));
        }
        self.append(bytes)?;
        self.written += bytes.len() as u64;
        if bytes.len() as u64 == left {
            let end = tensor_end(&self.layout, self.done);
            let padding = self.layout.tensor_offset(self.done + 1) - end;
            self.append(&[0; DEFAULT_ALIGNMENT as usize][..padding as usize])?;
            self.done += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Tensors that are written whole.
    pub fn tensors_done(&self) -> usize {
        self.done
    }

    /// Brings everything written so far to the disk, so that [`tensors_done`](Self::tensors_done)
    /// may be noted for [`resume`](Self::resume).
    pub fn sync(&mut self) -> Result<(), Error> {
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all())
            .map_err(|cause| failed(&self.path, "write to disk", cause))
    }

    /// Checks that every tensor was written and brings the file to the disk.
    pub fn finish(mut self) -> Result<(), Error> {
        if let Some(tensor) = self.layout.tensors.get(self.done) {
            let what = format!("tensor {}", tensor.name);
            return Err(self.wrong(
                &what,
                format!("{} of {} bytes were given", self.written, tensor.bytes),
            ));
        }
        self.sync()?;
        let about = self.file.get_ref().metadata();
        let len = about
            .map_err(|cause| failed(&self.path, "check the file", cause))?
            .len();
        if len != self.layout.len {
            return Err(self.wrong(
                "the file",
                format!("it is {len} bytes long, not {}", self.layout.len),
            ));
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all(bytes)
            .map_err(|cause| failed(&self.path, "write a tensor", cause))
    }

    fn wrong(&self, what: &str, problem: String) -> Error {
        Error::Write {
            path: self.path.clone(),
            what: what.to_owned(),
            problem,
        }
    }
}

fn tensor_end(layout: &Layout, index: usize) -> u64 {
    layout.tensors[index].offset + layout.tensors[index].bytes
}

fn failed(path: &Path, action: &'static str, cause: io::Error) -> Error {
    Error::Io {
        path: path.to_owned(),
        action,
        cause,
    }
}

/// A file beside `path`: its name with `suffix` behind it.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Writes a small file whole: beside its target under a name of its own, then renamed.
pub fn write_whole(
    path: &Path,
    metadata: &Metadata,
    tensors: &[(TensorDecl, &[u8])],
) -> Result<(), Error> {
    let decls: Vec<TensorDecl> = tensors.iter().map(|(decl, _)| decl.clone()).collect();
    let layout = Layout::new(metadata, &decls)?;
    let partial = with_suffix(path, ".partial");
    let written = Writer::create(&partial, layout).and_then(|mut writer| {
        for (index, (_, bytes)) in tensors.iter().enumerate() {
            writer.write(bytes)?;
            if writer.tensors_done() != index + 1 {
                break; // too few bytes: `finish` names the tensor
            }
        }
        writer.finish()?;
        fs::rename(&partial, path).map_err(|cause| failed(path, "rename the finished file", cause))
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&partial);
    }
    written
}
