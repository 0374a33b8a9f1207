//! Which expert gives up its slot.
//!
//! A pass takes the layers in turn, so that time is counted in layers: an expert of the layer that
//! comes next is needed sooner than one of the layer that has just been. LRU does not see that, and
//! gives up what is about to be needed. The share of needed experts that were in memory, as
//! `fewbit experts replay` counts it on traces of `fewbit run --trace-experts` (answers of up to 300 tokens, drawn at a
//! temperature of 0.8) and of `fewbit experts generate` (32 layers of 8 experts, 300 tokens, seed 0):
//!
//! | routing of                                            | slots      | LRU | LFU | least stale | next use | static | Belady |
//! |-------------------------------------------------------|------------|-----|-----|-------------|----------|--------|--------|
//! | SmolLM2 upcycled to experts (`make bed`, Q8_0), a history | 60 of 240  | 59  | 65  | 59          | 65       | 67     | 76     |
//! | the same                                              | 100 of 240 | 77  | 84  | 79          | 85       | 85     | 91     |
//! | the same, a letter                                    | 100 of 240 | 76  | 83  | 79          | 84       | 85     | 91     |
//! | the fixture (Q8_0)                                    | 10 of 24   | 65  | 72  | 67          | 72       | 77     | 84     |
//! | `synth mixtral-8x7b`, 60 tokens                       | 101 of 256 | 25  | 39  | 39          | 39       | 49     | 68     |
//! | the same                                              | 205 of 256 | 77  | 80  | 80          | 81       | 87     | 92     |
//! | chance, even                                          | 107 of 256 | 26  | 40  | 41          | 41       | 45     | 70     |
//! | the same                                              | 205 of 256 | 76  | 78  | 79          | 79       | 83     | 93     |
//! | chance, `--zipf 1`                                    | 107 of 256 | 51  | 65  | 55          | 65       | 68     | 78     |
//! | the same                                              | 205 of 256 | 87  | 89  | 85          | 89       | 92     | 95     |
//! | chance, `--repeats 0.4`                               | 107 of 256 | 60  | 45  | 63          | 61       | 48     | 80     |
//! | chance, `--zipf 1 --repeats 0.4`                      | 107 of 256 | 67  | 64  | 70          | 72       | 66     | 85     |
//! | the same                                              | 205 of 256 | 91  | 90  | 90          | 92       | 92     | 97     |
//!
//! Static and Belady know what comes. Next use is the default: it is the best of the others or within two points of it
//! everywhere, since it learns while it runs both how often an expert is used and how much it means that the last token
//! has used it. (`quant-tests/tests/streaming.rs` repeats the rows by chance.)

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
    /// The one whose next use is expected last: from how often it was used, from whether its layer's last visit
    /// used it and how much that has meant so far, and from when its layer comes.
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
const DECAY: f64 = 0.99;
/// What a repeat counts for a layer later.
const AGING: f64 = 0.9995;

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
    /// The number of each layer's last visit, 0 for none.
    last_visit: Vec<u64>,
    repeats: Repeats,
    /// Uses so far, and visits.
    all_uses: u64,
    all_visits: u64,
}

/// How much more likely than else an expert is used that its layer's last visit has used.
#[derive(Default)]
struct Repeats {
    /// Experts that a visit had used when the next one came; uses grow old by [`AGING`].
    seen: f64,
    /// Of those, the ones that it used again.
    again: f64,
    /// As many as that would be by how often they are used in all.
    by_chance: f64,
}

impl Repeats {
    /// The share of uses that are repeats and no chance, from 0 to 1.
    fn share(&self) -> f64 {
        const FEW: f64 = 20.0;
        let more = (self.again - self.by_chance) / (self.seen - self.by_chance);
        match self.seen > FEW && more.is_finite() {
            true => more.clamp(0.0, 1.0),
            false => 0.0,
        }
    }
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
            last_visit: vec![0; layers],
            repeats: Repeats::default(),
            all_uses: 0,
            all_visits: 0,
        }
    }

    /// A layer uses the experts `active`.
    pub fn visit(&mut self, layer: usize, active: &[usize]) {
        self.count_repeats(layer, active);
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
        self.last_visit[layer] = self.now;
        self.all_uses += active.len() as u64;
        self.all_visits += 1;
    }

    /// Before a visit is entered: what it says of repeats. One that needs most experts says nothing.
    fn count_repeats(&mut self, layer: usize, active: &[usize]) {
        let recent: Vec<usize> = (0..self.experts)
            .filter(|&expert| self.is_recent(layer, layer * self.experts + expert))
            .collect();
        if 2 * active.len().max(recent.len()) > self.experts {
            return;
        }
        let shares = recent.iter().map(|expert| {
            let share = self.share(layer, layer * self.experts + expert);
            share.min(1.0)
        });
        let by_chance: f64 = shares.sum();
        let again = recent.iter().filter(|expert| active.contains(expert));
        let repeats = &mut self.repeats;
        repeats.seen = repeats.seen * AGING + recent.len() as f64;
        repeats.again = repeats.again * AGING + again.count() as f64;
        repeats.by_chance = repeats.by_chance * AGING + by_chance;
    }

    /// Whether its layer's last visit has used an expert.
    fn is_recent(&self, layer: usize, id: usize) -> bool {
        self.last[id] > 0 && self.last[id] == self.last_visit[layer]
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
                let (share, repeats) = (self.share(layer, id), self.repeats.share());
                let by_repeat = if self.is_recent(layer, id) {
                    repeats
                } else {
                    0.0
                };
                let next = (by_repeat + (1.0 - repeats) * share).min(1.0);
                // Passes until the next use: none if that is the next one, else as many as by chance.
                let passes = (1.0 - next) / share;
                -(ahead as f64 + passes * self.layers as f64)
            }
        }
    }

    /// The share of its layer's visits that uses an expert: above 0, since nothing is certain. Until there were some
    /// visits, it is taken to be like any other.
    fn share(&self, layer: usize, id: usize) -> f64 {
        /// Visits that what is usual counts for.
        const DOUBT: f64 = 16.0;
        let usual =
            self.all_uses.max(1) as f64 / (self.all_visits.max(1) * self.experts as u64) as f64;
        (self.uses[id] + DOUBT * usual) / (self.visits[layer] + DOUBT)
    }
}
