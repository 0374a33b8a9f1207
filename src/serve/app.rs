//! What all requests share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Config;
use super::error::ApiError;
use super::job::{Event, Job, Purpose};
use super::metrics::Metrics;
use super::worker::Share;
use crate::chat::Template;
use crate::engine::Engine;
use crate::grammar::{Grammar, Grammars};
use crate::sampler::{Sampler, Settings};

/// The model, the way to the worker, and the limits.
pub struct App {
    /// The loaded model.
    pub engine: Arc<Engine>,
    /// The way messages become a prompt.
    pub template: Template,
    /// What it writes between a prompt and its answer.
    pub lead: String,
    /// What the operator chose.
    pub config: Config,
    /// How the worker shares its time and memory.
    pub share: Share,
    /// When the model's file was made, in seconds since 1970.
    pub created: u64,
    /// Grammars over its vocabulary, or why there are none.
    pub grammars: OnceLock<Result<Grammars, crate::grammar::Error>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    jobs: UnboundedSender<Job>,
    places: Arc<Semaphore>,
    /// Requests so far, for their names and seeds.
    requests: AtomicU64,
}

/// A prompt that a request brings.
pub struct Wish {
    prompt: Arc<Vec<u32>>,
    purpose: Purpose,
}

impl Wish {
    /// Reads `prompt` for `purpose`; a text is cut where there is no room for more.
    pub fn new(prompt: Arc<Vec<u32>>, purpose: Purpose) -> Self {
        Self { prompt, purpose }
    }
}

impl App {
    /// Everything in its place; `jobs` leads to the worker.
    pub fn new(
        engine: Arc<Engine>,
        template: Template,
        config: Config,
        share: Share,
        metrics: Arc<Metrics>,
        jobs: UnboundedSender<Job>,
    ) -> Self {
        let made = std::fs::metadata(engine.path()).and_then(|file| file.modified());
        Self {
            lead: template.lead(),
            template,
            created: made.map_or(0, seconds),
            places: Arc::new(Semaphore::new(config.queue)),
            requests: AtomicU64::new(0),
            grammars: OnceLock::new(),
            engine,
            config,
            share,
            metrics,
            jobs,
        }
    }

    /// Hands texts to the worker, all or none; what comes of them can be received.
    ///
    /// # Errors
    /// Where one of the prompts is too long, or the queue has too few places.
    pub fn submit(&self, wishes: Vec<Wish>) -> Result<UnboundedReceiver<Event>, ApiError> {
        let context = self.share.context;
        for wish in &wishes {
            if wish.prompt.len() >= context {
                return Err(ApiError::too_long(wish.prompt.len(), context));
            }
            if wish.prompt.is_empty() {
                return Err(ApiError::bad("the prompt is empty"));
            }
        }
        if wishes.len() > self.config.queue {
            let (count, most) = (wishes.len(), self.config.queue);
            return Err(ApiError::bad(format!(
                "{count} texts at once, where {most} may wait"
            )));
        }
        let places = Arc::clone(&self.places);
        let count = u32::try_from(wishes.len()).unwrap_or(u32::MAX);
        let Ok(mut places) = places.try_acquire_many_owned(count) else {
            return Err(ApiError::busy(self.config.queue));
        };
        let (events, receiver) = unbounded_channel();
        for (choice, wish) in wishes.into_iter().enumerate() {
            let place = places.split(1).expect("a place for each");
            let mut purpose = wish.purpose;
            if let Purpose::Text(writer) = &mut purpose {
                let room = context - wish.prompt.len();
                let most = self.config.limit.unwrap_or(usize::MAX).min(room);
                writer.limit = writer.limit.min(most);
            }
            let job = Job {
                choice,
                prompt: wish.prompt.to_vec(),
                purpose,
                events: events.clone(),
                place: Some(place),
            };
            self.jobs.send(job).map_err(|_| ApiError::ending())?;
        }
        Ok(receiver)
    }

    /// The sampler for a text, under a grammar if there is one.
    ///
    /// # Errors
    /// Where the grammar cannot be used.
    pub fn sampler(
        &self,
        settings: Settings,
        grammar: Option<&Grammar>,
    ) -> Result<Sampler, ApiError> {
        let tokenizer = self.engine.tokenizer();
        let sampler = Sampler::new(settings).with_vocabulary(tokenizer);
        let Some(grammar) = grammar else {
            return Ok(sampler);
        };
        let grammars = self.grammars.get_or_init(|| Grammars::new(tokenizer));
        let grammars = grammars
            .as_ref()
            .map_err(|error| ApiError::failed(error.to_string()))?;
        let constraint = grammars.constraint(grammar);
        let constraint = constraint.map_err(|error| ApiError::bad(error.to_string()))?;
        Ok(sampler.with_constraint(Some(constraint)))
    }

    /// A name for a request, and a seed where it brings none.
    pub fn next(&self) -> (String, u64) {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let now = UNIX_EPOCH.elapsed().unwrap_or_default();
        let seed = (now.as_nanos() as u64).wrapping_add(number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        (format!("{:x}-{number:x}", now.as_millis()), seed)
    }
}

/// Seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}
