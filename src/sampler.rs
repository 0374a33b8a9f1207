//! From logits to a token.
//!
//! The steps stand in llama.cpp's order: repetition penalty, top-k, top-p, min-p, temperature,
//! draw. Temperature 0 is greedy: the most likely token, the lowest id among equals.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

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
    /// Scratch: the logits under the penalty.
    penalised: Vec<f32>,
    /// Scratch: the likely tokens, best first.
    candidates: Vec<Candidate>,
}

/// A token that may be drawn, with its logit.
#[derive(Clone, Copy)]
struct Candidate {
    token: u32,
    score: f32,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    pub fn new(settings: Settings) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(settings.seed);
        Self {
            settings,
            rng,
            penalised: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Chooses the next token from `logits` (one a vocabulary entry, not empty), `history`
    /// being the tokens so far.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let settings = &self.settings;
        let recent = &history[history.len().saturating_sub(settings.repeat_last)..];
        let logits = match settings.repeat_penalty != 1.0 && !recent.is_empty() {
            true => {
                self.penalised.clear();
                self.penalised.extend_from_slice(logits);
                penalise(&mut self.penalised, recent, settings.repeat_penalty);
                &self.penalised[..]
            }
            false => logits,
        };
        let max = max(logits);
        if settings.temperature <= 0.0 || max == f32::NEG_INFINITY {
            // The lowest id among equals; token 0 where there is no number at all.
            let best = logits.iter().position(|&logit| logit == max);
            return best.unwrap_or(0) as u32;
        }
        let pool = &mut self.candidates;
        // What min-p cuts off needs no sorting, unless it counts in top-p's total.
        let least = match settings.top_p >= 1.0 {
            true => least_of(settings.min_p, max),
            false => f32::NEG_INFINITY,
        };
        keep_top_k(pool, logits, settings.top_k, least);
        keep_top_p(pool, settings.top_p);
        keep_min_p(pool, settings.min_p);
        let weight =
            |candidate: &Candidate| f64::from((candidate.score - max) / settings.temperature).exp();
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

/// Makes each token of `recent` less likely, once however often it stands there.
fn penalise(logits: &mut [f32], recent: &[u32], penalty: f32) {
    let mut seen: Vec<u32> = recent.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = match *logit > 0.0 {
                true => *logit / penalty,
                false => *logit * penalty,
            };
        }
    }
}

/// The highest logit; NaN counts for nothing.
fn max(logits: &[f32]) -> f32 {
    // Several maxima side by side: a vocabulary is long, and one alone waits for itself.
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

/// Fills the pool with the `k` best tokens (all for 0), best first, those below `least` left out;
/// of equals the lower id comes first.
fn keep_top_k(pool: &mut Vec<Candidate>, logits: &[f32], k: usize, least: f32) {
    let order = |a: &Candidate, b: &Candidate| {
        (b.score.partial_cmp(&a.score))
            .expect("a NaN is no candidate")
            .then(a.token.cmp(&b.token))
    };
    pool.clear();
    // The pool may grow to twice `k`; then the worse half goes, and only what beats the worst
    // that is left can still come in: an equal one has a higher id.
    let mut enough = f32::NEG_INFINITY;
    let mut full = false;
    for (token, &score) in (0..).zip(logits) {
        if score.is_nan() || score < least || (full && score <= enough) {
            continue;
        }
        pool.push(Candidate { token, score });
        if k > 0 && pool.len() == k.saturating_mul(2) {
            pool.select_nth_unstable_by(k - 1, order);
            pool.truncate(k);
            (full, enough) = (true, pool[k - 1].score);
        }
    }
    pool.sort_unstable_by(order);
    if k > 0 {
        pool.truncate(k);
    }
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
    let least = least_of(p, pool[0].score);
    let keep = pool.iter().take_while(|candidate| candidate.score >= least);
    let keep = keep.count().max(1);
    pool.truncate(keep);
}

/// The logit of a token that is `p` times as likely as one whose logit is `best`.
fn least_of(p: f32, best: f32) -> f32 {
    match p > 0.0 {
        true => best + p.min(1.0).ln(),
        false => f32::NEG_INFINITY,
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

    /// The steps as they are defined: everything sorted first.
    fn likely(settings: &Settings, logits: &[f32]) -> Vec<u32> {
        let mut pool: Vec<Candidate> = (0..)
            .zip(logits)
            .map(|(token, &score)| Candidate { token, score })
            .filter(|candidate| !candidate.score.is_nan())
            .collect();
        pool.sort_by(|a, b| b.score.partial_cmp(&a.score).unwrap());
        let k = settings.top_k;
        pool.truncate(if k == 0 { pool.len() } else { k });
        keep_top_p(&mut pool, settings.top_p);
        keep_min_p(&mut pool, settings.min_p);
        pool.iter().map(|candidate| candidate.token).collect()
    }

    #[test]
    fn the_likely_tokens_are_those_of_a_full_sort() {
        // With ties, infinities and a NaN.
        let mut logits: Vec<f32> = (0..3000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 200.0)
            .collect();
        (logits[7], logits[100], logits[1500]) = (f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY);
        for top_k in [0, 1, 2, 40, 1000, 2999, 3000, 5000] {
            for (top_p, min_p) in [
                (1.0, 0.0),
                (0.9, 0.0),
                (1.0, 0.05),
                (0.95, 0.05),
                (1.0, 1.0),
            ] {
                let settings = Settings {
                    top_k,
                    top_p,
                    min_p,
                    ..Settings::default()
                };
                let mut sampler = Sampler::new(settings.clone());
                sampler.sample(&logits, &[]);
                let pool = &sampler.candidates;
                let found: Vec<u32> = pool.iter().map(|candidate| candidate.token).collect();
                assert_eq!(found, likely(&settings, &logits), "{settings:?}");
            }
        }
    }
}
