//! Speed as llama-bench measures it, with the machine's limits beside it.
//!
//! - `ppN`: a prompt of N uniformly random tokens into an empty context; the output head runs
//!   for the last token only.
//! - `tgN`: N tokens generated one at a time, each a random one whatever the logits say, from
//!   an empty context or, with a depth, after a prompt of that many tokens (not timed).
//!
//! Figures, for a median time `t` over the repetitions:
//!
//! - `tok_s = N / t`
//! - `gb_s` (tg) `= active bytes · N / t`: the bytes of weights that a token reads: attention,
//!   router, norms, the experts used, the output head, one row of the embedding
//! - `gop_s` (pp) `= 2 · (active matrix parameters · N + head) / t`: a multiply-add counts as
//!   two; scores and softmax are not counted
//! - `share_of_limit`: `gb_s` over the read bandwidth (tg), `gop_s` over the int8 peak (pp),
//!   both measured in the same run, before and after; the better one counts
//! - a model whose experts come from disk also has `read_gb_s`, what was read over `t`, and `share_of_disk`: the
//!   time that the disk alone would take, over `t`. tg: for the experts that have no slot, chosen evenly,
//!   `(1 − slots / experts) · bytes of active experts`; pp: for all experts. The disk's speed is measured
//!   before and after as well
//! - `peak_rss_bytes`: peak resident memory, the pages of the mapped file included
//! - `own_rss_bytes`: the largest resident memory that no file backs (`RssAnon`), looked at after
//!   every run, while the context is there: scratch, keys and values, metadata, tokenizer

#[cfg(feature = "ggml")]
pub mod ggml;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::engine::{Engine, Error, Session};

/// A test: what runs and how long it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Test {
    /// A prompt of so many tokens.
    Prompt(usize),
    /// So many tokens generated, after a prompt of `depth`.
    Generate {
        /// Tokens generated.
        tokens: usize,
        /// Tokens in the context before.
        depth: usize,
        /// The share of tokens that are the one before once more, so that routing repeats as well.
        repeats: f64,
    },
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prompt(tokens) => write!(f, "pp{tokens}"),
            Self::Generate {
                tokens, depth: 0, ..
            } => write!(f, "tg{tokens}"),
            Self::Generate { tokens, depth, .. } => write!(f, "tg{tokens}@d{depth}"),
        }
    }
}

impl Test {
    /// Tokens that are timed.
    pub fn tokens(self) -> usize {
        match self {
            Self::Prompt(tokens) | Self::Generate { tokens, .. } => tokens,
        }
    }

    /// Tokens a second, where it took `time`.
    pub fn rate(self, time: Duration) -> f64 {
        self.tokens() as f64 / time.as_secs_f64().max(1e-9)
    }

    /// Runs the test once in `session`, which must have room, and returns the time it took.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn run(self, session: &mut Session, seed: u64) -> Result<Duration, Error> {
        self.run_from(session, seed, || {})
    }

    /// The same; `begin` is called where the time begins.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn run_from(
        self,
        session: &mut Session,
        seed: u64,
        begin: impl FnOnce(),
    ) -> Result<Duration, Error> {
        let input = self.input(session.engine().shape().vocab, seed);
        session.rewind(0);
        if !input.before.is_empty() {
            session.feed(&input.before)?;
        }
        begin();
        let start = Instant::now();
        for part in &input.timed {
            match self {
                Self::Prompt(_) => session.feed(part)?,
                Self::Generate { .. } => session.step(part[0])?,
            };
        }
        Ok(start.elapsed())
    }

    /// The tokens of a run, uniformly random: the same for every engine.
    fn input(self, vocab: usize, seed: u64) -> Input {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = |count: usize| -> Vec<u32> {
            (0..count)
                .map(|_| rng.random_range(0..vocab as u32))
                .collect()
        };
        match self {
            Self::Prompt(tokens) => Input {
                before: Vec::new(),
                timed: vec![random(tokens)],
            },
            Self::Generate {
                tokens,
                depth,
                repeats,
            } => {
                let (before, mut generated) = (random(depth), random(tokens));
                for index in 1..tokens {
                    if rng.random_bool(repeats) {
                        generated[index] = generated[index - 1];
                    }
                }
                let timed = generated.into_iter().map(|token| vec![token]).collect();
                Input { before, timed }
            }
        }
    }

    /// Context that the test needs.
    pub fn context(self) -> usize {
        match self {
            Self::Prompt(tokens) => tokens,
            Self::Generate { tokens, depth, .. } => tokens.saturating_add(depth),
        }
    }
}

/// What an engine is fed in a run.
struct Input {
    before: Vec<u32>,
    /// What is timed, a pass each.
    timed: Vec<Vec<u32>>,
}

/// The times of a test's repetitions.
pub struct Times {
    /// What ran.
    pub test: Test,
    sorted: Vec<Duration>,
}

impl Times {
    /// Runs `test` once to warm up and then `repetitions` times.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn measure(engine: &Arc<Engine>, test: Test, repetitions: usize) -> Result<Self, Error> {
        let mut session = engine.session(test.context())?;
        let mut run = |seed| test.run(&mut session, seed);
        let times = Self::alternate(test, repetitions, &mut [&mut run])?;
        Ok(times.into_iter().next().expect("one engine, one result"))
    }

    /// Runs `test` in every engine in turn, once to warm up and then `repetitions` times:
    /// A B A B…, so that a machine that is slower for a while is so for all of them. An engine
    /// is a function of the seed that runs the test and returns the time it took.
    ///
    /// # Errors
    /// The first of an engine.
    pub fn alternate<E>(
        test: Test,
        repetitions: usize,
        engines: &mut [&mut dyn FnMut(u64) -> Result<Duration, E>],
    ) -> Result<Vec<Self>, E> {
        let mut sorted = vec![Vec::new(); engines.len()];
        for seed in 0..=repetitions.max(1) as u64 {
            for (engine, times) in engines.iter_mut().zip(&mut sorted) {
                let time = engine(seed)?;
                if seed > 0 {
                    times.push(time);
                }
            }
        }
        let times = sorted.into_iter().map(|mut sorted| {
            sorted.sort();
            Self { test, sorted }
        });
        Ok(times.collect())
    }

    /// Tokens a second at the median time.
    pub fn tok_s(&self) -> f64 {
        let times = &self.sorted;
        self.test
            .rate((times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2)
    }

    /// Tokens a second of the slowest and the fastest repetition.
    pub fn tok_s_range(&self) -> (f64, f64) {
        (
            self.test.rate(self.sorted[self.sorted.len() - 1]),
            self.test.rate(self.sorted[0]),
        )
    }
}
