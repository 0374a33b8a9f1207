//! How long a model takes from nothing to its first token, and where that time goes.

use std::time::{Duration, Instant};

use serde_json::json;

use super::super::common::ModelArgs;
use crate::gguf;
use crate::sampler::{Sampler, Settings};
use crate::tokenizer::Tokenizer;

/// A prompt of one word.
const PROMPT: &str = "a";
/// Tokens of the context, which has its memory allocated.
const CONTEXT: usize = 4096;

/// Times of the steps, in the order in which they are taken.
#[derive(Clone, Copy)]
pub struct FirstToken {
    /// Reading the file's metadata and tensor table.
    pub header: Duration,
    /// Building the tokenizer.
    pub tokenizer: Duration,
    /// The rest of loading: mapping the file, scratch memory, threads.
    pub load: Duration,
    /// Memory for the context.
    pub session: Duration,
    /// The prompt, two tokens with BOS. It touches the file's pages for the first time.
    pub prompt: Duration,
    /// Choosing a token and making text of it.
    pub token: Duration,
    /// All of it.
    pub total: Duration,
}

impl FirstToken {
    /// The run of median total among `repetitions`, after one that brings the file into memory.
    /// Each maps the file anew.
    pub fn measure(model: &ModelArgs, repetitions: usize) -> anyhow::Result<Self> {
        let mut runs = (0..=repetitions)
            .map(|_| Self::once(model))
            .skip(1)
            .collect::<anyhow::Result<Vec<_>>>()?;
        runs.sort_by_key(|run| run.total);
        Ok(runs[(runs.len() - 1) / 2])
    }

    fn once(model: &ModelArgs) -> anyhow::Result<Self> {
        // Loading does these two itself; to tell their shares they are done once before.
        let start = Instant::now();
        let gguf = gguf::read(model.path())?;
        let header = start.elapsed();
        drop(Tokenizer::from_metadata(&gguf.metadata)?);
        let tokenizer = start.elapsed() - header;
        drop(gguf);

        let start = Instant::now();
        let engine = model.load(Some(CONTEXT))?;
        let loaded = start.elapsed();
        let mut session = engine.session(CONTEXT)?;
        let made = start.elapsed();
        session.feed(&engine.tokenizer().encode_with_bos(PROMPT, false)?)?;
        let fed = start.elapsed();
        let token = Sampler::new(Settings::greedy()).sample(session.logits(), session.tokens());
        engine.tokenizer().decode(&[token], false);
        let total = start.elapsed();
        Ok(Self {
            header,
            tokenizer,
            load: loaded.saturating_sub(header + tokenizer),
            session: made - loaded,
            prompt: fed - made,
            token: total - fed,
            total,
        })
    }

    /// Seconds of each step.
    pub fn to_json(self) -> serde_json::Value {
        json!({
            "header_s": self.header.as_secs_f64(),
            "tokenizer_s": self.tokenizer.as_secs_f64(),
            "load_s": self.load.as_secs_f64(),
            "session_s": self.session.as_secs_f64(),
            "prompt_s": self.prompt.as_secs_f64(),
            "token_s": self.token.as_secs_f64(),
            "total_s": self.total.as_secs_f64(),
        })
    }
}

impl std::fmt::Display for FirstToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        write!(
            f,
            "first token after {:.0} ms: header {:.0}, tokenizer {:.0}, rest of loading {:.0}, context {:.0}, \
             prompt of a word {:.0}, token {:.0}",
            ms(self.total),
            ms(self.header),
            ms(self.tokenizer),
            ms(self.load),
            ms(self.session),
            ms(self.prompt),
            ms(self.token)
        )
    }
}
