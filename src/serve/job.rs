//! What a request asks of the worker, and what the worker tells in return.

use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::sampler::Sampler;

/// One text to write, or to embed.
pub struct Job {
    /// Which of a request's choices it is.
    pub choice: usize,
    /// Tokens to read, at least one, and fewer than a session holds.
    pub prompt: Vec<u32>,
    /// What for.
    pub purpose: Purpose,
    /// Where to tell. That nobody listens any more cancels the job. What is told and not read yet is bounded by
    /// the session's room, so that the worker never waits for a slow reader.
    pub events: UnboundedSender<Event>,
    /// The place in the queue; given back when the job gets a slot.
    pub place: Option<OwnedSemaphorePermit>,
}

/// What a prompt is read for.
pub enum Purpose {
    /// To write on.
    Text(Box<Writer>),
    /// For the mean of its final hidden states.
    Embedding,
}

/// How a text is written.
pub struct Writer {
    /// Tokens to write at most.
    pub limit: usize,
    /// How they are chosen.
    pub sampler: Sampler,
    /// How the text begins and ends.
    pub text: Text,
    /// How many likely tokens to tell beside each that is written; `None` where nobody asks for probabilities.
    pub likely: Option<usize>,
}

/// How a text begins and ends.
#[derive(Clone, Debug, Default)]
pub struct Text {
    /// What the chat template puts before an answer; `None` for text that goes on where the prompt ends.
    pub lead: Option<String>,
    /// Strings that end the text.
    pub stops: Vec<String>,
    /// Whether control tokens are written out.
    pub special: bool,
}

/// News of a job.
#[derive(Debug)]
pub struct Event {
    /// Which of a request's choices it is about.
    pub choice: usize,
    /// What happened.
    pub news: News,
}

/// What happened.
#[derive(Debug)]
pub enum News {
    /// Text came, or tokens whose text is not certain yet.
    Text {
        /// The text, whole characters.
        text: String,
        /// The tokens since the last event, where probabilities are asked for.
        tokens: Vec<Chosen>,
    },
    /// The mean of the final hidden states, `[hidden]`; nothing follows.
    Embedding(Vec<f32>),
    /// The text is complete; nothing follows.
    Done(Done),
    /// It could not be completed; nothing follows.
    Failed(String),
}

/// A token that was chosen, and the likely ones at its place.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The token.
    pub token: Likely,
    /// The likeliest, best first.
    pub likely: Vec<Likely>,
}

impl Chosen {
    /// `token`, and the `count` likeliest, under `logits`.
    pub fn of(token: u32, logits: &[f32], count: usize) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps = logits.iter().map(|&logit| f64::from(logit - max).exp());
        let log_sum = exps.sum::<f64>().ln();
        let likely = |id: u32| Likely {
            id,
            logprob: (f64::from(logits[id as usize] - max) - log_sum) as f32,
        };
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let better = |a: &u32, b: &u32| {
            let (a, b) = (*a, *b);
            (logits[b as usize].total_cmp(&logits[a as usize])).then(a.cmp(&b))
        };
        if count < order.len() {
            order.select_nth_unstable_by(count, better);
            order.truncate(count);
        }
        order.sort_unstable_by(better);
        Self {
            token: likely(token),
            likely: order.into_iter().map(likely).collect(),
        }
    }
}

/// A token and the natural logarithm of its probability under the model, before any sampling step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likely {
    /// The token.
    pub id: u32,
    /// The logarithm.
    pub logprob: f32,
}

/// How a text ended, and what it took.
#[derive(Clone, Debug)]
pub struct Done {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that a session held already.
    pub cached_tokens: usize,
    /// Tokens that were written, one that ends the text not counted.
    pub tokens: usize,
    /// From the first part of the prompt to the first token.
    pub reading: Duration,
    /// From the first token to the last.
    pub writing: Duration,
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    End,
    /// This stop string came.
    Stop(String),
    /// As many tokens as were asked for, or the context is full.
    Length,
}
