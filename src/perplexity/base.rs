//! A base's distributions, kept small enough to be used again.
//!
//! Of each scored position the most likely [`TOP`] tokens are kept with their log-probabilities, the
//! mass of all others (the tail), and [`SAMPLES`] tokens drawn from the tail in proportion to their
//! probability. With `p` the base's and `q` another model's distribution, over the top and the tail,
//!
//! ```text
//! KL(p ‖ q) = Σ_top p · (ln p − ln q) + P · ln(P / Q) + P · E_tail[r − 1 − ln r],   r = (q / Q) / (p / P)
//! ```
//!
//! where `P` and `Q` are the tail's mass in either, and the mean over the draws stands for the expectation. (The terms `r − 1`
//! have the mean 0; with them the terms vary far less, and none is below 0.) Draws are systematic, one in
//! each of [`SAMPLES`] equal shares of the tail's mass, at an offset that follows from the position.
//! A vocabulary of 32,000 takes 128 kB a position as floats, this 1.3 kB. The true token's
//! log-probability and the most likely token are exact.
//!
//! On disk it is a GGUF file of F32 tensors (token ids too: they are below 2²⁴), with the texts'
//! tokens, so that nobody compares with another text by mistake.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Chunks, LogSoftmax, Position, Scored, Tally, score};
use crate::engine::{self, Engine};
use crate::gguf::{self, Gguf, Metadata, TensorDecl, Value};
use crate::quant::BlockType;
use crate::threads::Pool;

/// Most likely tokens of a position that are kept one by one.
pub const TOP: usize = 128;

/// Tokens drawn from the others.
pub const SAMPLES: usize = 32;

/// Floats of a position: NLL of the true token, mass of the tail, ids and log-probabilities.
const RECORD: usize = 2 + 2 * (TOP + SAMPLES);

/// `general.type` of the file.
const KIND: &str = "fewbit.base";

/// Most bytes of a file that are read: over a million positions.
const MAX_BYTES: u64 = 2 << 30;

/// Why a base cannot be kept, or is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// The file is no base, or another one's.
    #[error("{}: {what}", file.display())]
    Unfit {
        /// The file.
        file: PathBuf,
        /// What is wrong, and the remedy.
        what: String,
    },
    /// The file cannot be read, or cannot get its name.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What failed.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// What is kept of a model's distributions on several texts.
#[derive(Debug)]
pub struct Base {
    /// Where it comes from: a file that was read, or the model's.
    file: PathBuf,
    vocab: usize,
    context: usize,
    texts: Vec<Kept>,
}

/// The same on one text.
#[derive(Debug, Default)]
pub struct Kept {
    /// The chunks' tokens, one after the other.
    tokens: Vec<u32>,
    /// `[positions, RECORD]`.
    records: Vec<f32>,
}

impl Base {
    /// Runs `engine` over `texts`. `progress` is called after each of [`Chunks::parts`].
    ///
    /// # Errors
    /// As [`score`].
    pub fn of(
        engine: &Arc<Engine>,
        texts: &[Chunks],
        mut progress: impl FnMut(),
    ) -> Result<Self, engine::Error> {
        let context = texts.iter().map(Chunks::context).max().unwrap_or(0);
        let mut session = engine.session(context)?;
        let mut base = Self {
            file: engine.path().to_owned(),
            vocab: engine.shape().vocab,
            context,
            texts: Vec::new(),
        };
        for chunks in texts {
            let mut kept = Kept::new(chunks);
            for index in 0..chunks.parts() {
                kept.add(engine.pool(), &score(&mut session, chunks, index)?);
                progress();
            }
            base.texts.push(kept);
        }
        Ok(base)
    }

    /// Whether the file at `path` is one of these rather than a model.
    pub fn is_one(path: &Path) -> bool {
        gguf::read(path).is_ok_and(|gguf| is_base(&gguf))
    }

    /// Where it comes from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The text that `chunks` are the beginning of.
    ///
    /// # Errors
    /// If there is none: the texts, the vocabularies or the contexts differ.
    pub fn text(&self, chunks: &Chunks, vocab: usize) -> Result<&Kept, Error> {
        let unfit = |what: String| Error::Unfit {
            file: self.file.clone(),
            what,
        };
        if self.vocab != vocab {
            return Err(unfit(format!(
                "was made with a vocabulary of {} tokens, not {vocab}: these are not one model",
                self.vocab
            )));
        }
        if self.context != chunks.context() {
            return Err(unfit(format!(
                "was made with chunks of {} tokens: give --ctx {}",
                self.context, self.context
            )));
        }
        let tokens = fed(chunks);
        let starts = |kept: &&Kept| kept.tokens.starts_with(&tokens);
        self.texts.iter().find(starts).ok_or_else(|| {
            unfit(
                "holds no text that begins with these tokens: made from another text, or fewer chunks of it; save it again"
                    .to_owned(),
            )
        })
    }

    /// Writes it to `path`, beside it first and renamed when whole.
    ///
    /// # Errors
    /// If it cannot be written; nothing is then left behind.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let mut meta = Metadata::new();
        meta.insert("general.type", Value::String(KIND.into()));
        let model = self.file.file_name().unwrap_or_default().to_string_lossy();
        meta.insert("fewbit.base.model", Value::String(model.into_owned()));
        for (key, value) in [("vocab", self.vocab), ("context", self.context)] {
            meta.insert(format!("fewbit.base.{key}"), Value::U32(value as u32));
        }
        for (key, value) in [("top", TOP), ("samples", SAMPLES)] {
            meta.insert(format!("fewbit.base.{key}"), Value::U32(value as u32));
        }
        let texts = Value::U32(self.texts.len() as u32);
        meta.insert("fewbit.base.texts", texts);
        let tokens: Vec<Vec<f32>> = self
            .texts
            .iter()
            .map(|kept| kept.tokens.iter().map(|&token| token as f32).collect())
            .collect();
        let mut tensors: Vec<(TensorDecl, &[u8])> = Vec::new();
        for (index, (kept, tokens)) in self.texts.iter().zip(&tokens).enumerate() {
            let mut add = |what: &str, shape: Vec<usize>, values| {
                let decl = TensorDecl {
                    name: format!("text.{index}.{what}"),
                    kind: BlockType::F32,
                    shape,
                };
                tensors.push((decl, bytemuck::cast_slice(values)));
            };
            add("tokens", vec![tokens.len()], tokens);
            let positions = kept.records.len() / RECORD;
            add("positions", vec![RECORD, positions], &kept.records);
        }
        Ok(gguf::write_whole(path, &meta, &tensors)?)
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// If it is none of these, or damaged.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let unfit = |what: &str| Error::Unfit {
            file: path.to_owned(),
            what: format!("{what}: save it again with fewbit ladder --save-base"),
        };
        let gguf = gguf::read(path)?;
        if !is_base(&gguf) {
            return Err(unfit("is no base that was saved"));
        }
        let number = |key: &str| -> Result<usize, Error> {
            let key = format!("fewbit.base.{key}");
            Ok(gguf.metadata.require_u32(&key)? as usize)
        };
        if (number("top")?, number("samples")?) != (TOP, SAMPLES) {
            return Err(unfit("was made by another version"));
        }
        let (vocab, context) = (number("vocab")?, number("context")?);
        let mut texts = Vec::new();
        for index in 0..gguf.tensors.len() / 2 {
            let tokens = floats(&gguf, path, &format!("text.{index}.tokens"))?;
            let records = floats(&gguf, path, &format!("text.{index}.positions"))?;
            let chunks = tokens.len().checked_div(context).unwrap_or(0);
            let scored = context.saturating_sub(1).saturating_sub(context / 2);
            let (rows, _) = records.as_chunks::<RECORD>();
            let is_id = |id: &f32| *id >= 0.0 && *id < vocab as f32 && id.fract() == 0.0;
            let sound = |row: &[f32; RECORD]| {
                let (ids, _) = row[2..].as_chunks::<2>();
                row.iter().all(|x| !x.is_nan()) && ids.iter().all(|[id, _]| is_id(id))
            };
            if records.len() != chunks * scored * RECORD
                || !tokens.iter().all(is_id)
                || !rows.iter().all(sound)
            {
                return Err(unfit("is damaged"));
            }
            texts.push(Kept {
                tokens: tokens.iter().map(|&token| token as u32).collect(),
                records,
            });
        }
        Ok(Self {
            file: path.to_owned(),
            vocab,
            context,
            texts,
        })
    }
}

fn is_base(gguf: &Gguf) -> bool {
    matches!(gguf.metadata.get("general.type"), Some(Value::String(kind)) if kind == KIND)
}

fn floats(gguf: &Gguf, path: &Path, name: &str) -> Result<Vec<f32>, Error> {
    let unfit = |what: String| Error::Unfit {
        file: path.to_owned(),
        what,
    };
    let info = gguf.tensor(name);
    let info = info.ok_or_else(|| unfit(format!("tensor {name} is missing: save it again")))?;
    if info.kind != BlockType::F32 || gguf.files.len() != 1 || info.bytes > MAX_BYTES {
        return Err(unfit(format!(
            "tensor {name} is not F32 below 2 GiB in one file"
        )));
    }
    let mut values = vec![0.0_f32; info.elements()];
    File::open(path)
        .and_then(|file| file.read_exact_at(bytemuck::cast_slice_mut(&mut values), info.offset))
        .map_err(|source| Error::Io {
            file: path.to_owned(),
            action: "read",
            source,
        })?;
    Ok(values)
}

/// The tokens of all chunks, as a model is fed them.
fn fed(chunks: &Chunks) -> Vec<u32> {
    (0..chunks.len())
        .flat_map(|index| chunks.tokens(index))
        .collect()
}

impl Kept {
    /// Nothing yet, of the text in `chunks`.
    pub fn new(chunks: &Chunks) -> Self {
        Self {
            tokens: fed(chunks),
            records: Vec::new(),
        }
    }

    /// Positions so far.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.records.len() / RECORD
    }

    /// Adds a part.
    pub fn add(&mut self, pool: &Pool, scored: &Scored<'_>) {
        let positions = scored.targets.len();
        let (start, first) = (self.records.len(), self.len());
        self.records.resize(start + positions * RECORD, 0.0);
        let vocab = scored.logits.len().checked_div(positions).unwrap_or(0);
        pool.chunks(&mut self.records[start..], RECORD, |i, record| {
            let row = LogSoftmax::of(&scored.logits[i * vocab..(i + 1) * vocab]);
            keep(&row, scored.targets[i], first + i, record);
        });
    }
}

/// Fills the record of position `index`.
fn keep(row: &LogSoftmax<'_>, target: u32, index: usize, record: &mut [f32]) {
    let vocab = row.logits.len();
    let mut ids: Vec<u32> = (0..vocab as u32).collect();
    let logit = |id: &u32| row.logits[*id as usize];
    // Of equal logits the lower id is first, as in `LogSoftmax::top`.
    let order = |a: &u32, b: &u32| logit(b).total_cmp(&logit(a)).then(a.cmp(b));
    let top = TOP.min(vocab);
    if top < vocab {
        ids.select_nth_unstable_by(top, order);
    }
    ids[..top].sort_unstable_by(order);
    ids[top..].sort_unstable(); // the draws must not depend on how the others were left
    let log_p = |id: u32| row.of_token(id as usize);
    let tail: f64 = ids[top..].iter().map(|&id| log_p(id).exp()).sum();

    (record[0], record[1]) = (-log_p(target) as f32, tail as f32);
    let (pairs, _) = record[2..].as_chunks_mut::<2>();
    let (tops, draws) = pairs.split_at_mut(TOP);
    // A small vocabulary leaves places without mass.
    tops.fill([0.0, f32::NEG_INFINITY]);
    draws.fill([0.0, f32::NEG_INFINITY]);
    for (pair, &id) in tops.iter_mut().zip(&ids[..top]) {
        *pair = [id as f32, log_p(id) as f32];
    }
    if tail == 0.0 {
        return;
    }
    // The golden ratio's multiples lie evenly.
    let offset = (index as f64 * 0.618_033_988_749_894_9).fract();
    let mut next = draws.iter_mut().enumerate();
    let at = |draw: usize| (draw as f64 + offset) / SAMPLES as f64 * tail;
    let (mut sum, mut wanted) = (0.0, next.next());
    for &id in &ids[top..] {
        sum += log_p(id).exp();
        while let Some((draw, pair)) = &mut wanted {
            if sum <= at(*draw) {
                break;
            }
            **pair = [id as f32, log_p(id) as f32];
            wanted = next.next();
        }
    }
}

/// `KL(base ‖ model)` and the rest of a position, from a record and the model's logits.
fn compare(record: &[f32], model: &LogSoftmax<'_>, target: usize) -> Position {
    let (pairs, _) = record[2..].as_chunks::<2>();
    let (tops, draws) = pairs.split_at(TOP);
    let known = |pair: &&[f32; 2]| pair[1] > f32::NEG_INFINITY;
    // ln p and ln q.
    let logs = |&[id, log_p]: &[f32; 2]| (f64::from(log_p), model.of_token(id as usize));
    let (mut kld, mut rest) = (0.0, 1.0);
    for (log_p, log_q) in tops.iter().filter(known).map(logs) {
        kld += log_p.exp() * (log_p - log_q);
        rest -= log_q.exp();
    }
    let tail = f64::from(record[1]);
    // Rounding can leave nothing of the model's tail where the base's is next to nothing.
    if rest > 0.0 && tail > 0.0 {
        let shift = (tail / rest).ln();
        let drawn = draws.iter().filter(known).map(logs);
        let terms = drawn.map(|(log_p, log_q)| {
            let log_r = log_q - log_p + shift;
            log_r.exp() - 1.0 - log_r
        });
        let (count, sum) = terms.fold((0, 0.0), |(n, sum), term| (n + 1, sum + term));
        kld += tail * (shift + sum / f64::from(count.max(1)));
    }
    Position {
        nll: -model.of_token(target),
        base_nll: f64::from(record[0]),
        kld,
        same_top: tops[0][0] as usize == model.top,
    }
}

impl Tally {
    /// Adds a part of the model against what is kept of a base; parts come in order, from a text's first on.
    ///
    /// # Panics
    /// If there are more positions than are kept: ask [`Base::text`].
    pub fn add_against(&mut self, pool: &Pool, model: &Scored<'_>, base: &Kept) {
        let positions = model.targets.len();
        let start = self.positions.len();
        let range: Range<usize> = start..start + positions;
        let records = &base.records[range.start * RECORD..range.end * RECORD];
        self.positions.resize(range.end, Position::default());
        let vocab = model.logits.len().checked_div(positions).unwrap_or(0);
        pool.chunks(&mut self.positions[range], 1, |i, position| {
            let row = LogSoftmax::of(&model.logits[i * vocab..(i + 1) * vocab]);
            let record = &records[i * RECORD..(i + 1) * RECORD];
            position[0] = compare(record, &row, model.targets[i] as usize);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of a language model's kind: few likely tokens, a long tail; and another model's.
    fn rows(vocab: usize, seed: u32) -> (Vec<f32>, Vec<f32>) {
        let mut state = seed;
        let mut uniform = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        let base: Vec<f32> = (0..vocab)
            .map(|i| -1.3 * ((i + 1) as f32).ln() + 2.0 * uniform())
            .collect();
        let model = base.iter().map(|x| x + 0.8 * (uniform() - 0.5)).collect();
        (base, model)
    }

    #[test]
    fn the_mean_divergence_is_that_of_whole_distributions() {
        let vocab = 5000;
        let (mut exact, mut kept, mut worst) = (0.0, 0.0, 0.0_f64);
        for index in 0..300 {
            let (base, model) = rows(vocab, index as u32);
            let (base, model) = (LogSoftmax::of(&base), LogSoftmax::of(&model));
            let mut record = vec![0.0; RECORD];
            keep(&base, 17, index, &mut record);
            let position = compare(&record, &model, 17);
            let truth = base.divergence(&model);
            assert!((position.base_nll + base.of_token(17)).abs() < 1e-6);
            assert_eq!(position.same_top, base.top == model.top);
            assert!(record[1] > 0.05, "the tail is none: {}", record[1]);
            exact += truth;
            kept += position.kld;
            worst = worst.max((position.kld - truth).abs() / truth);
        }
        let error = (kept - exact).abs() / exact;
        assert!(error < 2e-3, "{kept} for {exact}");
        assert!(worst < 0.2, "{worst}");
    }

    #[test]
    fn of_a_small_vocabulary_nothing_is_lost() {
        let (base, model) = rows(100, 5);
        let (base, model) = (LogSoftmax::of(&base), LogSoftmax::of(&model));
        let mut record = vec![0.0; RECORD];
        keep(&base, 3, 0, &mut record);
        let found = compare(&record, &model, 3).kld;
        assert!((found - base.divergence(&model)).abs() < 1e-6);
    }
}
