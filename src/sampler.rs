//! From logits to a token.
//!
//! The steps stand in llama.cpp's order: repetition penalty, top-k, top-p, min-p, temperature,
//! draw. Temperature 0 is greedy: the most likely token, the lowest id among equals.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::engine::{Error, Session};

/// How to choose among the likely tokens.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the `k` most likely tokens are drawn from; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the best one; 0 for all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 for none.
    pub repeat_penalty: f32,
    /// How many recent tokens the penalty looks at.
    pub repeat_last: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Settings {
    /// llama.cpp's defaults, the penalty off.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last: 64,
            seed: 0,
        }
    }
}

impl Settings {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }
}

/// Draws tokens; the same settings and logits give the same tokens.
pub struct Sampler {
    settings: Settings,
    rng: ChaCha8Rng,
    candidates: Vec<Candidate>,
}

/// A token that may be drawn.
#[derive(Clone, Copy)]
struct Candidate {
    token: u32,
    /// The logit; from top-p on a probability up to a common factor.
    score: f32,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    pub fn new(settings: Settings) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(settings.seed);
        Self {
            settings,
            rng,
            candidates: Vec::new(),
        }
    }

    /// Chooses the next token from `logits` (one a vocabulary entry, not empty), `history`
    /// being the tokens so far.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let settings = &self.settings;
        let pool = &mut self.candidates;
        pool.clear();
        pool.extend(
            (0..)
                .zip(logits)
                .map(|(token, &score)| Candidate { token, score }),
        );
        let recent = &history[history.len().saturating_sub(settings.repeat_last)..];
        penalise(pool, recent, settings.repeat_penalty);
        if settings.temperature <= 0.0 {
            return best(pool);
        }
        keep_top_k(pool, settings.top_k);
        keep_top_p(pool, settings.top_p);
        keep_min_p(pool, settings.min_p);
        let best = pool[0].score;
        let weight = |candidate: &Candidate| {
            f64::from((candidate.score - best) / settings.temperature).exp()
        };
        let total: f64 = pool
            .iter()
            .map(weight)
            .filter(|weight| weight.is_finite())
            .sum();
        let mut left = self.rng.random::<f64>() * total;
        for candidate in pool.iter() {
            left -= weight(candidate);
            if left < 0.0 {
                return candidate.token;
            }
        }
        pool[0].token
    }
}

/// The tokens that follow what a session holds, up to a token that ends the text (which is not
/// yielded) or a limit. Each is fed to the session when the next one is asked for.
pub struct Generation<'a> {
    session: &'a mut Session,
    sampler: &'a mut Sampler,
    left: usize,
    pending: Option<u32>,
}

impl<'a> Generation<'a> {
    /// At most `limit` tokens after what `session` holds; it must have been fed before.
    pub fn new(session: &'a mut Session, sampler: &'a mut Sampler, limit: usize) -> Self {
        Self {
            session,
            sampler,
            left: limit,
            pending: None,
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        if let Some(token) = self.pending.take()
            && let Err(error) = self.session.step(token)
        {
            self.left = 0;
            return Some(Err(error));
        }
        let token = self
            .sampler
            .sample(self.session.logits(), self.session.tokens());
        if self.session.engine().tokenizer().is_end(token) {
            self.left = 0;
            return None;
        }
        self.pending = Some(token);
        Some(Ok(token))
    }
}

/// Makes each token of `recent` less likely, once however often it stands there.
fn penalise(pool: &mut [Candidate], recent: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut seen: Vec<u32> = recent.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(candidate) = pool.get_mut(token as usize) {
            candidate.score = if candidate.score > 0.0 {
                candidate.score / penalty
            } else {
                candidate.score * penalty
            };
        }
    }
}

/// The highest score; among equals the lowest id. A NaN never wins.
fn best(pool: &[Candidate]) -> u32 {
    let mut best = pool[0];
    for &candidate in &pool[1..] {
        if candidate.score > best.score || best.score.is_nan() {
            best = candidate;
        }
    }
    best.token
}

/// Sorts by score, best first, and keeps the first `k` (all for 0).
fn keep_top_k(pool: &mut Vec<Candidate>, k: usize) {
    pool.retain(|candidate| !candidate.score.is_nan());
    if pool.is_empty() {
        pool.push(Candidate {
            token: 0,
            score: 0.0,
        });
    }
    let order =
        |a: &Candidate, b: &Candidate| b.score.total_cmp(&a.score).then(a.token.cmp(&b.token));
    if k > 0 && k < pool.len() {
        pool.select_nth_unstable_by(k - 1, order);
        pool.truncate(k);
    }
    pool.sort_unstable_by(order);
}

/// Keeps the shortest head of the sorted pool whose probabilities reach `p`, at least one.
fn keep_top_p(pool: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    let best = pool[0].score;
    let total: f32 = pool
        .iter()
        .map(|candidate| (candidate.score - best).exp())
        .sum();
    let mut sum = 0.0;
    let enough = pool.iter().position(|candidate| {
        sum += (candidate.score - best).exp() / total;
        sum >= p
    });
    pool.truncate(enough.map_or(pool.len(), |last| last + 1));
}

/// Keeps what is at least `p` times as likely as the best.
fn keep_min_p(pool: &mut Vec<Candidate>, p: f32) {
    if p > 0.0 {
        let least = pool[0].score + p.min(1.0).ln();
        let keep = pool
            .iter()
            .take_while(|candidate| candidate.score >= least)
            .count();
        pool.truncate(keep.max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each of the tokens is drawn in 10,000 draws.
    fn shares(settings: Settings, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(settings);
        let mut counts = vec![0; logits.len()];
        for _ in 0..10_000 {
            counts[sampler.sample(logits, &[]) as usize] += 1;
        }
        counts
            .into_iter()
            .map(|count| f64::from(count) / 10_000.0)
            .collect()
    }

    fn plain() -> Settings {
        Settings {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..Settings::default()
        }
    }

    #[test]
    fn greedy_takes_the_best_and_the_lowest_of_equals() {
        let mut sampler = Sampler::new(Settings::greedy());
        assert_eq!(sampler.sample(&[0.0, 2.0, 1.0, 2.0], &[]), 1);
        assert_eq!(sampler.sample(&[f32::NAN, -1.0, -2.0], &[]), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()];
        for (share, expected) in shares(plain(), &logits).iter().zip([0.6, 0.3, 0.1]) {
            assert!(
                (share - expected).abs() < 0.02,
                "{share} instead of {expected}"
            );
        }
    }

    #[test]
    fn temperature_sharpens() {
        let logits = [0.6f32.ln(), 0.4f32.ln()];
        let cool = shares(
            Settings {
                temperature: 0.5,
                ..plain()
            },
            &logits,
        );
        assert!((cool[0] - 0.36 / 0.52).abs() < 0.02, "{cool:?}");
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        for settings in [
            Settings {
                top_k: 2,
                ..plain()
            },
            Settings {
                top_p: 0.75,
                ..plain()
            },
            Settings {
                min_p: 0.4,
                ..plain()
            },
        ] {
            let shares = shares(settings.clone(), &logits);
            assert!(
                shares[1] > 0.3 && shares[2] == 0.0 && shares[3] == 0.0,
                "{settings:?}: {shares:?}"
            );
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(Settings {
                seed,
                ..Settings::default()
            });
            (0..50)
                .map(|_| sampler.sample(&logits, &[]))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn the_penalty_makes_recent_tokens_less_likely() {
        let settings = Settings {
            repeat_penalty: 1.5,
            repeat_last: 2,
            ..Settings::greedy()
        };
        let mut sampler = Sampler::new(settings);
        assert_eq!(sampler.sample(&[1.0, 1.2], &[1]), 0);
        assert_eq!(
            sampler.sample(&[1.0, 1.2], &[1, 0, 0]),
            1,
            "the 1 lies too far back"
        );
    }

    #[test]
    fn nothing_but_nan_still_gives_a_token() {
        let mut sampler = Sampler::new(Settings::default());
        assert_eq!(sampler.sample(&[f32::NAN, f32::NAN], &[]), 0);
    }
}
