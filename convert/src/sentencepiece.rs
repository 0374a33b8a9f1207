//! Reads SentencePiece's `tokenizer.model`.
//!
//! The file is one protocol-buffer message, `ModelProto` of SentencePiece's `sentencepiece_model.proto`:
//!
//! | field | what |
//! |---|---|
//! | 1, repeated | piece: 1 text, 2 score (fixed32), 3 type (varint, 1 if absent) |
//! | 2 | trainer: 3 model type (2 is BPE), 35 byte fallback, 40 to 43 ids of unk, bos, eos, pad |
//! | 3 | normalizer: 2 character map, 3 leading space, 4 extra white space removed, 5 spaces as `▁` |
//!
//! Wire format: <https://protobuf.dev/programming-guides/encoding/>.

use std::path::Path;

use fewbit::tokenizer::TokenKind;

use crate::error::{Error, Result};
use crate::vocab::{MAX_BYTES, MAX_TOKENS};

/// A piece of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Its text, with `▁` for spaces.
    pub text: String,
    /// Pieces of higher score are merged first.
    pub score: f32,
    /// What it is for.
    pub kind: TokenKind,
}

/// What a `tokenizer.model` says.
#[derive(Clone, Debug, PartialEq)]
pub struct SpmModel {
    /// In the order of their ids.
    pub pieces: Vec<Piece>,
    /// Id of the unknown token.
    pub unk: Option<u32>,
    /// Id of the token that begins a text.
    pub bos: Option<u32>,
    /// Id of the token that ends a text.
    pub eos: Option<u32>,
    /// Id of the token that fills up.
    pub pad: Option<u32>,
    /// Whether a text gets a space in front.
    pub add_dummy_prefix: bool,
}

/// Reads and checks `path`: BPE, without a normalization that GGUF cannot express.
pub fn read(path: &Path) -> Result<SpmModel> {
    let bytes = crate::vocab::read_bounded(path, MAX_BYTES)?;
    parse(path, &bytes)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<SpmModel> {
    let mut model = SpmModel {
        pieces: Vec::new(),
        unk: Some(0),
        bos: Some(1),
        eos: Some(2),
        pad: None,
        add_dummy_prefix: true,
    };
    // Absent fields have these values.
    let (mut model_type, mut extra_spaces_removed, mut spaces_escaped, mut normalizes) =
        (1, true, true, false);

    let mut fields = Message::new(path, bytes, 0);
    while let Some((number, field)) = fields.next()? {
        match number {
            1 if model.pieces.len() == MAX_TOKENS => {
                return Err(Error::input(
                    path,
                    format!("has more than {MAX_TOKENS} pieces; vocabularies are smaller"),
                ));
            }
            1 => model.pieces.push(piece(field.message(path)?)?),
            2 => {
                let mut trainer = field.message(path)?;
                while let Some((number, field)) = trainer.next()? {
                    match number {
                        3 => model_type = field.varint(path)?,
                        40 => model.unk = field.id(path)?,
                        41 => model.bos = field.id(path)?,
                        42 => model.eos = field.id(path)?,
                        43 => model.pad = field.id(path)?,
                        _ => {}
                    }
                }
            }
            3 => {
                let mut normalizer = field.message(path)?;
                while let Some((number, field)) = normalizer.next()? {
                    match number {
                        2 => normalizes = !field.bytes(path)?.is_empty(),
                        3 => model.add_dummy_prefix = field.varint(path)? != 0,
                        4 => extra_spaces_removed = field.varint(path)? != 0,
                        5 => spaces_escaped = field.varint(path)? != 0,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if model.pieces.is_empty() {
        return Err(Error::input(path, "holds no pieces"));
    }
    if model_type != 2 {
        return Err(Error::input(
            path,
            "is not a BPE model; GGUF's \"llama\" tokenizer, and the Mixtral family, are BPE",
        ));
    }
    if normalizes || extra_spaces_removed || !spaces_escaped {
        return Err(Error::input(
            path,
            "normalizes texts (character map, white space), which GGUF's \"llama\" tokenizer cannot: ids would differ from those in training",
        ));
    }
    let count = model.pieces.len();
    for (name, id) in [
        ("unk", &mut model.unk),
        ("bos", &mut model.bos),
        ("eos", &mut model.eos),
        ("pad", &mut model.pad),
    ] {
        if let Some(outside) = id.filter(|&id| id as usize >= count) {
            return Err(Error::input(
                path,
                format!("gives {name} the id {outside}, but has {count} pieces"),
            ));
        }
    }
    Ok(model)
}

/// The file that says what `model` does; [`read`] gives it back.
pub fn encode(model: &SpmModel) -> Vec<u8> {
    let mut file = Vec::new();
    for piece in &model.pieces {
        let mut fields = Vec::new();
        put_bytes(&mut fields, 1, piece.text.as_bytes());
        put_varint(&mut fields, 2 << 3 | 5);
        fields.extend_from_slice(&piece.score.to_le_bytes());
        if piece.kind != TokenKind::Normal {
            put_number(&mut fields, 3, piece.kind as u64);
        }
        put_bytes(&mut file, 1, &fields);
    }
    let mut trainer = Vec::new();
    put_number(&mut trainer, 3, 2);
    put_number(&mut trainer, 4, model.pieces.len() as u64);
    let bytes = model
        .pieces
        .iter()
        .any(|piece| piece.kind == TokenKind::Byte);
    put_number(&mut trainer, 35, bytes.into());
    for (field, id) in [
        (40, model.unk),
        (41, model.bos),
        (42, model.eos),
        (43, model.pad),
    ] {
        // "None" is -1.
        put_number(&mut trainer, field, id.map_or(u64::MAX, u64::from));
    }
    put_bytes(&mut file, 2, &trainer);
    let mut normalizer = Vec::new();
    put_bytes(&mut normalizer, 1, b"identity");
    put_number(&mut normalizer, 3, model.add_dummy_prefix.into());
    put_number(&mut normalizer, 4, 0);
    put_number(&mut normalizer, 5, 1);
    put_bytes(&mut file, 3, &normalizer);
    file
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_number(out: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(out, field << 3);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn piece(mut fields: Message) -> Result<Piece> {
    let path = fields.path;
    let mut piece = Piece {
        text: String::new(),
        score: 0.0,
        kind: TokenKind::Normal,
    };
    while let Some((number, field)) = fields.next()? {
        match number {
            1 => {
                let text = std::str::from_utf8(field.bytes(path)?);
                piece.text = text
                    .map_err(|_| field.wrong(path, "a piece is no UTF-8"))?
                    .to_owned();
            }
            2 => piece.score = f32::from_bits(field.fixed32(path)?),
            3 => {
                piece.kind = i32::try_from(field.varint(path)?)
                    .ok()
                    .filter(|&number| number != 0)
                    .and_then(TokenKind::from_number)
                    .ok_or_else(|| field.wrong(path, "a piece has a type other than 1 to 6"))?;
            }
            _ => {}
        }
    }
    Ok(piece)
}

fn damaged(path: &Path, offset: usize, problem: &str) -> Error {
    Error::input(
        path,
        format!("at byte {offset}: {problem}; download it again"),
    )
}

/// A message's fields in order; `start` is its offset in the file.
struct Message<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    start: usize,
}

/// A field's value as the wire has it, and where it lies in the file.
struct Field<'a> {
    wire: Wire<'a>,
    offset: usize,
}

enum Wire<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Message<'a> {
    fn new(path: &'a Path, bytes: &'a [u8], start: usize) -> Self {
        Message {
            path,
            bytes,
            at: 0,
            start,
        }
    }

    fn wrong(&self, problem: &str) -> Error {
        damaged(self.path, self.start + self.at, problem)
    }

    /// The next field's number and value.
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let offset = self.start + self.at;
        let wire = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Wire::Fixed64
            }
            2 => {
                let len = usize::try_from(self.varint()?)
                    .map_err(|_| self.wrong("a length is too large"))?;
                let offset = self.start + self.at;
                let bytes = self.take(len)?;
                return Ok(Some((
                    tag >> 3,
                    Field {
                        wire: Wire::Bytes(bytes),
                        offset,
                    },
                )));
            }
            5 => {
                let bytes = self.take(4)?;
                Wire::Fixed32(u32::from_le_bytes(
                    bytes.try_into().expect("4 bytes were taken"),
                ))
            }
            _ => {
                return Err(
                    self.wrong("a field has an unknown wire type; this is no SentencePiece model")
                );
            }
        };
        Ok(Some((tag >> 3, Field { wire, offset })))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        if len > rest.len() {
            return Err(self.wrong(&format!(
                "a field of {len} bytes, but only {} are left",
                rest.len()
            )));
        }
        self.at += len;
        Ok(&rest[..len])
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let byte = self.take(1)?[0];
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.wrong("a number has more than 64 bits"))
    }
}

impl<'a> Field<'a> {
    fn wrong(&self, path: &Path, problem: &str) -> Error {
        damaged(path, self.offset, problem)
    }

    fn varint(&self, path: &Path) -> Result<u64> {
        match self.wire {
            Wire::Varint(value) => Ok(value),
            _ => Err(self.wrong(path, "expected a varint")),
        }
    }

    fn fixed32(&self, path: &Path) -> Result<u32> {
        match self.wire {
            Wire::Fixed32(value) => Ok(value),
            _ => Err(self.wrong(path, "expected a 32-bit value")),
        }
    }

    fn bytes(&self, path: &Path) -> Result<&'a [u8]> {
        match self.wire {
            Wire::Bytes(bytes) => Ok(bytes),
            _ => Err(self.wrong(path, "expected a length and bytes")),
        }
    }

    fn message(&self, path: &'a Path) -> Result<Message<'a>> {
        Ok(Message::new(path, self.bytes(path)?, self.offset))
    }

    /// An id: an int32 of which a negative one (10 bytes long) means "none".
    fn id(&self, path: &Path) -> Result<Option<u32>> {
        let id = self.varint(path)? as i64;
        if id < 0 {
            return Ok(None);
        }
        u32::try_from(id)
            .map(Some)
            .map_err(|_| self.wrong(path, "an id has more than 32 bits"))
    }
}
