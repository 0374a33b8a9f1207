//! What goes where when a model is kept to so much memory.
//!
//! Everything but the experts is resident: attention, norms, embedding and output head, keys and
//! values, scratch. Experts get what remains, as slots of a cache ([`crate::experts`]), unless all of them
//! fit: then the file is mapped as it is. (A dense model's feed-forward parts count as one expert a layer.)

use std::fmt;

use super::memory::Needs;
use super::{Group, PROMPT_BATCH, SCRATCH_LIMIT, Shape, Size, Weight};
use crate::gguf::names::{self, Experts};
use crate::quant::BlockType;

/// Slots of a class that a pass needs at least: one to compute with, one to read into.
const LEAST_SLOTS: usize = 2;
/// What an expert's part takes in a slot beyond its bytes: reads begin and end at multiples of this.
const BORDER: u64 = 4096;
/// The program itself, its threads' stacks, what readers keep (4 MiB each), the file's metadata; and the vocabulary, a
/// token.
const PROGRAM: u64 = 40 << 20;
const PROGRAM_A_TOKEN: u64 = 512;
/// Tokens of context where nobody asks for more or less, and the model was trained for as many.
const USUAL_CONTEXT: usize = 4096;
/// A context is not made shorter than this on one's own account.
const SHORT_CONTEXT: usize = 512;

/// The tokens of context where nobody asks for more or less, and memory is no matter.
pub fn usual_context(shape: &Shape) -> usize {
    USUAL_CONTEXT.min(shape.context)
}

/// Slots for the experts of layers that take the same room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Bytes of an expert.
    pub expert_bytes: u64,
    /// Experts of all these layers.
    pub experts: usize,
    /// Slots for them.
    pub slots: usize,
}

/// The slots of a cache of experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Kinds of slots.
    pub classes: Vec<Class>,
    /// The class of each layer's experts.
    pub class_of: Vec<usize>,
}

impl Slots {
    /// Slots in all.
    pub fn count(&self) -> usize {
        self.classes.iter().map(|class| class.slots).sum()
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> u64 {
        let bytes = |class: &Class| class.slots as u64 * class.slot_bytes;
        self.classes.iter().map(bytes).sum()
    }
}

/// A model in so much memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Bytes that there are.
    pub memory: u64,
    /// Bytes of weights that are always resident: all but the experts.
    pub dense_bytes: u64,
    /// Tokens of context.
    pub context: usize,
    /// Bytes of keys and values.
    pub kv_bytes: u64,
    /// Bytes of scratch, the program and the vocabulary.
    pub scratch_bytes: u64,
    /// Bytes of all experts.
    pub expert_bytes: u64,
    /// Experts of all layers.
    pub experts: usize,
    /// Bytes of experts that work on a token.
    pub active_bytes: u64,
    /// Where the experts go; `None`: all fits, and the file is mapped.
    pub slots: Option<Slots>,
}

/// A model cannot run in so much memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} of memory are too little: at least {} are needed at a context of {context} \
     (weights beside the experts {}, keys and values {}, scratch {}, two experts at a time {}); \
     give more by --memory, or a smaller --ctx",
    Size(*memory), Size(*needed).rounded_up(), Size(*dense_bytes), Size(*kv_bytes), Size(*scratch_bytes), Size(*slot_bytes)
)]
pub struct TooLittle {
    /// Bytes that there are.
    pub memory: u64,
    /// Bytes that are needed at least.
    pub needed: u64,
    /// Bytes with which all would be in memory.
    pub all: u64,
    /// Tokens of context.
    pub context: usize,
    /// Bytes of weights that are always resident.
    pub dense_bytes: u64,
    /// Bytes of keys and values.
    pub kv_bytes: u64,
    /// Bytes of scratch, the program and the vocabulary.
    pub scratch_bytes: u64,
    /// Bytes of the smallest number of slots.
    pub slot_bytes: u64,
}

impl Fit {
    /// Plans a model of `shape` and `weights` into `memory` bytes, with the context asked for or the
    /// longest that fits up to the usual one, keys and values as `kv`.
    ///
    /// # Errors
    /// [`TooLittle`].
    pub fn new<'a>(
        shape: &Shape,
        weights: impl IntoIterator<Item = impl Into<Weight<'a>>>,
        memory: u64,
        context: Option<usize>,
        kv: BlockType,
    ) -> Result<Self, TooLittle> {
        let mut layers = vec![Layer::default(); shape.layers];
        let mut dense_bytes = 0;
        for weight in weights {
            let Weight { name, bytes, .. } = weight.into();
            match (Group::of(name), names::parse(name)) {
                (Group::Experts | Group::FeedForward, Some(block))
                    if block.layer < shape.layers =>
                {
                    let one = match block.experts {
                        Experts::All => bytes / shape.experts as u64,
                        Experts::One(0) | Experts::None => bytes,
                        Experts::One(_) => continue,
                    };
                    layers[block.layer].add(one);
                }
                _ => dense_bytes += bytes,
            }
        }
        let experts = shape.experts;
        let of_experts = |count: usize| -> u64 {
            layers
                .iter()
                .map(|layer| layer.expert_bytes * count as u64)
                .sum()
        };
        let mut fit = Self {
            memory,
            dense_bytes,
            context: context.unwrap_or_else(|| usual_context(shape)),
            kv_bytes: 0,
            scratch_bytes: scratch_bytes(shape),
            expert_bytes: of_experts(experts),
            experts: experts * shape.layers,
            active_bytes: of_experts(shape.experts_used),
            slots: None,
        };
        let mut slots = classes(&layers, experts);
        let least = slots.bytes();
        loop {
            fit.kv_bytes = shape.kv_bytes(fit.context, kv);
            if fit.fixed_bytes().saturating_add(fit.expert_bytes) <= memory {
                return Ok(fit);
            }
            let needed = fit.fixed_bytes().saturating_add(least);
            if needed <= memory {
                break;
            }
            if context.is_none() && fit.context > SHORT_CONTEXT {
                fit.context = (fit.context / 2).max(SHORT_CONTEXT);
                continue;
            }
            return Err(TooLittle {
                memory,
                needed,
                all: fit.fixed_bytes().saturating_add(fit.expert_bytes),
                context: fit.context,
                dense_bytes,
                kv_bytes: fit.kv_bytes,
                scratch_bytes: fit.scratch_bytes,
                slot_bytes: least,
            });
        }
        slots.grow_to(memory - fit.fixed_bytes());
        fit.slots = Some(slots);
        Ok(fit)
    }

    /// What a model of `shape` and `weights` needs with a context of so many tokens (or the usual number): at
    /// least, and to have all in memory.
    pub fn needs<'a>(
        shape: &Shape,
        weights: impl IntoIterator<Item = impl Into<Weight<'a>>>,
        context: Option<usize>,
        kv: BlockType,
    ) -> Needs {
        let context = context.unwrap_or_else(|| usual_context(shape));
        match Self::new(shape, weights, 0, Some(context), kv) {
            Ok(_) => unreachable!("nothing fits into no memory"),
            Err(little) => Needs {
                least: little.needed,
                all: little.all,
            },
        }
    }

    /// Bytes of all that is resident whatever the experts get.
    pub fn fixed_bytes(&self) -> u64 {
        (self.dense_bytes + self.scratch_bytes).saturating_add(self.kv_bytes)
    }

    /// Slots in all, and as many as experts where all fit.
    pub fn slot_count(&self) -> usize {
        self.slots.as_ref().map_or(self.experts, Slots::count)
    }

    /// Bytes that a token reads from disk on average, if the router chooses evenly and without memory:
    /// the active experts' share that has no slot.
    pub fn read_bytes_per_token(&self) -> f64 {
        let Some(slots) = &self.slots else { return 0.0 };
        let used = self.active_bytes as f64 / self.expert_bytes as f64;
        let missing =
            |class: &Class| (class.experts - class.slots) as f64 * class.expert_bytes as f64 * used;
        slots.classes.iter().map(missing).sum()
    }

    /// Tokens a second to expect of decoding with a disk and a memory that read so many bytes a second: what
    /// is missing is read from disk, and everything that is active goes through the cores once.
    pub fn tokens_per_second(&self, disk: f64, memory: f64) -> f64 {
        let active = (self.dense_bytes + self.active_bytes) as f64;
        1.0 / (self.read_bytes_per_token() / disk + active / memory)
    }
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "memory      {}: weights beside the experts {}, keys and values {}, scratch {}, {} left",
            Size(self.memory),
            Size(self.dense_bytes),
            Size(self.kv_bytes),
            Size(self.scratch_bytes),
            Size(self.memory.saturating_sub(self.fixed_bytes()))
        )?;
        match &self.slots {
            None => write!(
                f,
                "experts     all {} of them, {}, fit: the file is mapped",
                self.experts,
                Size(self.expert_bytes)
            ),
            Some(slots) => write!(
                f,
                "experts     {} of {} in slots, {} of {}; a token needs {} of them and reads {} from disk",
                slots.count(),
                self.experts,
                Size(slots.bytes()),
                Size(self.expert_bytes),
                Size(self.active_bytes),
                Size(self.read_bytes_per_token() as u64)
            ),
        }
    }
}

/// Scratch of a pass and its logits, the program, the vocabulary.
fn scratch_bytes(shape: &Shape) -> u64 {
    let batch = PROMPT_BATCH as u64;
    let pass = (shape.scratch_bytes_a_token() * batch).min(SCRATCH_LIMIT);
    let logits = 4 * shape.vocab as u64 * batch;
    pass + logits + PROGRAM + PROGRAM_A_TOKEN * shape.vocab as u64
}

/// An expert of a layer.
#[derive(Clone, Copy, Default)]
struct Layer {
    expert_bytes: u64,
    slot_bytes: u64,
}

impl Layer {
    /// Adds a part.
    fn add(&mut self, bytes: u64) {
        self.expert_bytes += bytes;
        // The part may begin anywhere between two borders.
        self.slot_bytes += bytes.next_multiple_of(BORDER) + BORDER;
    }
}

/// The classes of slots that such layers need, each with the fewest slots.
fn classes(layers: &[Layer], experts: usize) -> Slots {
    let mut slots = Slots {
        classes: Vec::new(),
        class_of: Vec::new(),
    };
    for layer in layers {
        let known = slots.classes.iter().position(|class| {
            class.expert_bytes == layer.expert_bytes && class.slot_bytes == layer.slot_bytes
        });
        let class = known.unwrap_or_else(|| {
            slots.classes.push(Class {
                slot_bytes: layer.slot_bytes,
                expert_bytes: layer.expert_bytes,
                experts: 0,
                slots: 0,
            });
            slots.classes.len() - 1
        });
        slots.classes[class].experts += experts;
        slots.class_of.push(class);
    }
    for class in &mut slots.classes {
        class.slots = LEAST_SLOTS.min(class.experts);
    }
    slots
}

impl Slots {
    /// Adds slots until `bytes` are used, so that every class has room for about the same share of its
    /// experts.
    fn grow_to(&mut self, bytes: u64) {
        let mut left = bytes.saturating_sub(self.bytes());
        loop {
            let open = self
                .classes
                .iter_mut()
                .filter(|class| class.slots < class.experts && class.slot_bytes <= left);
            let share = |class: &Class| class.slots as f64 / class.experts as f64;
            let Some(class) = open.min_by(|a, b| share(a).total_cmp(&share(b))) else {
                return;
            };
            class.slots += 1;
            left -= class.slot_bytes;
        }
    }
}
