//! What layers to come are expected to need, and how far such guesses can be trusted.
//!
//! A guess for the next layer is right nearly always, one for the eighth less often, and the second of a token's
//! experts less often than the first. How much so is the model's affair, and counted while it runs: what has been
//! right often enough is read ahead, and one layer more is guessed, but not read, to see whether it would be.

use std::collections::VecDeque;

/// Layers ahead that are guessed at most. Where most experts are in memory, the next one that is not is several
/// layers away, and the disk must not wait for it.
const FAR: usize = 12;
/// Ranks that are told apart: a token's first expert, its second, and all others.
const RANKS: usize = 3;
/// A guess is read ahead that is right so often. One that is wrong costs time that the disk would have been idle,
/// and a needed read waits at most for the pieces that are under way.
const ENOUGH: f64 = 0.5;
/// What a guess counts for a guess later.
const AGING: f64 = 0.998;

/// An expert that a layer to come is guessed to need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guess {
    /// The expert.
    pub expert: usize,
    /// Its place in the choice of the token that is guessed to take it, 0 for the first.
    pub rank: usize,
}

/// What visits to come are expected to need.
pub(super) struct Ahead {
    /// What is read when there is time, the next layer first.
    expected: VecDeque<Expected>,
    /// Guesses of visits that are still to come.
    open: Vec<Open>,
    trust: [[Trust; RANKS]; FAR],
}

struct Expected {
    layer: usize,
    experts: Vec<usize>,
    /// Whether it is certain.
    certain: bool,
}

/// A guess to be compared.
struct Open {
    layer: usize,
    /// Layers ahead that it was made, less one.
    distance: usize,
    guess: Guess,
}

/// How often guesses of a kind were right.
#[derive(Clone, Copy)]
struct Trust {
    right: f64,
    all: f64,
}

impl Trust {
    /// Until there are some, they are taken to be good.
    const NEW: Self = Self {
        right: 6.0,
        all: 8.0,
    };

    fn add(&mut self, right: bool) {
        self.right = self.right * AGING + f64::from(u8::from(right));
        self.all = self.all * AGING + 1.0;
    }

    fn is_enough(self) -> bool {
        self.right >= ENOUGH * self.all
    }
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self {
            expected: VecDeque::new(),
            open: Vec::new(),
            trust: [[Trust::NEW; RANKS]; FAR],
        }
    }

    /// Layers ahead that guesses are wanted for: those that can be trusted and one more.
    pub(super) fn sight(&self) -> usize {
        let trusted = self.trust.iter().take_while(|ranks| ranks[0].is_enough());
        (trusted.count() + 1).min(FAR)
    }

    /// Nothing is known of what comes.
    pub(super) fn clear(&mut self) {
        self.expected.clear();
        self.open.clear();
    }

    /// A layer will need these experts, for certain.
    pub(super) fn set(&mut self, layer: usize, experts: Vec<usize>) {
        self.clear();
        self.expected.push_back(Expected {
            layer,
            experts,
            certain: true,
        });
    }

    /// The layers from `first` on will probably need such experts, of each layer the most certain ones first. What was
    /// expected before is forgotten.
    pub(super) fn guess(&mut self, first: usize, layers: Vec<Vec<Guess>>) {
        self.expected.clear();
        for (distance, (layer, guesses)) in (first..).zip(layers).enumerate().take(FAR) {
            let trusted = guesses.iter().filter(|guess| {
                let trust = self.trust[distance][guess.rank.min(RANKS - 1)];
                trust.is_enough()
            });
            self.expected.push_back(Expected {
                layer,
                experts: trusted.map(|guess| guess.expert).collect(),
                certain: false,
            });
            let open = guesses.into_iter().map(|guess| Open {
                layer,
                distance,
                guess,
            });
            self.open.extend(open);
        }
    }

    /// A layer needs the experts `active`: what was guessed of it is compared and forgotten. Gives how many experts were
    /// guessed last, and how many of those were right.
    pub(super) fn compare(&mut self, layer: usize, active: &[usize]) -> (usize, usize) {
        let Self { open, trust, .. } = self;
        let (mut guessed, mut right) = (0, 0);
        open.retain(|open| {
            if open.layer != layer {
                return true;
            }
            let is_right = active.contains(&open.guess.expert);
            trust[open.distance][open.guess.rank.min(RANKS - 1)].add(is_right);
            if open.distance == 0 {
                guessed += 1;
                right += usize::from(is_right);
            }
            false
        });
        self.expected.retain(|expected| expected.layer != layer);
        (guessed, right)
    }

    pub(super) fn expects(&self, (layer, expert): (usize, usize)) -> bool {
        let mut expected = self.expected.iter();
        expected.any(|next| next.layer == layer && next.experts.contains(&expert))
    }

    /// Whether what comes next is certain.
    pub(super) fn is_certain(&self) -> bool {
        self.expected.front().is_some_and(|next| next.certain)
    }

    /// The first that is expected and not `there`.
    pub(super) fn next(&self, there: impl Fn((usize, usize)) -> bool) -> Option<(usize, usize)> {
        let all = self.expected.iter().flat_map(|next| {
            let experts = next.experts.iter();
            experts.map(|&expert| (next.layer, expert))
        });
        all.into_iter().find(|&id| !there(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(expert: usize) -> Vec<Guess> {
        vec![Guess { expert, rank: 0 }]
    }

    /// Guesses for the next two layers are right, those for others as `right` says: how far it is guessed after some
    /// visits, and whether what is guessed for the third layer would be read.
    fn after_visits(ahead: &mut Ahead, right: bool) -> (usize, bool) {
        let mut seen = (0, false);
        for layer in 0..2000 {
            let expert = |distance: usize| usize::from(distance >= 2 && !right);
            let sight = ahead.sight();
            ahead.guess(layer, (0..sight).map(|d| first(expert(d))).collect());
            assert!(ahead.expects((layer, 0)) && ahead.expects((layer + 1, 0)));
            seen = (sight, ahead.expects((layer + 2, expert(2))));
            assert_eq!(ahead.compare(layer, &[0]), (1, 1));
        }
        seen
    }

    #[test]
    fn as_far_ahead_as_guesses_are_right() {
        let mut ahead = Ahead::new();
        assert_eq!(ahead.sight(), FAR);
        assert_eq!(after_visits(&mut ahead, false), (3, false));
        // What is guessed and not read shows when it can be trusted again.
        assert_eq!(after_visits(&mut ahead, true), (FAR, true));
    }

    #[test]
    fn the_nearest_layer_and_its_most_certain_expert_come_first() {
        let mut ahead = Ahead::new();
        ahead.guess(3, vec![[first(7), first(1)].concat(), first(2)]);
        assert_eq!(ahead.next(|_| false), Some((3, 7)));
        assert_eq!(ahead.next(|(layer, _)| layer == 3), Some((4, 2)));
        assert!(!ahead.is_certain() && ahead.expects((3, 1)));
        ahead.set(5, vec![0, 1]);
        assert!(ahead.is_certain() && !ahead.expects((3, 1)));
        assert_eq!(ahead.next(|(_, expert)| expert == 0), Some((5, 1)));
        assert_eq!(ahead.compare(5, &[0]), (0, 0));
        assert_eq!(ahead.next(|_| false), None);
    }
}
