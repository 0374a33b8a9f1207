//! Metadata values: thirteen types, one of them the array.

use std::fmt;

/// A metadata value.
#[allow(missing_docs)] // the format's own types
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array: typed, so that a vocabulary's scores are one `Vec<f32>`.
#[allow(missing_docs)] // the format's own types
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// The type of a value, or of an array's elements, under the format's ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type with this id.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    /// The least number of bytes that a value takes in a file: an empty string is its
    /// length, an empty array its element type and length.
    pub fn min_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }

    /// Bytes that an element takes in memory, without what it points to.
    pub fn memory(self) -> u64 {
        let bytes = match self {
            Self::String => size_of::<String>(),
            Self::Array => size_of::<Array>(),
            number => return number.min_bytes(),
        };
        bytes as u64
    }

    fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }
}

/// Evaluates `$body` with `$items` bound to the array's vector, whatever its type.
macro_rules! with_items {
    ($array:expr, $items:ident => $body:expr) => {
        match $array {
            Array::U8($items) => $body,
            Array::I8($items) => $body,
            Array::U16($items) => $body,
            Array::I16($items) => $body,
            Array::U32($items) => $body,
            Array::I32($items) => $body,
            Array::F32($items) => $body,
            Array::Bool($items) => $body,
            Array::String($items) => $body,
            Array::Array($items) => $body,
            Array::U64($items) => $body,
            Array::I64($items) => $body,
            Array::F64($items) => $body,
        }
    };
}

impl Value {
    pub(super) fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The type in words, for messages: `u32`, `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            Self::Array(array) => format!("array of {}", array.type_name()),
            scalar => scalar.value_type().name().to_owned(),
        }
    }

    /// The value of any integer type.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(x) => x.into(),
            Self::I8(x) => x.into(),
            Self::U16(x) => x.into(),
            Self::I16(x) => x.into(),
            Self::U32(x) => x.into(),
            Self::I32(x) => x.into(),
            Self::U64(x) => x.into(),
            Self::I64(x) => x.into(),
            _ => return None,
        })
    }

    /// The value as JSON. Arrays of more than `max_items` elements become
    /// `{"type", "len", "first"}`; numbers that JSON does not have become `null`.
    pub fn to_json(&self, max_items: usize) -> serde_json::Value {
        match self {
            Self::U8(x) => (*x).into(),
            Self::I8(x) => (*x).into(),
            Self::U16(x) => (*x).into(),
            Self::I16(x) => (*x).into(),
            Self::U32(x) => (*x).into(),
            Self::I32(x) => (*x).into(),
            Self::F32(x) => json_f32(*x),
            Self::Bool(x) => (*x).into(),
            Self::String(x) => x.as_str().into(),
            Self::Array(x) => x.to_json(max_items),
            Self::U64(x) => (*x).into(),
            Self::I64(x) => (*x).into(),
            Self::F64(x) => (*x).into(),
        }
    }
}

impl Array {
    pub(super) fn item_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The type of the elements in words, for messages.
    pub fn type_name(&self) -> &'static str {
        self.item_type().name()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        with_items!(self, items => items.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of an array of any integer type; `None` for other types and where one
    /// does not fit.
    pub fn integers<T: TryFrom<i128>>(&self) -> Option<Vec<T>> {
        fn fit<T: TryFrom<i128>, X: Copy + Into<i128>>(items: &[X]) -> Option<Vec<T>> {
            items.iter().map(|&x| T::try_from(x.into()).ok()).collect()
        }
        match self {
            Self::U8(items) => fit(items),
            Self::I8(items) => fit(items),
            Self::U16(items) => fit(items),
            Self::I16(items) => fit(items),
            Self::U32(items) => fit(items),
            Self::I32(items) => fit(items),
            Self::U64(items) => fit(items),
            Self::I64(items) => fit(items),
            _ => None,
        }
    }

    /// The element at `index` as a value.
    fn item(&self, index: usize) -> Value {
        with_items!(self, items => Value::from(items[index].to_owned()))
    }

    fn to_json(&self, max_items: usize) -> serde_json::Value {
        let first = |count: usize| -> serde_json::Value {
            (0..count)
                .map(|i| self.item(i).to_json(max_items))
                .collect()
        };
        if self.len() <= max_items {
            return first(self.len());
        }
        serde_json::json!({
            "type": self.type_name(),
            "len": self.len(),
            "first": first(max_items.min(SHOWN_ITEMS)),
        })
    }
}

/// The shortest decimal that gives `x` back, so that 1e-5 is not shown as 9.999999747378752e-6.
fn json_f32(x: f32) -> serde_json::Value {
    x.to_string()
        .parse::<f64>()
        .ok()
        .filter(|x| x.is_finite())
        .into()
}

/// Elements of a long array that are shown.
const SHOWN_ITEMS: usize = 4;
/// Characters of a long string that are shown.
const SHOWN_CHARS: usize = 72;

/// On one line: arrays and strings are abbreviated.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U8(x) => x.fmt(f),
            Self::I8(x) => x.fmt(f),
            Self::U16(x) => x.fmt(f),
            Self::I16(x) => x.fmt(f),
            Self::U32(x) => x.fmt(f),
            Self::I32(x) => x.fmt(f),
            Self::F32(x) => fmt::Debug::fmt(x, f),
            Self::Bool(x) => x.fmt(f),
            Self::String(x) => match x.char_indices().nth(SHOWN_CHARS) {
                Some((end, _)) => write!(f, "{:?}… ({} bytes)", &x[..end], x.len()),
                None => fmt::Debug::fmt(x, f),
            },
            Self::Array(x) => x.fmt(f),
            Self::U64(x) => x.fmt(f),
            Self::I64(x) => x.fmt(f),
            Self::F64(x) => fmt::Debug::fmt(x, f),
        }
    }
}

impl fmt::Display for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for index in 0..self.len().min(SHOWN_ITEMS) {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{}", self.item(index))?;
        }
        if self.len() > SHOWN_ITEMS {
            return write!(f, ", …] ({} × {})", self.len(), self.type_name());
        }
        f.write_str("]")
    }
}

macro_rules! from {
    ($($rust:ty => $variant:ident),*) => {$(
        impl From<$rust> for Value {
            fn from(value: $rust) -> Self {
                Self::$variant(value)
            }
        }
        impl From<Vec<$rust>> for Array {
            fn from(items: Vec<$rust>) -> Self {
                Self::$variant(items)
            }
        }
        impl From<Vec<$rust>> for Value {
            fn from(items: Vec<$rust>) -> Self {
                Self::Array(items.into())
            }
        }
    )*};
}
from!(
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, bool => Bool,
    String => String, Array => Array, u64 => U64, i64 => I64, f64 => F64
);

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}

impl From<&[&str]> for Value {
    fn from(items: &[&str]) -> Self {
        let items: Vec<String> = items.iter().map(|&item| item.to_owned()).collect();
        items.into()
    }
}
