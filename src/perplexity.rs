//! Perplexity and KL divergence by llama-perplexity's rules.
//!
//! A text is tokenized once and cut into chunks of the context's length, without overlap, the
//! tail dropped. The first token of each chunk is replaced by BOS where the vocabulary adds
//! one. The second half of each chunk is scored: with a context of 512, the logits after
//! positions 256 to 510 predict tokens 257 to 511, 255 scores a chunk. Perplexity is
//! `exp(mean NLL)`, its standard error `PPL · sd(NLL) / √(n − 1)`.
//!
//! Against a base model the same positions give the divergence `KL(base ‖ model)` over the
//! whole vocabulary, the change `Δp` of the true token's probability, and whether both rank
//! the same token first. The base runs beside the model, or before it: [`Base`] keeps what matters.

mod base;

use std::ops::Range;

use crate::engine::{Error, Session};
use crate::model::Routing;
use crate::plan::PROMPT_BATCH;
use crate::threads::Pool;
use crate::tokenizer::{self, Tokenizer};

pub use base::{Base, Error as BaseError, Kept};

/// A text, cut into chunks.
pub struct Chunks {
    tokens: Vec<u32>,
    context: usize,
    bos: Option<u32>,
}

/// Why a text cannot be cut.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The tokenizer refused.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The text does not fill one chunk.
    #[error(
        "the text has {tokens} tokens, less than one chunk of {context}; give a longer one or a smaller --ctx"
    )]
    Short {
        /// Tokens there are.
        tokens: usize,
        /// Tokens of a chunk.
        context: usize,
    },
    /// A chunk must have a second half to score.
    #[error("a context of {0} is too small; at least 4 tokens are needed")]
    Context(usize),
}

impl Chunks {
    /// Cuts `text` into chunks of `context` tokens; at most `limit` of them.
    ///
    /// # Errors
    /// When the text does not fill one chunk.
    pub fn new(
        tokenizer: &Tokenizer,
        text: &str,
        context: usize,
        limit: Option<usize>,
    ) -> Result<Self, TextError> {
        if context < 4 {
            return Err(TextError::Context(context));
        }
        let mut tokens = tokenizer.encode_with_bos(text, false)?;
        if tokens.len() < context {
            return Err(TextError::Short {
                tokens: tokens.len(),
                context,
            });
        }
        let chunks = (tokens.len() / context).min(limit.unwrap_or(usize::MAX).max(1));
        tokens.truncate(chunks * context);
        Ok(Self {
            tokens,
            context,
            bos: tokenizer.bos().filter(|_| tokenizer.adds_bos()),
        })
    }

    /// Number of chunks.
    #[allow(clippy::len_without_is_empty)] // there is at least one
    pub fn len(&self) -> usize {
        self.tokens.len() / self.context
    }

    /// Tokens of a chunk.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Number of parts: a chunk is run in parts of at most [`PROMPT_BATCH`] tokens, so that the
    /// logits of a long context are never held all at once.
    pub fn parts(&self) -> usize {
        self.len() * self.parts_a_chunk()
    }

    fn parts_a_chunk(&self) -> usize {
        self.context.div_ceil(PROMPT_BATCH)
    }

    /// The chunk that part `index` belongs to, and where it lies in it.
    fn part(&self, index: usize) -> (usize, Range<usize>) {
        let start = index % self.parts_a_chunk() * PROMPT_BATCH;
        let end = (start + PROMPT_BATCH).min(self.context);
        (index / self.parts_a_chunk(), start..end)
    }

    /// Chunk `index` as it is fed to a model.
    pub fn tokens(&self, index: usize) -> Vec<u32> {
        let mut tokens = self.tokens[index * self.context..(index + 1) * self.context].to_vec();
        tokens[0] = self.bos.unwrap_or(tokens[0]);
        tokens
    }

    /// Positions of a chunk whose logits are scored: the second half but the last, which
    /// predicts a token of the next chunk.
    pub fn scored(&self) -> Range<usize> {
        self.context / 2..self.context - 1
    }

    /// The tokens of chunk `index` that come after these positions.
    fn targets(&self, index: usize, positions: Range<usize>) -> &[u32] {
        let chunk = &self.tokens[index * self.context..(index + 1) * self.context];
        &chunk[positions.start + 1..positions.end + 1]
    }
}

/// Logits of scored positions, `[positions, vocab]`, and the tokens that came.
pub struct Scored<'a> {
    logits: Vec<f32>,
    targets: &'a [u32],
}

impl<'a> Scored<'a> {
    /// Chunk `index` as another engine sees it: `logits` after the positions of
    /// [`Chunks::scored`], `[positions, vocab]`.
    ///
    /// # Panics
    /// If the logits are not whole rows, one a position.
    pub fn from_logits(chunks: &'a Chunks, index: usize, logits: Vec<f32>) -> Self {
        let targets = chunks.targets(index, chunks.scored());
        assert!(
            !logits.is_empty() && logits.len().is_multiple_of(targets.len()),
            "{} logits are no rows for {} positions",
            logits.len(),
            targets.len()
        );
        Self { logits, targets }
    }
}

/// Runs part `index` through `session`, which must have run the parts before it of the same
/// chunk; the first part of a chunk empties it.
///
/// # Errors
/// As [`Session::feed`].
pub fn score<'a>(
    session: &mut Session,
    chunks: &'a Chunks,
    index: usize,
) -> Result<Scored<'a>, Error> {
    let (chunk, part) = chunks.part(index);
    let all = chunks.scored();
    let scored = all.start.max(part.start)..all.end.min(part.end);
    let scored = if scored.is_empty() {
        part.end..part.end
    } else {
        scored
    };
    if part.start == 0 {
        session.rewind(0);
    }
    let vocab = session.engine().shape().vocab;
    let mut logits = Vec::with_capacity(scored.len() * vocab);
    let tokens = &chunks.tokens(chunk)[part.clone()];
    // What routing by the cache costs shows only where tokens are generated.
    if session.engine().routing() == Routing::Exact {
        // The last position's logits come unasked.
        session.score(tokens, scored.start - part.start, |position, row| {
            if scored.contains(&(part.start + position)) {
                logits.extend_from_slice(row);
            }
        })?;
    } else {
        for (position, &token) in (part.start..).zip(tokens) {
            let row = session.step(token)?;
            if scored.contains(&position) {
                logits.extend_from_slice(row);
            }
        }
    }
    let targets = match scored.is_empty() {
        true => &[],
        false => chunks.targets(chunk, scored),
    };
    Ok(Scored { logits, targets })
}

/// What is known of one scored position.
#[derive(Clone, Copy, Default)]
struct Position {
    /// −ln of the true token's probability.
    nll: f64,
    /// The same for the base.
    base_nll: f64,
    /// KL(base ‖ model).
    kld: f64,
    /// Both rank the same token first.
    same_top: bool,
}

/// Collects scored positions.
#[derive(Default)]
pub struct Tally {
    positions: Vec<Position>,
}

impl Tally {
    /// Adds a part of the model, with the same part of the base where there is one.
    pub fn add(&mut self, pool: &Pool, model: &Scored<'_>, base: Option<&Scored<'_>>) {
        if model.targets.is_empty() {
            return;
        }
        let vocab = model.logits.len() / model.targets.len();
        let start = self.positions.len();
        self.positions
            .resize(start + model.targets.len(), Position::default());
        let row = |scored: &Scored<'_>, i: usize| -> std::ops::Range<usize> {
            debug_assert_eq!(scored.logits.len(), scored.targets.len() * vocab);
            i * vocab..(i + 1) * vocab
        };
        pool.chunks(&mut self.positions[start..], 1, |i, position| {
            let target = model.targets[i] as usize;
            let ours = LogSoftmax::of(&model.logits[row(model, i)]);
            position[0].nll = -ours.of_token(target);
            if let Some(base) = base {
                let theirs = LogSoftmax::of(&base.logits[row(base, i)]);
                position[0].base_nll = -theirs.of_token(target);
                position[0].kld = theirs.divergence(&ours);
                position[0].same_top = theirs.top == ours.top;
            }
        });
    }

    /// Number of scored tokens so far.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// KL(base ‖ model) at each scored position, in the order of the text: for the differences
    /// between two models' divergences, whose error is far below that of either.
    pub fn divergences(&self) -> impl Iterator<Item = f64> + Clone + '_ {
        self.positions.iter().map(|position| position.kld)
    }

    /// Perplexity and its standard error.
    pub fn perplexity(&self) -> Estimate {
        perplexity(self.positions.iter().map(|position| position.nll))
    }

    /// The comparison with the base; only meaningful if every [`add`](Self::add) had one.
    pub fn divergence(&self) -> Divergence {
        let positions = &self.positions;
        let mut kld: Vec<f64> = positions.iter().map(|position| position.kld).collect();
        kld.sort_by(f64::total_cmp);
        let mut dp: Vec<f64> = positions
            .iter()
            .map(|position| (-position.nll).exp() - (-position.base_nll).exp())
            .collect();
        dp.sort_by(f64::total_cmp);
        let nll = Estimate::of_mean(positions.iter().map(|position| position.nll));
        let base_nll = Estimate::of_mean(positions.iter().map(|position| position.base_nll));
        let (ppl, base) = (nll.exp(), base_nll.exp());
        // Covariance of the two means.
        let covariance = positions
            .iter()
            .map(|position| (position.nll - nll.value) * (position.base_nll - base_nll.value))
            .sum::<f64>()
            / (positions.len() as f64 * (positions.len() as f64 - 1.0));
        let variance = ppl.se.powi(2) + base.se.powi(2) - 2.0 * ppl.value * base.value * covariance;
        Divergence {
            base,
            ppl_difference: Estimate {
                value: ppl.value - base.value,
                // Rounding can leave a zero below zero; `max` would swallow a NaN.
                se: if variance < 0.0 { 0.0 } else { variance.sqrt() },
            },
            correlation: covariance / (nll.se * base_nll.se),
            ln_ratio: Estimate::of_mean(
                positions
                    .iter()
                    .map(|position| position.nll - position.base_nll),
            ),
            kld: Estimate::of_mean(kld.iter().copied()),
            dp: Estimate::of_mean(dp.iter().copied()),
            same_top: positions
                .iter()
                .filter(|position| position.same_top)
                .count() as f64
                / positions.len() as f64,
            kld_sorted: kld,
            dp_sorted: dp,
        }
    }
}

/// The comparison of a model with its base.
pub struct Divergence {
    /// The base's perplexity on the same tokens.
    pub base: Estimate,
    /// PPL − PPL of the base; the error is propagated to first order, their covariance included.
    pub ppl_difference: Estimate,
    /// Correlation of the two mean NLLs, which is that of ln PPL and ln PPL of the base; NaN
    /// where either does not vary.
    pub correlation: f64,
    /// Mean of ln(PPL / PPL of the base), with the error of paired differences.
    pub ln_ratio: Estimate,
    /// KL(base ‖ model), in nats.
    pub kld: Estimate,
    /// Mean change of the true token's probability.
    pub dp: Estimate,
    /// Share of positions at which both rank the same token first.
    pub same_top: f64,
    kld_sorted: Vec<f64>,
    dp_sorted: Vec<f64>,
}

impl Divergence {
    /// PPL / PPL of the base.
    pub fn ppl_ratio(&self) -> Estimate {
        self.ln_ratio.exp()
    }

    /// The root of the mean of Δp², and its error: that of the mean, propagated through the root.
    pub fn dp_rms(&self) -> Estimate {
        let mean = Estimate::of_mean(self.dp_sorted.iter().map(|dp| dp * dp));
        let rms = mean.value.sqrt();
        Estimate {
            value: rms,
            se: mean.se / (2.0 * rms),
        }
    }

    /// The share of positions at which both rank the same token first, with the error of a
    /// share, `√(p · (1 − p) / (n − 1))`.
    pub fn same_top_estimate(&self) -> Estimate {
        let (share, n) = (self.same_top, self.dp_sorted.len() as f64);
        Estimate {
            value: share,
            se: (share * (1.0 - share) / (n - 1.0)).sqrt(),
        }
    }

    /// The divergence that the share `fraction` of positions stays below.
    pub fn kld_percentile(&self, fraction: f64) -> f64 {
        percentile(&self.kld_sorted, fraction)
    }

    /// The change of probability that the share `fraction` of positions stays below.
    pub fn dp_percentile(&self, fraction: f64) -> f64 {
        percentile(&self.dp_sorted, fraction)
    }
}

impl Divergence {
    /// The figures under the names that `fewbit perplexity --json` prints.
    pub fn to_json(&self) -> serde_json::Map<String, serde_json::Value> {
        let figures = [
            ("ppl_base", self.base.value),
            ("ln_ratio", self.ln_ratio.value),
            ("ln_ratio_se", self.ln_ratio.se),
            ("kld_mean", self.kld.value),
            ("kld_se", self.kld.se),
            ("kld_median", self.kld_percentile(0.5)),
            ("kld_p99", self.kld_percentile(0.99)),
            ("kld_p999", self.kld_percentile(0.999)),
            ("kld_max", self.kld_percentile(1.0)),
            ("dp_mean", self.dp.value),
            ("dp_rms", self.dp_rms().value),
            ("same_top", self.same_top),
        ];
        figures
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect()
    }
}

/// A value with its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Its standard error.
    pub se: f64,
}

impl Estimate {
    /// The mean of `values` (not empty) and its standard error, `sd / √(n − 1)`.
    pub fn of_mean(values: impl Iterator<Item = f64> + Clone) -> Self {
        let n = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / n;
        let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / n;
        Self {
            value: mean,
            se: if n > 1.0 {
                (variance / (n - 1.0)).sqrt()
            } else {
                f64::NAN
            },
        }
    }

    /// `exp` of the value, the error propagated to first order.
    fn exp(self) -> Self {
        let value = self.value.exp();
        Self {
            value,
            se: value * self.se,
        }
    }
}

fn perplexity(nll: impl Iterator<Item = f64> + Clone) -> Estimate {
    Estimate::of_mean(nll).exp()
}

/// Linear interpolation between the sorted values around `fraction · (n − 1)`.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let at = fraction.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// A row of logits with what turns them into log-probabilities.
struct LogSoftmax<'a> {
    logits: &'a [f32],
    /// ln Σ exp(logit).
    log_sum: f64,
    /// The most likely token.
    top: usize,
}

impl<'a> LogSoftmax<'a> {
    fn of(logits: &'a [f32]) -> Self {
        let top = (0..logits.len()).fold(0, |top, i| if logits[i] > logits[top] { i } else { top });
        let max = f64::from(logits[top]);
        let sum: f64 = logits
            .iter()
            .map(|&logit| f64::from((logit - logits[top]).exp()))
            .sum();
        Self {
            logits,
            log_sum: max + sum.ln(),
            top,
        }
    }

    /// ln of the probability of `token`.
    fn of_token(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }

    /// `Σ p · (ln p − ln q)` for `p` of `self` and `q` of `other`.
    fn divergence(&self, other: &Self) -> f64 {
        let shift = self.log_sum - other.log_sum;
        let terms = self.logits.iter().zip(other.logits).map(|(&p, &q)| {
            let log_p = f64::from(p) - self.log_sum;
            f64::from((log_p as f32).exp()) * (f64::from(p) - f64::from(q) - shift)
        });
        terms.sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_diverge_by_nothing_even_when_shifted() {
        let a: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin() * 5.0).collect();
        let b: Vec<f32> = a.iter().map(|x| x + 3.0).collect();
        assert!(LogSoftmax::of(&a).divergence(&LogSoftmax::of(&b)).abs() < 1e-6);
    }

    #[test]
    fn divergence_of_two_coins() {
        let coin = |p: f32| [p.ln(), (1.0 - p).ln()];
        let (fair, biased) = (coin(0.5), coin(0.9));
        let expected = 0.5 * (0.5f64 / 0.9).ln() + 0.5 * (0.5f64 / 0.1).ln();
        let found = LogSoftmax::of(&fair).divergence(&LogSoftmax::of(&biased));
        assert!(
            (found - expected).abs() < 1e-6,
            "{found} instead of {expected}"
        );
    }

    #[test]
    fn perplexity_of_a_fair_die_is_its_sides() {
        let mut tally = Tally::default();
        let die = Scored {
            logits: vec![1.5; 6 * 4],
            targets: &[0, 3, 5, 2],
        };
        tally.add(&Pool::new(1).unwrap(), &die, Some(&die));
        let ppl = tally.perplexity();
        assert!(
            (ppl.value - 6.0).abs() < 1e-6 && ppl.se.abs() < 1e-6,
            "{ppl:?}"
        );
        let divergence = tally.divergence();
        assert_eq!((divergence.same_top, tally.tokens()), (1.0, 4));
        assert!(divergence.kld_percentile(1.0).abs() < 1e-6);
    }

    #[test]
    fn the_standard_error_is_the_mean_s() {
        let estimate = Estimate::of_mean([1.0, 2.0, 3.0, 4.0].into_iter());
        assert!((estimate.value - 2.5).abs() < 1e-12);
        assert!((estimate.se - (1.25f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn percentiles_interpolate() {
        assert_eq!(percentile(&[0.0, 1.0, 2.0, 3.0, 4.0], 0.5), 2.0);
        assert_eq!(percentile(&[0.0, 10.0], 0.25), 2.5);
    }
}
