//! Routing by chance, to replay where no model of that kind is at hand: uneven as asked for, with repeats from
//! token to token.

use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use super::trace::{Head, Trace};

/// What is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Chance {
    /// Layers.
    pub layers: usize,
    /// Experts a layer.
    pub experts: usize,
    /// Experts that a token takes, at most all of a layer's.
    pub used: usize,
    /// Tokens, one a pass.
    pub tokens: usize,
    /// The expert of rank `r` (each layer ranks its own, by chance) has the weight `r^-zipf`: 0 is even.
    pub zipf: f64,
    /// The share of experts that the next token takes again whatever their weights, from 0 to 1.
    pub repeats: f64,
    /// Equal seeds give equal traces.
    pub seed: u64,
}

impl Chance {
    /// The trace, of experts of so many bytes.
    pub fn trace(&self, expert_bytes: u64) -> Trace {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut layers: Vec<Layer> = (0..self.layers)
            .map(|_| Layer::new(self, &mut rng))
            .collect();
        let mut trace = Trace::new(Head {
            experts: self.experts,
            expert_bytes: vec![expert_bytes; self.layers],
        });
        for _ in 0..self.tokens {
            trace.begin(1, false);
            for layer in &mut layers {
                layer.draw(self, &mut rng);
                trace.layer(&layer.active);
            }
        }
        trace
    }
}

struct Layer {
    weights: Vec<f64>,
    /// Experts of the last token, ascending.
    active: Vec<usize>,
}

impl Layer {
    fn new(chance: &Chance, rng: &mut ChaCha8Rng) -> Self {
        let weight = |rank: usize| (rank as f64).powf(-chance.zipf);
        let mut weights: Vec<f64> = (1..=chance.experts).map(weight).collect();
        weights.shuffle(rng);
        let active = Vec::new();
        Self { weights, active }
    }

    /// The next token's experts: some of the last one's, the others by weight and without a second time.
    fn draw(&mut self, chance: &Chance, rng: &mut ChaCha8Rng) {
        self.active.retain(|_| rng.random_bool(chance.repeats));
        while self.active.len() < chance.used.min(chance.experts) {
            let is_free = |expert: &usize| !self.active.contains(expert);
            let free: Vec<usize> = (0..chance.experts).filter(is_free).collect();
            let total: f64 = free.iter().map(|&expert| self.weights[expert]).sum();
            let mut left = rng.random_range(0.0..1.0) * total;
            let drawn = free.iter().find(|&&expert| {
                left -= self.weights[expert];
                left < 0.0
            });
            self.active.push(*drawn.unwrap_or(&free[free.len() - 1]));
        }
        self.active.sort_unstable();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVEN: Chance = Chance {
        layers: 4,
        experts: 8,
        used: 2,
        tokens: 2000,
        zipf: 0.0,
        repeats: 0.0,
        seed: 1,
    };

    /// The share of uses by rank, and of experts that the next token takes again.
    fn habits(chance: Chance) -> (Vec<f64>, f64) {
        let trace = chance.trace(1);
        let habits = trace.habits();
        (habits.by_rank, habits.repeats)
    }

    #[test]
    fn even_routing_is_even_and_repeats_by_chance() {
        let (by_rank, repeats) = habits(EVEN);
        assert!(
            by_rank.iter().all(|share| (share - 0.125).abs() < 0.02),
            "{by_rank:?}"
        );
        assert!((repeats - 0.25).abs() < 0.02, "{repeats}");
    }

    #[test]
    fn skew_and_repeats_are_what_was_asked_for() {
        // One expert a token: the shares are the weights.
        let zipf = Chance {
            used: 1,
            zipf: 1.0,
            ..EVEN
        };
        let (by_rank, _) = habits(zipf);
        let harmonic: f64 = (1..=8).map(|rank| 1.0 / f64::from(rank)).sum();
        for (rank, share) in (1..).zip(by_rank) {
            assert!(
                (share - 1.0 / (f64::from(rank) * harmonic)).abs() < 0.02,
                "{rank}: {share}"
            );
        }
        let (_, repeats) = habits(Chance {
            used: 1,
            repeats: 0.4,
            ..EVEN
        });
        assert!((repeats - (0.4 + 0.6 / 8.0)).abs() < 0.02, "{repeats}");
    }

    #[test]
    fn equal_seeds_give_equal_traces() {
        let text = |seed| Chance { seed, ..EVEN }.trace(5).to_text().unwrap();
        assert!(text(3) == text(3) && text(3) != text(4));
    }
}
