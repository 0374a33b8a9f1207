//! Key-value pairs, with getters that name file and key when a value does not fit.

use std::path::{Path, PathBuf};

use indexmap::IndexMap;

use super::{Array, Error, Value};

/// Key-value pairs in the order of the file.
///
/// The typed getters return `None` for an absent key and an error that names file and key
/// for a value of another type; the `require_` forms make absence an error as well. Any
/// integer type is accepted where the value fits.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    file: PathBuf,
    entries: IndexMap<String, Value>,
}

/// Two are equal if they hold the same pairs in the same order, wherever they came from.
impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

/// Defines a typed getter and its `require_` form.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $require:ident: $type:ty, $wanted:literal, $fit:expr;)*) => {$(
        $(#[$doc])*
        pub fn $name(&self, key: &str) -> Result<Option<$type>, Error> {
            let Some(value) = self.get(key) else {
                return Ok(None);
            };
            let fit: fn(&Value) -> Option<$type> = $fit;
            match fit(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.mismatch(key, $wanted, value)),
            }
        }

        #[doc = concat!("As [`", stringify!($name), "`](Self::", stringify!($name), "); absence is an error.")]
        pub fn $require(&self, key: &str) -> Result<$type, Error> {
            self.$name(key)?.ok_or_else(|| self.error(key, "is missing"))
        }
    )*};
}

impl Metadata {
    /// No pairs, no file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pairs that were read from `file`.
    pub(super) fn of_file(file: &Path, entries: IndexMap<String, Value>) -> Self {
        Self {
            file: file.to_owned(),
            entries,
        }
    }

    /// The file that the pairs were read from; empty if they were built in memory.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The pairs in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// Whether `key` is there.
    pub fn contains(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Sets `key`: in its place if it is there already, else at the end.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.entries.insert(key.into(), value.into());
    }

    /// Takes `key` out; the order of the others stays.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.entries.shift_remove(key)
    }

    /// Takes out what describes the arrangement of a file and not the model: alignment and
    /// splits. Needed before metadata that was read can head a file that is written.
    pub fn remove_arrangement(&mut self) {
        self.entries
            .retain(|key, _| key != super::KEY_ALIGNMENT && !key.starts_with("split."));
    }

    /// An error about `key` that names the file, for checks that the getters do not make.
    pub fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Key {
            path: self.file.clone(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    fn mismatch(&self, key: &str, wanted: &str, value: &Value) -> Error {
        let found = value.type_name();
        self.error(key, format!("needs {wanted}, but is {value} ({found})"))
    }

    getters! {
        /// An integer from 0 to 2³² − 1.
        u32, require_u32: u32, "an integer from 0 to 4294967295",
            |value| value.as_integer().and_then(|x| x.try_into().ok());
        /// An integer from 0 to 2⁶⁴ − 1.
        u64, require_u64: u64, "an integer that is not negative",
            |value| value.as_integer().and_then(|x| x.try_into().ok());
        /// A size or count.
        usize, require_usize: usize, "an integer that is not negative",
            |value| value.as_integer().and_then(|x| x.try_into().ok());
        /// A floating-point number; f64 is rounded.
        f32, require_f32: f32, "a floating-point number",
            |value| match *value {
                Value::F32(x) => Some(x),
                Value::F64(x) => Some(x as f32),
                _ => None,
            };
        /// A truth value.
        bool, require_bool: bool, "a bool",
            |value| match *value {
                Value::Bool(x) => Some(x),
                _ => None,
            };
        /// A string.
        str, require_str: &str, "a string",
            |value| match value {
                Value::String(x) => Some(x),
                _ => None,
            };
        /// An array of strings.
        strings, require_strings: &[String], "an array of strings",
            |value| match value {
                Value::Array(Array::String(items)) => Some(items),
                _ => None,
            };
        /// An array of floating-point numbers; f64 are rounded.
        f32s, require_f32s: Vec<f32>, "an array of floating-point numbers",
            |value| match value {
                Value::Array(Array::F32(items)) => Some(items.clone()),
                Value::Array(Array::F64(items)) => Some(items.iter().map(|&x| x as f32).collect()),
                _ => None,
            };
        /// An array of integers that fit into i32.
        i32s, require_i32s: Vec<i32>, "an array of 32-bit integers",
            |value| match value {
                Value::Array(items) => items.integers(),
                _ => None,
            };
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let mut metadata = Self::new();
        for (key, value) in pairs {
            metadata.insert(key, value);
        }
        metadata
    }
}
