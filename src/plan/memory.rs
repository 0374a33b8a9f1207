//! How much memory there is to plan with.

use std::fmt;
use std::fs;
use std::str::FromStr;

/// How much memory a model may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// What the system has to spare.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
}

/// What a model needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Bytes without which it cannot run.
    pub least: u64,
    /// Bytes with which all of it is in memory; not fewer.
    pub all: u64,
}

/// Shares `memory` bytes out among models that run side by side: each gets the least that it needs, and of the
/// rest equal parts, as far as it has a use for them. `None` where that is too little.
pub fn share_out(memory: u64, needs: &[Needs]) -> Option<Vec<u64>> {
    let mut shares: Vec<u64> = needs.iter().map(|needs| needs.least).collect();
    let least = shares
        .iter()
        .try_fold(0_u64, |sum, &share| sum.checked_add(share))?;
    let mut rest = memory.checked_sub(least)?;
    // Those that want least first: what they leave is the others'.
    let mut order: Vec<usize> = (0..needs.len()).collect();
    let wanted = |index: usize| needs[index].all.saturating_sub(needs[index].least);
    order.sort_by_key(|&index| wanted(index));
    for (done, &index) in order.iter().enumerate() {
        let part = (rest / (order.len() - done) as u64).min(wanted(index));
        shares[index] += part;
        rest -= part;
    }
    Some(shares)
}

/// What is left to everybody else of what is available, at least.
const TO_SPARE: u64 = 512 << 20;
/// And this share of all memory: the larger a machine, the more runs beside.
const SHARE_TO_SPARE: u64 = 32;
/// With less than this available no more is taken.
const SHORT: u64 = TO_SPARE / 2;

impl Memory {
    /// The bytes; `None` where the system does not say.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Auto => {
                let (available, total) = (available()?, total()?);
                let spare = TO_SPARE.max(total / SHARE_TO_SPARE);
                Some(available.saturating_sub(spare.min(available / 8)))
            }
        }
    }
}

/// Not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be auto or a size such as 12GiB, 12GB or 800MiB (12G is 12GiB)")]
pub struct NoSize;

impl FromStr for Memory {
    type Err = NoSize;

    fn from_str(text: &str) -> Result<Self, NoSize> {
        if text.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
        let number: f64 = number.parse().map_err(|_| NoSize)?;
        let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            _ => return Err(NoSize),
        };
        let bytes = number * unit as f64;
        match (1.0..1e18).contains(&bytes) {
            true => Ok(Self::Bytes(bytes as u64)),
            false => Err(NoSize),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Bytes(bytes) => write!(f, "{bytes}"),
        }
    }
}

/// What could be allocated without pushing others out, as far as Linux says: of the machine, and of the
/// group that the process is confined to (a container, say).
fn available() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let machine = in_kib(&info, "MemAvailable:")?;
    Some(confined().map_or(machine, |group| group.min(machine)))
}

/// Memory of the machine.
fn total() -> Option<u64> {
    in_kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Whether so little is left that taking more could end in the system's ending somebody. A plan is made when a
/// model is loaded, and others may have grown since.
pub fn is_short() -> bool {
    available().is_some_and(|bytes| bytes < SHORT)
}

/// What the process's control group leaves it, files in memory not counted since they give way.
fn confined() -> Option<u64> {
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let current: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let files = stat.lines().find_map(|line| line.strip_prefix("file "));
    let files: u64 = files
        .and_then(|bytes| bytes.trim().parse().ok())
        .unwrap_or(0);
    Some(limit.saturating_sub(current.saturating_sub(files)))
}

/// Bytes of a line `key: number kB`, as Linux writes them in `/proc`.
pub fn in_kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shared_out_by_need() {
        let needs = |least, all| Needs { least, all };
        let three = [needs(10, 100), needs(5, 20), needs(10, 30)];
        assert_eq!(share_out(24, &three), None);
        assert_eq!(share_out(25, &three), Some(vec![10, 5, 10]));
        assert_eq!(share_out(55, &three), Some(vec![20, 15, 20]));
        // What the small ones do not need, the large one gets.
        assert_eq!(share_out(100, &three), Some(vec![50, 20, 30]));
        assert_eq!(share_out(1000, &three), Some(vec![100, 20, 30]));
        assert_eq!(share_out(u64::MAX, &[needs(u64::MAX, u64::MAX); 2]), None);
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("12GiB", 12 << 30),
            ("12g", 12 << 30),
            ("1.5 GB", 1_500_000_000),
            ("800MiB", 800 << 20),
            ("4096", 4096),
        ] {
            assert_eq!(text.parse(), Ok(Memory::Bytes(bytes)), "{text}");
        }
        assert_eq!("auto".parse(), Ok(Memory::Auto));
        for text in [
            "",
            "much",
            "12 parsecs",
            "-3G",
            "0",
            "1e30",
            "1.2.3G",
            "NaN",
        ] {
            assert_eq!(text.parse::<Memory>(), Err(NoSize), "{text}");
        }
    }
}
