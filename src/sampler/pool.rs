//! The tokens that may be drawn, fewer with each step.

/// A token that may be drawn, with its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub token: u32,
    pub score: f32,
}

/// All tokens at first; a list, best first, as soon as a step has cut it.
#[derive(Default)]
pub(super) struct Pool {
    /// A score a token, as long as nothing is cut.
    all: Vec<f32>,
    /// Best first; of equals the lower token. Empty as long as nothing is cut.
    cut: Vec<Candidate>,
    is_cut: bool,
}

impl Pool {
    /// All tokens, with these scores; a NaN is no candidate.
    pub fn fill(&mut self, logits: &[f32]) {
        self.all.clear();
        self.all.extend_from_slice(logits);
        self.is_cut = false;
    }

    /// The scores by token, as long as nothing is cut.
    pub fn scores(&mut self) -> &mut [f32] {
        debug_assert!(!self.is_cut);
        &mut self.all
    }

    /// Changes the score of a token, if it is there.
    pub fn adjust(
        &mut self,
        tokens: impl Iterator<Item = (u32, f32)>,
        change: impl Fn(f32, f32) -> f32,
    ) {
        for (token, by) in tokens {
            let score = match self.is_cut {
                false => self.all.get_mut(token as usize),
                true => {
                    let found = self
                        .cut
                        .iter_mut()
                        .find(|candidate| candidate.token == token);
                    found.map(|candidate| &mut candidate.score)
                }
            };
            if let Some(score) = score {
                *score = change(*score, by);
            }
        }
        if self.is_cut {
            self.cut.sort_unstable_by(order);
        }
    }

    /// Changes all scores, none past another.
    pub fn scale(&mut self, change: impl Fn(f32) -> f32) {
        match self.is_cut {
            false => self
                .all
                .iter_mut()
                .for_each(|score| *score = change(*score)),
            true => (self.cut.iter_mut())
                .for_each(|candidate| candidate.score = change(candidate.score)),
        }
    }

    /// The highest score; negative infinity where nothing can be drawn.
    pub fn best(&self) -> f32 {
        match self.is_cut {
            false => max(&self.all),
            true => (self.cut.first()).map_or(f32::NEG_INFINITY, |candidate| candidate.score),
        }
    }

    /// The token with the highest score, the lowest of equals.
    pub fn best_token(&self) -> Option<u32> {
        let best = self.best();
        match self.is_cut {
            true => self.cut.first().map(|candidate| candidate.token),
            false => self
                .all
                .iter()
                .position(|&score| score == best)
                .map(|at| at as u32),
        }
    }

    /// What is left, best first.
    pub fn list(&mut self) -> &mut Vec<Candidate> {
        self.keep(0, f32::NEG_INFINITY);
        &mut self.cut
    }

    /// Keeps the `k` best (all for 0) of those that reach `least`.
    pub fn keep(&mut self, k: usize, least: f32) {
        if self.is_cut {
            let enough = self
                .cut
                .iter()
                .take_while(|candidate| candidate.score >= least);
            let enough = enough.count();
            self.cut
                .truncate(if k > 0 { enough.min(k) } else { enough });
            return;
        }
        self.is_cut = true;
        let pool = &mut self.cut;
        pool.clear();
        // The pool may grow to twice `k`; then the worse half goes, and only what beats the worst
        // that is left can still come in: an equal one has a higher id.
        let mut enough = f32::NEG_INFINITY;
        let mut full = false;
        for (token, &score) in (0..).zip(&self.all) {
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

    /// Mean and standard deviation of the scores that are numbers.
    pub fn deviation(&self) -> f32 {
        let scores = || {
            let (all, cut) = match self.is_cut {
                false => (&self.all[..], &[][..]),
                true => (&[][..], &self.cut[..]),
            };
            let cut = cut.iter().map(|candidate| candidate.score);
            all.iter()
                .copied()
                .chain(cut)
                .filter(|score| score.is_finite())
                .map(f64::from)
        };
        let count = scores().count().max(1) as f64;
        let mean = scores().sum::<f64>() / count;
        let squares: f64 = scores().map(|score| (score - mean).powi(2)).sum();
        (squares / count).sqrt() as f32
    }
}

/// Best first; of equals the lower token.
fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    (b.score.partial_cmp(&a.score))
        .expect("a NaN is no candidate")
        .then(a.token.cmp(&b.token))
}

/// The highest of `scores`; NaN counts for nothing.
fn max(scores: &[f32]) -> f32 {
    // Several maxima side by side: a vocabulary is long, and one alone waits for itself.
    let (chunks, rest) = scores.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, &score) in lanes.iter_mut().zip(chunk) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

/// The probabilities of candidates, best first.
pub(super) fn probabilities(pool: &[Candidate]) -> Vec<f64> {
    let best = pool.first().map_or(0.0, |candidate| candidate.score);
    let weights = pool
        .iter()
        .map(|candidate| f64::from(candidate.score - best).exp());
    // Infinity minus infinity is no number.
    let mut weights: Vec<f64> = weights
        .map(|weight| if weight.is_nan() { 0.0 } else { weight })
        .collect();
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= total);
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_those_of_a_full_sort() {
        // With ties, infinities and a NaN.
        let mut logits: Vec<f32> = (0..3000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 200.0)
            .collect();
        (logits[7], logits[100], logits[1500]) = (f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY);
        let mut sorted: Vec<Candidate> = (0..)
            .zip(&logits)
            .map(|(token, &score)| Candidate { token, score })
            .filter(|candidate| !candidate.score.is_nan())
            .collect();
        sorted.sort_by(|a, b| b.score.partial_cmp(&a.score).unwrap());
        for k in [0, 1, 2, 40, 1000, 2999, 3000, 5000] {
            for least in [f32::NEG_INFINITY, 3.0, 20.0, 30.0] {
                let mut expected = sorted.clone();
                expected.retain(|candidate| candidate.score >= least);
                expected.truncate(if k == 0 { expected.len() } else { k });
                let mut pool = Pool::default();
                pool.fill(&logits);
                pool.keep(k, least);
                assert_eq!(*pool.list(), expected, "{k} {least}");
                // Cut a second time.
                pool.fill(&logits);
                pool.list();
                pool.keep(k, least);
                assert_eq!(*pool.list(), expected, "{k} {least}");
            }
        }
    }
}
