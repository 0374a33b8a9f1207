//! From logits to a token.
//!
//! First what must not come is ruled out (biases, a constraint), then the steps that [`Settings::samplers`] names are
//! taken in its order, each on what the one before it has left; the token is drawn from the rest. Temperature 0 is
//! greedy: the most likely token after the penalties, the lowest id among equals.

mod pool;
mod repetition;
mod settings;

use std::collections::HashSet;

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

pub use settings::{Error, Settings, Step, rule};

use crate::tokenizer::Tokenizer;
use pool::{Candidate, Pool, probabilities};
use repetition::{continuations, counts};

/// What must hold for a text, whatever the model finds likely: a grammar.
pub trait Constraint: Send {
    /// Makes the scores (one a token) of all tokens that cannot come next negative infinity.
    fn rule_out(&mut self, scores: &mut [f32]);

    /// The token that was chosen.
    fn accept(&mut self, token: u32);
}

/// How far a sampler has come in its seed's sequence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Words of 32 bits that were drawn.
    word: u64,
    /// Where Mirostat cuts.
    mu: f32,
}

/// Draws tokens; the same settings and logits give the same tokens.
pub struct Sampler {
    settings: Settings,
    rng: ChaCha8Rng,
    constraint: Option<Box<dyn Constraint>>,
    /// Tokens across which no repetition goes.
    breakers: HashSet<u32>,
    /// Bits of surprise beyond which Mirostat cuts.
    mu: f32,
    pool: Pool,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence. Repetitions go across all tokens, since what they say is not
    /// known.
    pub fn new(settings: Settings) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(settings.seed),
            constraint: None,
            breakers: HashSet::new(),
            mu: 2.0 * settings.mirostat_tau,
            pool: Pool::default(),
            settings,
        }
    }

    /// The same for texts of a vocabulary, in which repetitions break as
    /// [`Settings::dry_sequence_breakers`] says.
    pub fn with_vocabulary(mut self, tokenizer: &Tokenizer) -> Self {
        if self.settings.dry_multiplier > 0.0 {
            let breakers = &self.settings.dry_sequence_breakers;
            let breaks = |&token: &u32| {
                let text = String::from_utf8_lossy(tokenizer.token_bytes(token));
                breakers
                    .iter()
                    .any(|breaker| !breaker.is_empty() && text.contains(&breaker[..]))
            };
            self.breakers = (0..tokenizer.vocab_len() as u32).filter(breaks).collect();
        }
        self
    }

    /// The same under a constraint.
    pub fn with_constraint(mut self, constraint: Option<Box<dyn Constraint>>) -> Self {
        self.constrain(constraint);
        self
    }

    /// From now on, another constraint or none.
    pub fn constrain(&mut self, constraint: Option<Box<dyn Constraint>>) {
        self.constraint = constraint;
    }

    /// How it chooses.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// From now on it chooses otherwise, and draws on from where it is unless the seed is another.
    pub fn change(&mut self, settings: Settings, tokenizer: &Tokenizer) {
        let constraint = self.constraint.take();
        let position = (settings.seed == self.settings.seed).then(|| Position {
            mu: match settings.mirostat_tau == self.settings.mirostat_tau {
                true => self.mu,
                false => 2.0 * settings.mirostat_tau,
            },
            ..self.position()
        });
        *self = Self::new(settings)
            .with_vocabulary(tokenizer)
            .with_constraint(constraint);
        if let Some(position) = position {
            self.go_to(position);
        }
    }

    /// How far it has come.
    pub fn position(&self) -> Position {
        let word = self.rng.get_word_pos() as u64;
        Position { word, mu: self.mu }
    }

    /// Goes on where a sampler of the same settings was.
    pub fn go_to(&mut self, position: Position) {
        self.rng.set_word_pos(position.word.into());
        self.mu = position.mu;
    }

    /// Chooses the next token from `logits` (one a vocabulary entry, not empty), `history`
    /// being the tokens so far.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        self.pool.fill(logits);
        let bias = self.settings.logit_bias.iter().copied();
        self.pool.adjust(bias, |score, bias| score + bias);
        if let Some(constraint) = &mut self.constraint {
            constraint.rule_out(self.pool.scores());
        }
        let token = match self.settings.temperature > 0.0 {
            true => self.draw(history),
            false => {
                for step in self.settings.samplers.clone() {
                    self.penalise(step, history);
                }
                self.pool.best_token()
            }
        };
        // Token 0 where there is no number at all.
        let token = token.unwrap_or(0);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token);
        }
        token
    }

    fn draw(&mut self, history: &[u32]) -> Option<u32> {
        let mirostat = self.settings.mirostat == 2;
        for step in self.settings.samplers.clone() {
            self.penalise(step, history);
            if !mirostat || step == Step::Temperature {
                self.cut(step);
            }
        }
        if mirostat {
            return self.draw_by_surprise();
        }
        let list = self.pool.list();
        Some(list[pick(&mut self.rng, &probabilities(list))?].token)
    }

    /// The steps that change scores by what stood before.
    fn penalise(&mut self, step: Step, history: &[u32]) {
        let settings = &self.settings;
        match step {
            Step::Penalties => {
                let (repeat, each, once) = (
                    settings.repeat_penalty,
                    settings.frequency_penalty,
                    settings.presence_penalty,
                );
                if (repeat, each, once) == (1.0, 0.0, 0.0) {
                    return;
                }
                let counts = counts(history, settings.repeat_last);
                let counts = counts
                    .into_iter()
                    .map(|(token, count)| (token, count as f32));
                self.pool.adjust(counts, |score, count| {
                    let score = if score > 0.0 {
                        score / repeat
                    } else {
                        score * repeat
                    };
                    score - count * each - once
                });
            }
            Step::Dry if settings.dry_multiplier > 0.0 => {
                let recent = &history[history.len().saturating_sub(settings.dry_last)..];
                let allowed = settings.dry_allowed_length;
                let breaks = |token: u32| self.breakers.contains(&token);
                let found = continuations(recent, allowed, breaks).into_iter();
                let (strength, base) = (settings.dry_multiplier, settings.dry_base);
                let penalty = |length: usize| {
                    let penalty = strength * base.powi((length - allowed.min(length)) as i32);
                    penalty.min(f32::MAX)
                };
                let penalties = found.map(|(token, length)| (token, penalty(length)));
                self.pool
                    .adjust(penalties, |score, penalty| score - penalty);
            }
            _ => {}
        }
    }

    /// The steps that leave tokens out, and the temperature.
    fn cut(&mut self, step: Step) {
        let (pool, settings) = (&mut self.pool, &self.settings);
        match step {
            Step::Penalties | Step::Dry => {}
            Step::Temperature => {
                let temperature = settings.temperature;
                pool.scale(|score| score / temperature);
            }
            Step::TopNSigma => {
                if settings.top_n_sigma > 0.0 {
                    let least = pool.best() - settings.top_n_sigma * pool.deviation();
                    pool.keep(0, least);
                }
            }
            Step::TopK => {
                if settings.top_k > 0 {
                    pool.keep(settings.top_k, f32::NEG_INFINITY);
                }
            }
            Step::MinP => {
                if settings.min_p > 0.0 {
                    let best = pool.best();
                    pool.keep(0, best + settings.min_p.ln());
                }
            }
            Step::TopP => {
                if settings.top_p < 1.0 {
                    let list = pool.list();
                    let head = reaching(probabilities(list).into_iter(), settings.top_p);
                    list.truncate(head);
                }
            }
            Step::Typical => {
                if settings.typical_p < 1.0 {
                    keep_typical(pool.list(), settings.typical_p);
                }
            }
            Step::Xtc => {
                let (chance, threshold) = (settings.xtc_probability, settings.xtc_threshold);
                if chance > 0.0 && threshold <= 0.5 && self.rng.random::<f32>() < chance {
                    let list = pool.list();
                    let likely = probabilities(list)
                        .into_iter()
                        .take_while(|&p| p >= f64::from(threshold));
                    let likely = likely.count();
                    list.drain(..likely.saturating_sub(1));
                }
            }
        }
    }

    /// Mirostat 2: leaves out what is more surprising than `mu`, draws, and moves `mu` towards the surprise wanted.
    fn draw_by_surprise(&mut self) -> Option<u32> {
        let list = self.pool.list();
        let surprise = |p: f64| -p.log2() as f32;
        let mu = self.mu;
        let probable = probabilities(list);
        let head = probable
            .into_iter()
            .take_while(|&p| surprise(p) <= mu)
            .count();
        list.truncate(head.max(1));
        let left = probabilities(list);
        let index = pick(&mut self.rng, &left)?;
        let error = surprise(left[index]) - self.settings.mirostat_tau;
        self.mu -= self.settings.mirostat_eta * error;
        Some(list[index].token)
    }
}

/// The length of the shortest head of `probabilities` that reaches `p`, at least one.
fn reaching(probabilities: impl ExactSizeIterator<Item = f64>, p: f32) -> usize {
    let all = probabilities.len();
    let mut sum = 0.0;
    let last = { probabilities }.position(|probability| {
        sum += probability;
        sum >= f64::from(p)
    });
    last.map_or(all, |last| last + 1)
}

/// Keeps the tokens whose surprise is nearest to the expected one, as many as reach the probability `p`.
fn keep_typical(list: &mut Vec<Candidate>, p: f32) {
    let probabilities = probabilities(list);
    let surprise = |p: f64| -p.ln();
    let possible = probabilities.iter().filter(|&&p| p > 0.0);
    let expected: f64 = possible.map(|&p| p * surprise(p)).sum();
    let mut nearest: Vec<usize> = (0..list.len()).collect();
    let distance = |&index: &usize| (surprise(probabilities[index]) - expected).abs();
    nearest.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
    let shares = nearest.iter().map(|&index| probabilities[index]);
    nearest.truncate(reaching(shares.collect::<Vec<_>>().into_iter(), p));
    // Best first again.
    nearest.sort_unstable();
    *list = nearest.into_iter().map(|index| list[index]).collect();
}

/// Draws an index, each as often as its probability says.
fn pick(rng: &mut ChaCha8Rng, probabilities: &[f64]) -> Option<usize> {
    let mut left = rng.random::<f64>() * probabilities.iter().sum::<f64>();
    for (index, probability) in probabilities.iter().enumerate() {
        left -= probability;
        if left < 0.0 {
            return Some(index);
        }
    }
    // What rounding leaves belongs to the best.
    (!probabilities.is_empty()).then_some(0)
}

#[cfg(test)]
mod tests;
