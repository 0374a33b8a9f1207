//! llama.cpp as a rival: the same tests, with the settings under which it is fastest.
//!
//! It runs twice: multiplying rows as they lie in the file, and with rows repacked at load, its
//! default. Which is faster differs by type and test. Threads that wait sleep while others run.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ggml_sys_bindings::llama::{Context, Model, Settings};

use super::Test;

/// Why the rival cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It refuses the file.
    #[error("{}: llama.cpp cannot load the file, for the reason above", file.display())]
    Load {
        /// The file.
        file: PathBuf,
    },
    /// It has no memory for a context.
    #[error("llama.cpp cannot make a context of {tokens} tokens, for the reason above")]
    Context {
        /// Tokens asked for.
        tokens: usize,
    },
    /// It fails in a pass.
    #[error("llama.cpp fails to compute, with status {status}")]
    Compute {
        /// What `llama_decode` returned.
        status: i32,
    },
}

/// The CPU features that ggml was compiled for.
pub fn system_info() -> String {
    ggml_sys_bindings::system_info()
}

/// Whether ggml was compiled without AVX-512 for a CPU that has it.
pub fn lacks_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    let cpu = is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    let cpu = false;
    cpu && !system_info().contains("AVX512 = 1")
}

/// A file loaded by llama.cpp in both ways.
pub struct Rival {
    in_place: Model,
    repacked: Model,
}

impl Rival {
    /// Loads `path`.
    ///
    /// # Errors
    /// If llama.cpp refuses it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let refused = || Error::Load {
            file: path.to_owned(),
        };
        Ok(Self {
            in_place: Model::load(path).ok_or_else(refused)?,
            repacked: Model::load_repacked(path).ok_or_else(refused)?,
        })
    }

    /// Contexts with room for `tokens`: rows in place first, repacked second.
    ///
    /// # Errors
    /// If llama.cpp has no memory for them.
    pub fn runners(&self, tokens: usize, threads: usize) -> Result<[Runner<'_>; 2], Error> {
        let runner = |model| Runner::new(model, Settings::fast(tokens, threads));
        Ok([runner(&self.in_place)?, runner(&self.repacked)?])
    }
}

/// A context of the rival's.
pub struct Runner<'a> {
    context: Context<'a>,
    vocab: usize,
}

impl<'a> Runner<'a> {
    fn new(model: &'a Model, settings: Settings) -> Result<Self, Error> {
        let tokens = settings.context;
        let mut context = model.context(settings).ok_or(Error::Context { tokens })?;
        context.rest();
        Ok(Self {
            context,
            vocab: model.vocab_len(),
        })
    }

    /// Runs the test once and returns the time it took, as [`Test::run`] does.
    ///
    /// # Errors
    /// If llama.cpp fails.
    pub fn run(&mut self, test: Test, seed: u64) -> Result<Duration, Error> {
        self.context.clear();
        self.context.wake();
        let time = self.timed(test, seed);
        self.context.rest();
        time.map_err(|status| Error::Compute { status })
    }

    fn timed(&mut self, test: Test, seed: u64) -> Result<Duration, i32> {
        let input = test.input(self.vocab, seed);
        if !input.before.is_empty() {
            self.context.feed(&input.before)?;
        }
        let start = Instant::now();
        for part in &input.timed {
            self.context.feed(part)?;
        }
        Ok(start.elapsed())
    }
}
