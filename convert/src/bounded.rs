//! Lists and maps of JSON files, refused while they are read if they are too long: memory must not follow what a file claims to hold.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// At most `MAX` elements.
#[derive(Debug)]
pub(crate) struct List<T, const MAX: usize>(pub Vec<T>);

/// At most `MAX` entries.
#[derive(Debug)]
pub(crate) struct Map<V, const MAX: usize>(pub HashMap<String, V>);

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        List(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Bounded::<Self, MAX>(PhantomData))
    }
}

impl<'de, V: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Map<V, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Bounded::<Self, MAX>(PhantomData))
    }
}

struct Bounded<C, const MAX: usize>(PhantomData<C>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<List<T, MAX>, MAX> {
    type Value = List<T, MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            if items.len() == MAX {
                return Err(A::Error::custom(format!("more than {MAX} elements")));
            }
            items.push(item);
        }
        Ok(List(items))
    }
}

impl<'de, V: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<Map<V, MAX>, MAX> {
    type Value = Map<V, MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a map of at most {MAX} entries")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = HashMap::new();
        while let Some((key, value)) = map.next_entry()? {
            if entries.len() == MAX {
                return Err(A::Error::custom(format!("more than {MAX} entries")));
            }
            entries.insert(key, value);
        }
        Ok(Map(entries))
    }
}
