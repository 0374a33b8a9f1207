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

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::engine::{Engine, Error, Session};

/// A test: what runs and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// A prompt of so many tokens.
    Prompt(usize),
    /// So many tokens generated, after a prompt of `depth`.
    Generate {
        /// Tokens generated.
        tokens: usize,
        /// Tokens in the context before.
        depth: usize,
    },
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prompt(tokens) => write!(f, "pp{tokens}"),
            Self::Generate { tokens, depth: 0 } => write!(f, "tg{tokens}"),
            Self::Generate { tokens, depth } => write!(f, "tg{tokens}@d{depth}"),
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

    /// Runs the test once in `session`, which must have room, and returns the time it took.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn run(self, session: &mut Session, seed: u64) -> Result<Duration, Error> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let vocab = session.engine().shape().vocab as u32;
        let mut random =
            |count: usize| -> Vec<u32> { (0..count).map(|_| rng.random_range(0..vocab)).collect() };
        session.rewind(0);
        match self {
            Self::Prompt(tokens) => {
                let prompt = random(tokens);
                let start = Instant::now();
                session.feed(&prompt)?;
                Ok(start.elapsed())
            }
            Self::Generate { tokens, depth } => {
                if depth > 0 {
                    session.feed(&random(depth))?;
                }
                let tokens = random(tokens);
                let start = Instant::now();
                for token in tokens {
                    session.step(token)?;
                }
                Ok(start.elapsed())
            }
        }
    }

    /// Context that the test needs.
    fn context(self) -> usize {
        match self {
            Self::Prompt(tokens) => tokens,
            Self::Generate { tokens, depth } => tokens.saturating_add(depth),
        }
    }
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
        test.run(&mut session, 0)?;
        let runs = (1..=repetitions.max(1)).map(|seed| test.run(&mut session, seed as u64));
        let mut sorted = runs.collect::<Result<Vec<_>, _>>()?;
        sorted.sort();
        Ok(Self { test, sorted })
    }

    /// Tokens a second at the median time.
    pub fn tok_s(&self) -> f64 {
        let times = &self.sorted;
        self.rate((times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2)
    }

    /// Tokens a second of the slowest and the fastest repetition.
    pub fn tok_s_range(&self) -> (f64, f64) {
        (
            self.rate(self.sorted[self.sorted.len() - 1]),
            self.rate(self.sorted[0]),
        )
    }

    fn rate(&self, time: Duration) -> f64 {
        self.test.tokens() as f64 / time.as_secs_f64().max(1e-9)
    }
}
