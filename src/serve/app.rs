//! What all requests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Config;
use super::error::ApiError;
use super::job::{Event, Job, Text};
use super::metrics::Metrics;
use super::worker::Share;
use crate::chat::Template;
use crate::engine::Engine;
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
    /// What is counted.
    pub metrics: Arc<Metrics>,
    jobs: UnboundedSender<Job>,
    places: Arc<Semaphore>,
    /// Requests so far, for their names and seeds.
    requests: AtomicU64,
}

/// A text that a request wants.
pub struct Wish {
    /// The prompt's tokens.
    pub prompt: Arc<Vec<u32>>,
    /// Tokens to write at most.
    pub limit: Option<usize>,
    /// How to choose them.
    pub settings: Settings,
    /// How the text begins and ends.
    pub text: Text,
    /// Likely tokens to tell beside each.
    pub likely: Option<usize>,
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
        let places = Arc::clone(&self.places);
        let count = u32::try_from(wishes.len()).unwrap_or(u32::MAX);
        let Ok(mut places) = places.try_acquire_many_owned(count) else {
            return Err(ApiError::busy(self.config.queue));
        };
        let (events, receiver) = unbounded_channel();
        for (choice, wish) in wishes.into_iter().enumerate() {
            let place = places.split(1).expect("a place for each");
            let room = context - wish.prompt.len();
            let most = self.config.limit.unwrap_or(usize::MAX).min(room);
            let job = Job {
                choice,
                limit: wish.limit.unwrap_or(most).min(most),
                prompt: wish.prompt.to_vec(),
                sampler: Sampler::new(wish.settings).with_vocabulary(self.engine.tokenizer()),
                text: wish.text,
                likely: wish.likely,
                events: events.clone(),
                place: Some(place),
            };
            self.jobs.send(job).map_err(|_| {
                let message = "the server is shutting down";
                ApiError::status(StatusCode::SERVICE_UNAVAILABLE, message)
            })?;
        }
        Ok(receiver)
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
