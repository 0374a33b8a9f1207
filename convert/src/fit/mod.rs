//! `--fit`: a type for every matrix, so that the file has the size asked for and loses least.
//!
//! What a matrix costs the model in a type is taken apart into two factors. Its *local loss* is how far
//! its outputs are off, as a share of their mean square, by the same moments (or importance) that it is
//! rounded by: [`losses`] encodes a sample of its rows in each type and sees. How many nats a local loss
//! makes is the *sensitivity* of its group, which `fewbit calibrate --sensitivity` has measured with all
//! of the group rounded in a known type. For small errors divergence is a quadratic form of them and
//! errors of different matrices are independent, so costs add up:
//!
//! ```text
//! KLD ≈ Σ_matrices  kld(group) · loss(matrix, type) / Σ_group loss(matrix, degraded)
//! ```
//!
//! [`solve`] spends the bytes where they buy most.

pub mod losses;
pub mod solve;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use fewbit::gguf;
use fewbit::quant::BlockType;
use indicatif::ProgressBar;
use regex::Regex;

use crate::checkpoint::{Checkpoint, HEADER_MEMORY};
use crate::error::{Error, Result};
use crate::imatrix::{Imatrix, fault};
use crate::pipeline::Options;
use crate::plan::Plan;
use losses::Losses;
use solve::{Candidate, Item};

/// How large the file is to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The file, in bytes.
    Bytes(u64),
    /// All tensors, in bits a weight.
    BitsPerWeight(f64),
}

/// Metadata key of the divergence that is expected.
pub const KLD_KEY: &str = "fewbit.fit.kld";

/// A choice of types.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// A type for each matrix that was free, in the file's order.
    pub types: Vec<(String, BlockType)>,
    /// The divergence to expect, in nats.
    pub kld: f64,
}

/// What calibration has measured of a group.
struct Group {
    tensors: Vec<String>,
    kld: f64,
}

/// Reads the sensitivities in a file of statistics.
fn sensitivities(path: &Path) -> Result<(BlockType, Vec<Group>)> {
    let missing = || {
        fault(
            path,
            "holds no sensitivities, which --fit and --bpw go by: make it with fewbit calibrate --sensitivity",
        )
    };
    let Ok(gguf) = gguf::read_within(path, HEADER_MEMORY) else {
        return Err(missing());
    };
    let meta = &gguf.metadata;
    let Some(kind) = meta.str("fewbit.sensitivity.type")? else {
        return Err(missing());
    };
    let kind: BlockType = kind
        .parse()
        .map_err(|e: fewbit::quant::UnknownType| fault(path, e.to_string()))?;
    let names = meta.require_strings("fewbit.sensitivity.groups")?;
    let klds = meta.require_f32s("fewbit.sensitivity.kld")?;
    let sound = |kld: &f32| kld.is_finite() && *kld >= 0.0;
    if kind.encoder().is_none() || names.len() != klds.len() || !klds.iter().all(sound) {
        return Err(fault(
            path,
            "its sensitivities are damaged: calibrate again",
        ));
    }
    let group = |(names, kld): (&String, f32)| Group {
        tensors: names.split(',').map(str::to_owned).collect(),
        kld: f64::from(kld),
    };
    Ok((kind, names.iter().zip(klds).map(group).collect()))
}

/// Chooses types so that the output has the size of `target` at most.
///
/// # Errors
/// Where there are no statistics or no sensitivities, a matrix has none, or the file cannot be that small.
pub fn fit(
    checkpoint: &mut Checkpoint,
    options: &Options,
    target: Target,
    progress: &ProgressBar,
) -> Result<Fitted> {
    let Some(path) = &options.imatrix else {
        return Err(Error::FitWithoutStatistics);
    };
    let imatrix = Imatrix::read(path)?;
    let moments = options.moments()?;
    let (degraded, groups) = sensitivities(path)?;

    // What all but the free matrices take.
    let metadata = checkpoint.metadata.clone();
    let plan = Plan::new(checkpoint, options, Some(&imatrix), Some(0.0))?;
    checkpoint.metadata = metadata;
    let given = |name: &str| {
        options
            .overrides
            .iter()
            .any(|(pattern, _)| pattern.is_match(name))
    };
    let free: Vec<usize> = (0..checkpoint.tensors.len())
        .filter(|&index| {
            let tensor = &checkpoint.tensors[index];
            tensor.is_quantized() && !given(&tensor.name)
        })
        .collect();
    let bytes = |index: usize, kind: BlockType| checkpoint.tensors[index].bytes_as(kind);
    let padded = |bytes: u64| bytes.next_multiple_of(ALIGNMENT);
    let taken = |index: &usize| bytes(*index, plan.kinds[*index]).map_or(0, padded);
    let fixed = plan.layout.file_bytes() - free.iter().map(taken).sum::<u64>();
    let budget = match target {
        Target::Bytes(bytes) => bytes,
        Target::BitsPerWeight(bits) => {
            // Header and padding do not count as weights.
            let beside = plan.layout.file_bytes() - plan.sizes.bytes_total();
            (bits * plan.sizes.params_total() as f64 / 8.0) as u64 + beside
        }
    };

    let measure = Losses {
        checkpoint,
        round: options.round,
        imatrix: &imatrix,
        moments: moments.as_ref(),
        degraded,
    };
    let stored = |index: &usize| checkpoint.tensors[*index].stored_bytes();
    progress.set_length(free.iter().map(stored).sum());
    let mut measured = HashMap::new();
    for &index in &free {
        progress.set_message(checkpoint.tensors[index].name.clone());
        measured.insert(index, measure.of(index)?);
        progress.inc(stored(&index));
    }
    let by_name: HashMap<&str, usize> = free
        .iter()
        .map(|&index| (&checkpoint.tensors[index].name[..], index))
        .collect();

    // Nats that a local loss makes, by tensor.
    let mut per_loss: HashMap<usize, f64> = HashMap::new();
    for group in &groups {
        let members: Vec<usize> = group
            .tensors
            .iter()
            .filter_map(|name| by_name.get(&name[..]).copied())
            .collect();
        let whole = group.tensors.len() as f64 / members.len().max(1) as f64;
        let loss: f64 = members.iter().map(|index| measured[index].degraded).sum();
        let per = if loss > 0.0 {
            group.kld / (loss * whole)
        } else {
            0.0
        };
        per_loss.extend(members.into_iter().map(|index| (index, per)));
    }
    let items: Vec<Item> = free
        .iter()
        .map(|index| {
            let name = &checkpoint.tensors[*index].name;
            let per = per_loss.get(index).ok_or_else(|| {
                fault(
                    path,
                    format!("holds no sensitivity of {name}: made from another model?"),
                )
            })?;
            let candidate = |&(kind, loss): &(BlockType, f64)| Candidate {
                kind,
                bytes: padded(bytes(*index, kind).expect("its blocks fill the rows")),
                cost: per * loss,
            };
            Ok(Item {
                candidates: measured[index].by_type.iter().map(candidate).collect(),
            })
        })
        .collect::<Result<_>>()?;

    let room = budget.checked_sub(fixed);
    let chosen = room.and_then(|room| solve::choose(&items, room));
    let Some(chosen) = chosen else {
        let least = |item: &Item| item.candidates.iter().map(|c| c.bytes).min().unwrap_or(0);
        let needed = fixed + items.iter().map(least).sum::<u64>();
        return Err(Error::FitTooSmall { budget, needed });
    };
    let pick = |(item, &at): (&Item, &usize)| item.candidates[at];
    let picks: Vec<Candidate> = items.iter().zip(&chosen).map(pick).collect();
    let names = free
        .iter()
        .map(|&index| checkpoint.tensors[index].name.clone());
    Ok(Fitted {
        types: names.zip(picks.iter().map(|c| c.kind)).collect(),
        kld: picks.iter().map(|c| c.cost).sum(),
    })
}

/// Bytes that tensors are aligned to.
const ALIGNMENT: u64 = 32;

impl Fitted {
    /// The types as exceptions from a recipe.
    pub fn overrides(&self) -> Vec<(Regex, BlockType)> {
        let exact = |(name, kind): &(String, BlockType)| {
            let pattern = Regex::new(&pattern(name)).expect("an escaped name");
            (pattern, *kind)
        };
        self.types.iter().map(exact).collect()
    }

    /// The types as `--tensor-type-file` takes them, here and in llama-quantize: a line each.
    pub fn list(&self) -> String {
        let mut list = String::new();
        for (name, kind) in &self.types {
            let kind = kind.name().to_ascii_lowercase();
            let _ = writeln!(list, "{}={kind}", pattern(name));
        }
        list
    }

    /// Writes the list.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        fs::write(path, self.list()).map_err(Error::io("write", path))
    }

    /// The plan for people: a part of the graph a line, its types layer by layer in runs.
    pub fn lines(&self) -> Vec<String> {
        type Layers = Vec<(Option<usize>, BlockType)>;
        let mut parts: Vec<(&str, Layers)> = Vec::new();
        for (name, kind) in &self.types {
            let block = name
                .strip_prefix("blk.")
                .and_then(|rest| rest.split_once('.'));
            let layer = block.and_then(|(layer, _)| layer.parse().ok());
            let part = block.map_or(&name[..], |(_, part)| part);
            let part = part.strip_suffix(".weight").unwrap_or(part);
            match parts.iter_mut().find(|(known, _)| *known == part) {
                Some((_, layers)) => layers.push((layer, *kind)),
                None => parts.push((part, vec![(layer, *kind)])),
            }
        }
        let line = |(part, mut layers): (&str, Layers)| {
            layers.sort_by_key(|(layer, _)| *layer);
            let mut runs = String::new();
            let same = layers.chunk_by(|(_, a), (_, b)| a == b);
            for run in same {
                let kind = run[0].1;
                let _ = match (run[0].0, run[run.len() - 1].0) {
                    (None, _) => write!(runs, "  {kind}"),
                    (Some(first), Some(last)) if first < last => {
                        write!(runs, "  {first}–{last} {kind}")
                    }
                    (Some(first), _) => write!(runs, "  {first} {kind}"),
                };
            }
            format!("{part:<16}{runs}")
        };
        parts.into_iter().map(line).collect()
    }
}

/// A regular expression that this name alone matches.
fn pattern(name: &str) -> String {
    format!("^{}$", regex::escape(name))
}

/// Exceptions in a file as [`Fitted::list`] writes them: `REGEX=TYPE`, between blanks or on lines of their own.
///
/// # Errors
/// If the file cannot be read, or one of them is none: the message has its number.
pub fn read_list(path: &Path) -> Result<Vec<(Regex, BlockType)>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let parse = |(index, word): (usize, &str)| {
        tensor_type(word)
            .map_err(|what| Error::input(path, format!("entry {} ({word}): {what}", index + 1)))
    };
    text.split_whitespace().enumerate().map(parse).collect()
}

/// Parses `REGEX=TYPE`; the last `=` separates.
///
/// # Errors
/// What is wrong with it.
pub fn tensor_type(argument: &str) -> std::result::Result<(Regex, BlockType), String> {
    let (pattern, kind) = argument.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
    let pattern = Regex::new(pattern).map_err(|e| e.to_string())?;
    let kind = kind
        .parse()
        .map_err(|e: fewbit::quant::UnknownType| e.to_string())?;
    Ok((pattern, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_names_each_tensor_alone_and_is_read_back() {
        let fitted = Fitted {
            types: vec![
                ("blk.1.attn_q.weight".into(), BlockType::Q4_K),
                ("blk.11.attn_q.weight".into(), BlockType::IQ4_XS),
            ],
            kld: 0.1,
        };
        assert!(
            fitted
                .list()
                .starts_with("^blk\\.1\\.attn_q\\.weight$=q4_k\n")
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        fitted.save(file.path()).unwrap();
        let list = read_list(file.path()).unwrap();
        let kind = |name: &str| list.iter().find(|(p, _)| p.is_match(name)).map(|(_, k)| *k);
        assert_eq!(kind("blk.1.attn_q.weight"), Some(BlockType::Q4_K));
        assert_eq!(kind("blk.11.attn_q.weight"), Some(BlockType::IQ4_XS));
        assert_eq!(kind("blk.1.attn_q.weights"), None);
        assert_eq!(fitted.lines(), ["attn_q            1 Q4_K  11 IQ4_XS"]);
        fs::write(file.path(), "attn_q=Q4_K attn_k").unwrap();
        assert!(
            read_list(file.path())
                .unwrap_err()
                .to_string()
                .contains("entry 2")
        );
    }
}
