//! Which expert gives up its slot.
//!
//! A pass takes the layers in turn, so that time is counted in layers: an expert of the layer that
//! comes next is needed sooner than one of the layer that has just been. LRU does not see that, and
//! gives up what is about to be needed. The share of needed experts that were in memory, as
//! `fewbit experts replay` counts it:
//!
//! | routing of                                        | slots      | LRU | LFU | least stale | next use | static | Belady |
//! |---------------------------------------------------|------------|-----|-----|-------------|----------|--------|--------|
//! | SmolLM2 upcycled to experts, 300 tokens           | 60 of 240  | 55  | 66  | 55          | 69       | 76     | 77     |
//! | the fixture, 36 tokens                            | 16 of 24   | 94  | 95  | 94          | 95       | 97     | 98     |
//! | chance, even (32 layers, 300 tokens)              | 107 of 256 | 26  | 41  | 41          | 42       | 46     | 71     |
//! | the same                                          | 205 of 256 | 77  | 79  | 80          | 79       | 83     | 93     |
//! | chance, Zipf 1 and 40 % repeats from the last token | 107 of 256 | 67  | 65  | 71          | 65       | 67     | 85     |
//! | the same                                          | 205 of 256 | 91  | 91  | 90          | 91       | 92     | 97     |
//!
//! Static and Belady know what comes. Next use is the default: it wins on what trained routers do, and where chance is even
//! it is as good as can be without foresight. It loses where repeats are all there is to know: giving the
//! last token's experts more weight wins 10 points there and loses 13 on the first row.

/// How the expert that goes is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// The one whose last use is longest ago.
    Lru,
    /// The one that was used least, uses counting less as they grow old.
    Lfu,
    /// One that this pass has not used, of the layer that comes last from here; those first that the
    /// last pass has not used either.
    LeastStale,
    /// The one whose next use is expected last: from how often it was used, and from when its layer comes.
    #[default]
    NextUse,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lru, Self::Lfu, Self::LeastStale, Self::NextUse];

    /// What `fewbit experts replay` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::LeastStale => "least-stale",
            Self::NextUse => "next-use",
        }
    }
}

/// What a use counts for a pass later.
const DECAY: f64 = 0.98;

/// The memory of a policy: what was used when, and how often.
pub struct Policy {
    kind: Kind,
    layers: usize,
    experts: usize,
    /// Visits of layers so far.
    now: u64,
    /// The visit of the last use of each expert, 0 for never; `[layers][experts]`.
    last: Vec<u64>,
    /// Uses, each [`DECAY`]ed by the visits of its layer since; `[layers][experts]`.
    uses: Vec<f64>,
    /// Visits of each layer, decayed likewise.
    visits: Vec<f64>,
}

impl Policy {
    /// A policy for `layers` times `experts` experts of which nothing is known.
    pub fn new(kind: Kind, layers: usize, experts: usize) -> Self {
        Self {
            kind,
            layers,
            experts,
            now: 0,
            last: vec![0; layers * experts],
            uses: vec![0.0; layers * experts],
            visits: vec![0.0; layers],
        }
    }

    /// A layer uses the experts `active`.
    pub fn visit(&mut self, layer: usize, active: impl IntoIterator<Item = usize>) {
        self.now += 1;
        let own = layer * self.experts..(layer + 1) * self.experts;
        self.uses[own.clone()]
            .iter_mut()
            .for_each(|uses| *uses *= DECAY);
        self.visits[layer] = self.visits[layer] * DECAY + 1.0;
        for expert in active {
            self.last[own.start + expert] = self.now;
            self.uses[own.start + expert] += 1.0;
        }
    }

    /// What an expert is worth keeping while `layer` is visited: the one of least worth goes.
    pub fn worth(&self, layer: usize, expert: usize, visited: usize) -> f64 {
        let id = layer * self.experts + expert;
        // Layers until this one comes: at least one, at most all of them.
        let ahead = (layer + self.layers - visited - 1) % self.layers + 1;
        match self.kind {
            Kind::Lru => self.last[id] as f64,
            Kind::Lfu => self.share(layer, id),
            Kind::LeastStale => {
                let passes = (self.now - self.last[id]) / self.layers as u64;
                -(passes.min(2) as f64 * (self.layers + 1) as f64 + ahead as f64)
            }
            Kind::NextUse => {
                let passes = 1.0 / self.share(layer, id) - 1.0;
                -(ahead as f64 + passes * self.layers as f64)
            }
        }
    }

    /// The share of its layer's visits that uses an expert: above 0, since nothing is certain.
    fn share(&self, layer: usize, id: usize) -> f64 {
        const DOUBT: f64 = 0.25;
        (self.uses[id] + DOUBT) / (self.visits[layer] + 4.0 * DOUBT)
    }
}
