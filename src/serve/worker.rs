//! The thread that owns the sessions: reads prompts in parts, and writes all texts in one pass.
//!
//! **Results do not depend on company.** Sessions are shared in a way that keeps every bit as it would be alone:
//! only what was read as a prompt is used again, never what was written, since the kernels for single tokens round
//! differently. So a conversation's last answer is read again with the next question.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use super::job::{Chosen, Done, Event, Finish, Job, News, Purpose};
use super::metrics::Metrics;
use crate::answer::Answer;
use crate::engine::{Engine, Error, Session, Turn};
use crate::generation::Writing;
use crate::plan::PROMPT_BATCH;

/// How long texts that are being written may wait for a part of a prompt that is read between two passes.
const PAUSE: Duration = Duration::from_millis(200);
/// The smallest part of a prompt that is worth a pass.
const LEAST_PART: usize = 32;

/// How the worker shares its time and memory.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Texts that are written at the same time.
    pub slots: usize,
    /// Tokens of each: prompt and answer together.
    pub context: usize,
    /// Tokens guessed ahead at most.
    pub drafts: usize,
}

/// The thread, and the way to it.
pub struct Worker {
    /// Where jobs go; the thread ends when all senders are gone and all jobs are done.
    pub jobs: UnboundedSender<Job>,
    /// The thread.
    pub thread: JoinHandle<()>,
    /// Completed when the thread ends, for whatever reason.
    pub ended: oneshot::Receiver<()>,
}

impl Worker {
    /// Starts a thread that loads the model (which may keep it on a CPU) and then works.
    ///
    /// # Errors
    /// What `load` returns; and where there is no memory for the sessions.
    pub fn start<E: From<Error> + Send + 'static>(
        load: impl FnOnce() -> Result<(Arc<Engine>, Share), E> + Send + 'static,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Arc<Engine>, Share), E> {
        let (jobs, queue) = unbounded_channel();
        let (tell, loaded) = std::sync::mpsc::channel();
        let (alive, ended) = oneshot::channel();
        let work = move || {
            let _alive = alive;
            let slots = |(engine, share): (Arc<Engine>, Share)| {
                let slot = |_| Ok(Slot::new(engine.session(share.context)?));
                let slots: Result<Vec<Slot>, Error> = (0..share.slots.max(1)).map(slot).collect();
                Ok::<_, Error>((Arc::clone(&engine), share, slots?))
            };
            match load().and_then(|loaded| slots(loaded).map_err(E::from)) {
                Err(error) => drop(tell.send(Err(error))),
                Ok((engine, share, slots)) => {
                    let _ = tell.send(Ok((Arc::clone(&engine), share)));
                    drop(tell);
                    Desk::new(&engine, slots, share, queue, &metrics).work();
                }
            }
        };
        let thread = thread::Builder::new().name("worker".into()).spawn(work);
        let thread = thread.map_err(|source| Error::Threads { threads: 1, source })?;
        let (engine, share) = loaded.recv().expect("the worker tells how it went")?;
        let worker = Self {
            jobs,
            thread,
            ended,
        };
        Ok((worker, engine, share))
    }
}

/// A session, and what is done with it.
struct Slot<'e> {
    session: Session,
    /// Its tokens that were read as a prompt, from the first on; those behind them were written.
    read: usize,
    task: Option<Task<'e>>,
    /// When it was last given a job, in jobs.
    used: u64,
}

/// A job in a slot.
struct Task<'e> {
    job: Job,
    answer: Answer<'e>,
    /// The sum of the hidden states, for an embedding.
    sum: Vec<f32>,
    /// `None` while the prompt is read.
    writing: Option<Writing>,
    /// Whether the slot holds what others had of the prompt.
    shared: bool,
    cached: usize,
    tokens: usize,
    /// Tokens that were not told yet.
    chosen: Vec<Chosen>,
    begun: Instant,
    first: Instant,
}

/// Everything the thread looks at.
struct Desk<'e> {
    engine: &'e Engine,
    slots: Vec<Slot<'e>>,
    queue: UnboundedReceiver<Job>,
    waiting: VecDeque<Job>,
    metrics: &'e Metrics,
    drafts: usize,
    /// Jobs so far.
    jobs: u64,
    /// Tokens of a prompt that are read in [`PAUSE`].
    part: usize,
}

impl<'e> Slot<'e> {
    fn new(session: Session) -> Self {
        Self {
            session,
            read: 0,
            task: None,
            used: 0,
        }
    }

    /// How many of the `prompt`'s tokens it holds as they are read alone; the last token is always read, since
    /// its logits are needed.
    fn common(&self, prompt: &[u32]) -> usize {
        let held = self.session.tokens()[..self.read].iter();
        let common = held.zip(prompt).take_while(|(a, b)| a == b).count();
        common.min(prompt.len() - 1)
    }

    fn rewind(&mut self, len: usize) {
        self.session.rewind(len);
        self.read = self.read.min(len);
    }

    /// Ends the task, if any, and tells.
    fn end(&mut self, news: impl FnOnce(&mut Task) -> News) {
        if let Some(mut task) = self.task.take() {
            if let Some(writing) = &task.writing {
                writing.settle(&mut self.session);
            }
            let news = news(&mut task);
            task.tell(news);
        }
    }
}

impl Task<'_> {
    /// That nobody listens any more shows in the next look at the slots.
    fn tell(&self, news: News) {
        let choice = self.job.choice;
        let _ = self.job.events.send(Event { choice, news });
    }

    fn done(&mut self, finish: Finish) -> News {
        let text = self.answer.finish();
        // The end of a held text may complete a stop string.
        let finish = match self.answer.stop() {
            Some(stop) => Finish::Stop(stop.to_owned()),
            None => finish,
        };
        let tokens = std::mem::take(&mut self.chosen);
        if !(text.is_empty() && tokens.is_empty()) {
            self.tell(News::Text { text, tokens });
        }
        News::Done(Done {
            finish,
            prompt_tokens: self.job.prompt.len(),
            cached_tokens: self.cached,
            tokens: self.tokens,
            reading: self.first - self.begun,
            writing: self.first.elapsed(),
        })
    }
}

impl<'e> Desk<'e> {
    fn new(
        engine: &'e Engine,
        slots: Vec<Slot<'e>>,
        share: Share,
        queue: UnboundedReceiver<Job>,
        metrics: &'e Metrics,
    ) -> Self {
        Self {
            engine,
            slots,
            queue,
            waiting: VecDeque::new(),
            metrics,
            drafts: share.drafts,
            jobs: 0,
            part: LEAST_PART,
        }
    }

    fn work(&mut self) {
        while self.receive() {
            self.clear();
            self.seat();
            self.read();
            self.write();
        }
    }

    /// Takes what has come; waits where there is nothing else to do. Whether there is anything to do.
    fn receive(&mut self) -> bool {
        loop {
            match self.queue.try_recv() {
                Ok(job) => self.waiting.push_back(job),
                Err(_) if self.is_busy() => return true,
                Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => {
                    self.count();
                    match self.queue.blocking_recv() {
                        Some(job) => self.waiting.push_back(job),
                        None => return false,
                    }
                }
            }
        }
    }

    fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || self.slots.iter().any(|slot| slot.task.is_some())
    }

    /// Forgets the jobs that nobody waits for.
    fn clear(&mut self) {
        self.waiting.retain(|job| !job.events.is_closed());
        for slot in &mut self.slots {
            if let Some(task) = slot.task.take_if(|task| task.job.events.is_closed()) {
                if let Some(writing) = task.writing {
                    writing.settle(&mut slot.session);
                }
                self.metrics.cancelled.add(1);
            }
        }
    }

    fn count(&self) {
        let busy = self.slots.iter().filter(|slot| slot.task.is_some());
        self.metrics.active.set(busy.count() as u64);
        self.metrics.waiting.set(self.waiting.len() as u64);
    }

    /// The free slot that loses least with a `prompt`: where most of what it holds is the prompt's, or else the one
    /// that was not used for longest.
    fn free_slot(&self, prompt: &[u32]) -> Option<usize> {
        let keeps = |slot: &Slot| {
            let common = slot.common(prompt);
            if 2 * common > slot.read { common } else { 0 }
        };
        let slots = self.slots.iter().enumerate();
        let free = slots.filter(|(_, slot)| slot.task.is_none());
        let best = free.max_by_key(|(_, slot)| (keeps(slot), Reverse(slot.used)));
        best.map(|(index, _)| index)
    }

    /// Gives waiting jobs a slot.
    fn seat(&mut self) {
        while let Some(job) = self.waiting.front()
            && let Some(index) = self.free_slot(&job.prompt)
            && let Some(mut job) = self.waiting.pop_front()
        {
            job.place = None;
            self.jobs += 1;
            let now = Instant::now();
            let tokenizer = self.engine.tokenizer();
            let answer = match &job.purpose {
                Purpose::Embedding => Answer::continuing(tokenizer),
                Purpose::Text(writer) => {
                    let text = &writer.text;
                    let answer = match &text.lead {
                        None => Answer::continuing(tokenizer),
                        Some(lead) => Answer::to(&job.prompt, lead, tokenizer),
                    };
                    let answer = answer.with_stops(text.stops.clone());
                    if text.special {
                        answer.with_special()
                    } else {
                        answer
                    }
                }
            };
            let hidden = match job.purpose {
                Purpose::Embedding => self.engine.shape().hidden,
                Purpose::Text(_) => 0,
            };
            let slot = &mut self.slots[index];
            slot.used = self.jobs;
            // All hidden states are needed, and none are kept.
            let kept = if hidden > 0 {
                0
            } else {
                slot.common(&job.prompt)
            };
            slot.rewind(kept);
            slot.task = Some(Task {
                job,
                answer,
                sum: vec![0.0; hidden],
                writing: None,
                shared: hidden > 0,
                cached: kept,
                tokens: 0,
                chosen: Vec::new(),
                begun: now,
                first: now,
            });
        }
        self.count();
    }

    /// Reads a part of the prompt that came first.
    fn read(&mut self) {
        let reads = |slot: &Slot| {
            slot.task
                .as_ref()
                .is_some_and(|task| task.writing.is_none())
        };
        let first = (0..self.slots.len()).filter(|&index| reads(&self.slots[index]));
        let Some(index) = first.min_by_key(|&index| self.slots[index].used) else {
            return;
        };
        self.share(index);
        let writers = self.slots.iter().any(|slot| {
            let task = slot.task.as_ref();
            task.is_some_and(|task| task.writing.is_some())
        });
        let slot = &mut self.slots[index];
        let Some(task) = &mut slot.task else { return };
        let most = if writers { self.part } else { PROMPT_BATCH };
        let rest = &task.job.prompt[slot.read..];
        let part = &rest[..rest.len().min(most)];
        let start = Instant::now();
        let result = match task.job.purpose {
            Purpose::Text(_) => slot.session.feed(part).map(drop),
            Purpose::Embedding => slot.session.hidden_states(part, |_, hidden| {
                (task.sum.iter_mut().zip(hidden)).for_each(|(sum, x)| *sum += x);
            }),
        };
        let time = start.elapsed();
        self.metrics.read.add(part.len() as u64);
        self.metrics.reading.add(time);
        if part.len() >= LEAST_PART {
            let a_pause = part.len() as f64 * PAUSE.as_secs_f64() / time.as_secs_f64().max(1e-6);
            self.part = (a_pause as usize).clamp(LEAST_PART, PROMPT_BATCH);
        }
        if let Err(error) = result {
            return slot.end(|_| News::Failed(error.to_string()));
        }
        slot.read += part.len();
        if part.len() < rest.len() {
            return;
        }
        match &task.job.purpose {
            Purpose::Embedding => slot.end(|task| {
                let count = task.job.prompt.len() as f32;
                let mean = task.sum.iter().map(|sum| sum / count);
                News::Embedding(mean.collect())
            }),
            Purpose::Text(writer) => {
                let writing = Writing::new(&slot.session, writer.limit);
                task.writing = Some(writing.with_drafts(self.drafts));
                task.first = Instant::now();
                draw(slot, self.metrics);
            }
        }
    }

    /// Copies what another slot holds of a slot's prompt, once, before anything of it is read.
    fn share(&mut self, index: usize) {
        let Some(task) = &mut self.slots[index].task else {
            return;
        };
        if std::mem::replace(&mut task.shared, true) {
            return;
        }
        let prompt = std::mem::take(&mut task.job.prompt);
        let others = (0..self.slots.len()).filter(|&other| other != index);
        let most = others
            .map(|other| (self.slots[other].common(&prompt), other))
            .max();
        let mut kept = self.slots[index].read;
        if let Some((common, other)) = most
            && common > kept + LEAST_PART
            && let Ok([slot, other]) = self.slots.get_disjoint_mut([index, other])
        {
            slot.session.copy_from(&other.session, common);
            slot.read = common;
            kept = common;
        }
        self.metrics.cached.add(kept as u64);
        if let Some(task) = &mut self.slots[index].task {
            task.cached = kept;
            task.job.prompt = prompt;
        }
    }

    /// One pass over all texts that are being written, and the next token of each.
    fn write(&mut self) {
        let mut writers = Vec::new();
        for slot in &mut self.slots {
            let writing = slot.task.as_mut().and_then(|task| task.writing.as_mut());
            let tokens = writing.map_or(Vec::new(), |writing| writing.turn(&slot.session));
            if !tokens.is_empty() {
                writers.push((slot, tokens));
            }
        }
        if writers.is_empty() {
            return;
        }
        let start = Instant::now();
        let mut turns: Vec<Turn> = writers
            .iter_mut()
            .map(|(slot, tokens)| Turn {
                session: &mut slot.session,
                tokens,
            })
            .collect();
        let results = self.engine.generate(&mut turns);
        self.metrics.passes.add(1);
        self.metrics.writing.add(start.elapsed());
        for ((slot, _), result) in writers.into_iter().zip(results) {
            match result {
                Ok(()) => draw(slot, self.metrics),
                Err(error) => slot.end(|_| News::Failed(error.to_string())),
            }
        }
    }
}

/// Draws tokens from the logits that are there, and tells what comes of them.
fn draw(slot: &mut Slot, metrics: &Metrics) {
    let Slot { session, task, .. } = slot;
    let Some(task) = task else { return };
    let (Some(writing), Purpose::Text(writer)) = (&mut task.writing, &mut task.job.purpose) else {
        return;
    };
    let mut text = String::new();
    let finish = loop {
        if writing.is_over() {
            break Some(Finish::Length);
        }
        if writing.is_pending() {
            break None;
        }
        // Of the model itself, before any step of the sampler.
        let logits = writer.likely.map(|_| writing.logits(session).to_vec());
        let Some(token) = writing.draw(session, &mut writer.sampler) else {
            break Some(Finish::End);
        };
        task.tokens += 1;
        metrics.written.add(1);
        if let (Some(logits), Some(count)) = (logits, writer.likely) {
            task.chosen.push(Chosen::of(token, &logits, count));
        }
        text += &task.answer.push(token);
        if let Some(stop) = task.answer.stop() {
            break Some(Finish::Stop(stop.to_owned()));
        }
    };
    let tokens = match text.is_empty() {
        true => Vec::new(),
        false => std::mem::take(&mut task.chosen),
    };
    if !text.is_empty() {
        task.tell(News::Text { text, tokens });
    }
    if let Some(finish) = finish {
        slot.end(|task| task.done(finish));
    }
}
