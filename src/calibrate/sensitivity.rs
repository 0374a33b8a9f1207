//! What rounding costs where: the divergence when one group of matrices is rounded, and nothing else.
//!
//! A group is one part of the graph (queries, say) in a band of layers; embedding and head are their
//! own. Its matrices are put into blocks of [`DEGRADED`], a few bits rounded in the plainest way, and
//! the model diverges from itself by so many nats. `fewbit-convert --fit` scales that by how much better
//! or worse another type does in the same matrices.
//!
//! The texts are walked to each band once with the model as it is; from there each group's variant goes on.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::engine::Engine;
use crate::gguf::{Array, Metadata, Value, names};
use crate::perplexity::{Chunks, Kept, Scored, Tally};
use crate::quant::BlockType;
use crate::tensor::Matrix;

/// The type that a group's matrices are put into.
pub const DEGRADED: BlockType = BlockType::Q4_0;

/// Metadata keys: the type; a group each: its tensors' names with commas between them, and nats.
const KEYS: [&str; 3] = [
    "fewbit.sensitivity.type",
    "fewbit.sensitivity.groups",
    "fewbit.sensitivity.kld",
];

/// What to measure it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Layers of a band.
    pub band: usize,
    /// Chunks of the text, evenly spread.
    pub chunks: usize,
}

/// Divergences by group.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sensitivity {
    groups: Vec<Group>,
}

/// Matrices that are rounded together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Group {
    /// Their tensors' names.
    pub tensors: Vec<String>,
    /// KL(model ‖ model with these rounded), in nats.
    pub kld: f64,
}

impl Sensitivity {
    /// All groups.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Notes it in a file's metadata.
    pub(super) fn describe(&self, meta: &mut Metadata) {
        let names = self.groups.iter().map(|group| group.tensors.join(","));
        let klds = self.groups.iter().map(|group| group.kld as f32);
        let [kind, groups, kld] = KEYS;
        meta.insert(kind, Value::String(DEGRADED.name().into()));
        meta.insert(groups, Value::Array(Array::String(names.collect())));
        meta.insert(kld, Value::Array(Array::F32(klds.collect())));
    }
}

/// The parts of a layer that may be quantized.
const PARTS: [&str; 7] = [
    names::ATTN_Q,
    names::ATTN_K,
    names::ATTN_V,
    names::ATTN_OUTPUT,
    names::FFN_GATE,
    names::FFN_UP,
    names::FFN_DOWN,
];

/// Groups by the layer that their variant goes on from.
fn groups(engine: &Engine, band: usize) -> Vec<(usize, Vec<String>)> {
    let shape = engine.shape();
    let mut groups = vec![(0, vec![names::TOKEN_EMBD.to_owned()])];
    for first in (0..shape.layers).step_by(band) {
        let layers = first..shape.layers.min(first + band);
        groups.extend(PARTS.map(|part| {
            let is_expert = part.starts_with("ffn_") && shape.is_moe();
            let name = |layer| match is_expert {
                true => names::experts(layer, part),
                false => names::block(layer, part),
            };
            (first, layers.clone().map(name).collect())
        }));
    }
    if engine.gguf().tensor(names::OUTPUT).is_some() {
        let last = shape.layers - 1;
        groups.push((last / band * band, vec![names::OUTPUT.to_owned()]));
    }
    groups
}

/// Chunks that are run: of which text, and which of it.
fn picked(texts: &[Chunks], count: usize) -> Vec<(usize, usize)> {
    let all: Vec<(usize, usize)> = texts
        .iter()
        .enumerate()
        .flat_map(|(text, chunks)| (0..chunks.len()).map(move |index| (text, index)))
        .collect();
    let count = count.min(all.len());
    (0..count).map(|i| all[i * all.len() / count]).collect()
}

/// How many steps [`measure`] takes.
pub fn steps(engine: &Engine, options: Options) -> usize {
    groups(engine, options.band).len()
}

/// Measures all groups over some chunks of `texts`. `progress` is called after each.
///
/// # Errors
/// [`Error::NotResident`] where experts are in a cache; as in a forward pass.
pub fn measure(
    engine: &Arc<Engine>,
    texts: &[Chunks],
    options: Options,
    mut progress: impl FnMut(),
) -> Result<Sensitivity, Error> {
    let picked = picked(texts, options.chunks);
    let chunk = |&(text, index): &(usize, usize)| texts[text].tokens(index);
    let mut walk = engine.walk(picked.iter().map(chunk).collect())?;
    let scored = texts[0].scored();

    // The model as it is: where it stands before each band, and what it comes to.
    let mut stands = Vec::new();
    while let Some(layer) = walk.next_layer() {
        if layer % options.band == 0 {
            stands.push(walk.stand());
        }
        if layer + 1 < engine.shape().layers {
            walk.step(&mut |_, _, _| {}, || {})?;
        } else {
            break;
        }
    }
    let collect = |walk: &mut crate::engine::Walk| -> Result<Vec<Vec<f32>>, Error> {
        let mut logits = vec![Vec::new(); picked.len()];
        walk.finish(scored.start, |text, position, row| {
            if position < scored.end {
                logits[text].extend_from_slice(row);
            }
        })?;
        Ok(logits)
    };
    let rows = |logits: Vec<Vec<f32>>| {
        let rows = picked.iter().zip(logits);
        rows.map(|(&(text, index), logits)| Scored::from_logits(&texts[text], index, logits))
    };
    let mut base = Kept::default();
    for scored in rows(collect(&mut walk)?) {
        base.add(engine.pool(), &scored);
    }

    let mut sensitivity = Sensitivity::default();
    for (first, tensors) in groups(engine, options.band) {
        let degrade = |name: &str, matrix: &mut Matrix| -> Result<(), Error> {
            if tensors.iter().any(|tensor| tensor == name) {
                degrade(engine, matrix)?;
            }
            Ok(())
        };
        if !walk.go_on_with(&stands[first / options.band], degrade)? {
            return Err(Error::NotResident {
                file: engine.path().to_owned(),
            });
        }
        let mut tally = Tally::default();
        for scored in rows(collect(&mut walk)?) {
            tally.add_against(engine.pool(), &scored, &base);
        }
        // Draws from the tail leave a little noise, of either sign.
        let kld = tally.divergence().kld.value.max(0.0);
        sensitivity.groups.push(Group { tensors, kld });
        progress();
    }
    Ok(sensitivity)
}

/// Puts a matrix into blocks of [`DEGRADED`]; one that these do not fill stays.
fn degrade(engine: &Engine, matrix: &mut Matrix) -> Result<(), Error> {
    let encode = DEGRADED.encoder().expect("a type that is written");
    let columns = matrix.extent().cols;
    let recoded = matrix.recoded(DEGRADED, |rows, stride, bytes| {
        engine.pool().chunks(bytes, stride, |row, encoded| {
            let mut weights = vec![0.0; columns];
            rows.decode(row, &mut weights);
            encode(&weights, None, encoded);
        });
    });
    let recoded = recoded.map_err(|source| Error::NoRoom {
        file: engine.path().to_owned(),
        source,
    })?;
    if let Some(recoded) = recoded {
        *matrix = recoded;
    }
    Ok(())
}
