//! What a cache counts.

use std::ops::{Add, Sub};
use std::time::Duration;

/// What a cache has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Experts that layers needed.
    pub needed: u64,
    /// Of those, the ones that were there.
    pub hits: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Time that computation waited for the disk.
    pub waited: Duration,
    /// Time that something was being read.
    pub busy: Duration,
    /// Bytes read for experts that were not used before they went, or have not been yet.
    pub unused_bytes: u64,
    /// Experts that were expected of a layer before it was visited.
    pub expected: u64,
    /// Of those, the ones that were then needed.
    pub expected_right: u64,
}

impl Counters {
    /// The share of needed experts that were there; `None` where none was needed.
    pub fn hit_rate(&self) -> Option<f64> {
        (self.needed > 0).then(|| self.hits as f64 / self.needed as f64)
    }

    /// The share of expected experts that were needed; `None` where none was expected.
    pub fn accuracy(&self) -> Option<f64> {
        (self.expected > 0).then(|| self.expected_right as f64 / self.expected as f64)
    }
}

impl Add for Counters {
    type Output = Self;

    /// What was done here and there.
    fn add(self, other: Self) -> Self {
        Self {
            needed: self.needed + other.needed,
            hits: self.hits + other.hits,
            read_bytes: self.read_bytes + other.read_bytes,
            waited: self.waited + other.waited,
            busy: self.busy + other.busy,
            unused_bytes: self.unused_bytes + other.unused_bytes,
            expected: self.expected + other.expected,
            expected_right: self.expected_right + other.expected_right,
        }
    }
}

impl Sub for Counters {
    type Output = Self;

    /// What was done since `before`.
    fn sub(self, before: Self) -> Self {
        Self {
            needed: self.needed - before.needed,
            hits: self.hits - before.hits,
            read_bytes: self.read_bytes - before.read_bytes,
            waited: self.waited - before.waited,
            busy: self.busy - before.busy,
            unused_bytes: self.unused_bytes.saturating_sub(before.unused_bytes),
            expected: self.expected - before.expected,
            expected_right: self.expected_right - before.expected_right,
        }
    }
}
