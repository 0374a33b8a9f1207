//! A conversation: its turns, the session that holds them, and what is done when they no longer fit.
//!
//! What a session holds already is never read again: a question reads from where its prompt differs from what was read
//! and written before. A conversation and all that its session holds can be kept in a file ([`Conversation::save`])
//! and taken up again at once.

mod file;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::answer::Answer;
use crate::chat::{self, Message, Template};
use crate::engine::{self, Session};
use crate::generation::Generation;
use crate::plan::PROMPT_BATCH;
use crate::sampler::{Constraint, Sampler, Settings};
use crate::tokenizer::Tokenizer;

pub use file::FileError;

/// How long a part of a prompt may take that is read without looking whether it is to be stopped.
const PATIENCE: Duration = Duration::from_millis(500);
/// The smallest part of a prompt that is worth a pass.
const LEAST_PART: usize = 32;

/// What happens when the context is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// The oldest turns are forgotten, never the system message.
    #[default]
    Drop,
    /// A question that does not fit is refused, and an answer ends where the context does.
    Refuse,
}

/// How answers are written.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens of an answer at most.
    pub limit: usize,
    /// Tokens guessed ahead at most.
    pub drafts: usize,
    /// Texts before which an answer ends.
    pub stops: Vec<String>,
    /// What happens when the context is full.
    pub overflow: Overflow,
}

impl Default for Options {
    /// Answers as long as the model will have them.
    fn default() -> Self {
        Self {
            limit: usize::MAX,
            drafts: 0,
            stops: Vec::new(),
            overflow: Overflow::default(),
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The template does not take the conversation.
    #[error(transparent)]
    Chat(#[from] chat::Error),
    /// The model cannot go on.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The conversation does not fit, and nothing is to be forgotten.
    #[error("the conversation takes {wanted} tokens, the context has {capacity}")]
    Full {
        /// Tokens that the conversation and the first of an answer take.
        wanted: usize,
        /// Tokens that fit.
        capacity: usize,
    },
    /// The system message and the question alone do not fit.
    #[error("this message takes {wanted} tokens, the context has {capacity}")]
    TooLong {
        /// Tokens that they and the first of an answer take.
        wanted: usize,
        /// Tokens that fit.
        capacity: usize,
    },
}

/// What happens on the way to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// So many of the oldest turns are forgotten.
    Forgot(usize),
    /// So many tokens of the prompt are read, of all that must be.
    Read(usize, usize),
    /// The answer goes on.
    Text(&'a str),
}

/// Why an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Model,
    /// A stop string came.
    Stop,
    /// It has as many tokens as it may.
    Limit,
    /// The context is full.
    Full,
    /// It was stopped; what was written is kept.
    Stopped,
    /// It was stopped before anything was written: the question is taken back.
    TakenBack,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its text.
    pub text: String,
    /// Why it ends.
    pub end: End,
    /// Tokens that were read.
    pub read: usize,
    /// What reading took.
    pub reading: Duration,
    /// Tokens that were written.
    pub written: usize,
    /// Those of them that went through the model: the first comes from the prompt's logits, the last may not have been needed.
    pub fed: usize,
    /// What these took.
    pub writing: Duration,
}

/// What listens to an answer, and says whether it is to go on.
pub type Listener<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'a;

/// A conversation and the session that holds it.
pub struct Conversation {
    session: Session,
    template: Template,
    /// What the template writes between a prompt and its answer.
    lead: String,
    sampler: Sampler,
    /// The system message, if any, then turns: a question and its answer.
    messages: Vec<Message>,
    /// How answers are written.
    pub options: Options,
}

impl Conversation {
    /// A conversation that has not begun.
    pub fn new(session: Session, template: Template, settings: Settings, options: Options) -> Self {
        Self {
            sampler: Sampler::new(settings).with_vocabulary(session.engine().tokenizer()),
            lead: template.lead(),
            template,
            session,
            messages: Vec::new(),
            options,
        }
    }

    /// The session, as far as it was read and written.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The template that makes prompts of messages.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// The system message, if any, then turns.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Questions so far.
    pub fn turns(&self) -> usize {
        self.messages.iter().filter(|m| is_question(m)).count()
    }

    /// What the model is told in advance.
    pub fn system(&self) -> Option<&str> {
        let first = self.messages.first().filter(|m| m.role == "system");
        first.map(|message| &message.content[..])
    }

    /// Tells the model something else in advance, or nothing.
    pub fn set_system(&mut self, text: Option<String>) {
        self.messages.drain(..self.head());
        self.messages.splice(0..0, text.map(Message::system));
    }

    /// How tokens are chosen.
    pub fn settings(&self) -> &Settings {
        self.sampler.settings()
    }

    /// From now on they are chosen otherwise.
    pub fn change(&mut self, settings: Settings) {
        let engine = Arc::clone(self.session.engine());
        self.sampler.change(settings, engine.tokenizer());
    }

    /// Forgets all turns.
    pub fn reset(&mut self) {
        self.messages.truncate(self.head());
    }

    /// Takes the last question and its answer back; returns the question.
    pub fn undo(&mut self) -> Option<String> {
        let last = self.messages.iter().rposition(is_question)?;
        let turn = self.messages.drain(last..).next();
        turn.map(|message| message.content)
    }

    /// Answers `question`. An answer follows `constraint`, if there is one. A question that does not fit, or that was
    /// stopped before an answer began, is taken back; an answer that was stopped is kept as far as it was written.
    ///
    /// # Errors
    /// Where the template refuses the conversation, it does not fit, or the model cannot go on. The conversation is
    /// then as it was, but for turns that were forgotten.
    pub fn ask(
        &mut self,
        question: String,
        constraint: Option<Box<dyn Constraint>>,
        listener: &mut Listener<'_>,
    ) -> Result<Reply, Error> {
        self.messages.push(Message::user(question));
        self.sampler.constrain(constraint);
        let reply = self.answer(listener);
        self.sampler.constrain(None);
        match &reply {
            Ok(reply) if reply.end != End::TakenBack => {
                self.messages.push(Message::assistant(&reply.text));
            }
            _ => drop(self.messages.pop()),
        }
        reply
    }

    /// Answers the last question anew; `None` where there is none. If that fails, the answer that was is kept.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn retry(
        &mut self,
        constraint: Option<Box<dyn Constraint>>,
        listener: &mut Listener<'_>,
    ) -> Result<Option<Reply>, Error> {
        let Some(last) = self.messages.iter().rposition(is_question) else {
            return Ok(None);
        };
        let turn = self.messages.split_off(last);
        let reply = self.ask(turn[0].content.clone(), constraint, listener);
        if !matches!(&reply, Ok(reply) if reply.end != End::TakenBack) {
            self.messages.extend(turn);
        }
        reply.map(Some)
    }

    /// Messages before the first turn.
    fn head(&self) -> usize {
        self.system().is_some().into()
    }

    /// The answer to the messages, the last of which is a question.
    fn answer(&mut self, listener: &mut Listener<'_>) -> Result<Reply, Error> {
        let engine = Arc::clone(self.session.engine());
        let tokenizer = engine.tokenizer();
        let mut reply = Reply {
            text: String::new(),
            end: End::TakenBack,
            read: 0,
            reading: Duration::ZERO,
            written: 0,
            fed: 0,
            writing: Duration::ZERO,
        };
        let mut written = Vec::new();
        let mut prompt = self.fitting(tokenizer, &written, listener)?;
        let mut text = Answer::to(&prompt, &self.lead, tokenizer);
        text = text.with_stops(self.options.stops.clone());
        loop {
            let start = Instant::now();
            let (read, stopped) = self.read(&prompt, listener)?;
            reply.read += read;
            reply.reading += start.elapsed();
            if stopped {
                reply.end = End::Stopped;
                break;
            }
            let start = Instant::now();
            let end = self.write(&mut text, &mut written, &mut reply.text, listener)?;
            reply.writing += start.elapsed();
            reply.fed += self.session.tokens().len() - prompt.len();
            reply.end = end;
            let goes_on = end == End::Full
                && self.options.overflow == Overflow::Drop
                && self.oldest_turn().is_some();
            if !goes_on {
                break;
            }
            prompt = self.fitting(tokenizer, &written, listener)?;
        }
        reply.written = written.len();
        let tail = text.finish();
        reply.text += &tail;
        let _ = listener(Event::Text(&tail));
        if text.stop().is_some() {
            reply.end = End::Stop;
        }
        if reply.end == End::Stopped && reply.text.trim().is_empty() {
            reply.end = End::TakenBack;
        }
        Ok(reply)
    }

    /// The prompt and what was `written` after it, with room to go on; forgets turns for that, if it may.
    fn fitting(
        &mut self,
        tokenizer: &Tokenizer,
        written: &[u32],
        listener: &mut Listener<'_>,
    ) -> Result<Vec<u32>, Error> {
        let capacity = self.session.capacity();
        let drops = self.options.overflow == Overflow::Drop;
        let room = match drops {
            true => (capacity / 8).min(self.options.limit).max(1),
            false => 1,
        };
        let mut most = capacity.saturating_sub(room);
        let mut forgotten = 0;
        loop {
            let mut prompt = self.template.prompt_ids(tokenizer, &self.messages)?;
            prompt.extend_from_slice(written);
            if prompt.len() <= most || (prompt.len() < capacity && self.oldest_turn().is_none()) {
                if forgotten > 0 {
                    let _ = listener(Event::Forgot(forgotten));
                }
                return Ok(prompt);
            }
            let wanted = prompt.len() + 1;
            match self.oldest_turn() {
                None => return Err(Error::TooLong { wanted, capacity }),
                Some(_) if !drops => return Err(Error::Full { wanted, capacity }),
                Some(turn) => drop(self.messages.drain(turn)),
            }
            forgotten += 1;
            // More than needed at once, since all that stays must be read again.
            most = most.min(capacity / 4 * 3);
        }
    }

    /// The oldest turn, as messages; `None` where the last one is the only one.
    fn oldest_turn(&self) -> Option<std::ops::Range<usize>> {
        let head = self.head();
        let next = self.messages.iter().skip(head + 1).position(is_question)?;
        Some(head..head + 1 + next)
    }

    /// Brings the session to hold exactly `prompt`, reading only what differs from what it holds. How many tokens were
    /// read, and whether it was stopped.
    fn read(
        &mut self,
        prompt: &[u32],
        listener: &mut Listener<'_>,
    ) -> Result<(usize, bool), Error> {
        let held = self.session.tokens().iter();
        let common = held.zip(prompt).take_while(|(a, b)| a == b).count();
        // The last token is always read: its logits are needed.
        let kept = common.min(prompt.len().saturating_sub(1));
        self.session.rewind(kept);
        let rest = &prompt[kept..];
        let (mut read, mut part) = (0, LEAST_PART);
        while listener(Event::Read(read, rest.len())).is_continue() {
            if read == rest.len() {
                return Ok((read, false));
            }
            let next = &rest[read..][..part.min(rest.len() - read)];
            let start = Instant::now();
            self.session.feed(next)?;
            read += next.len();
            let time = start.elapsed().as_secs_f64().max(1e-6);
            let patient = next.len() as f64 * PATIENCE.as_secs_f64() / time;
            // What a pass costs beside its tokens makes this too few at first.
            part = (patient as usize).clamp(part, PROMPT_BATCH);
        }
        Ok((read, true))
    }

    /// Writes on, to the answer's end or the context's.
    fn write(
        &mut self,
        answer: &mut Answer<'_>,
        written: &mut Vec<u32>,
        text: &mut String,
        listener: &mut Listener<'_>,
    ) -> Result<End, Error> {
        let left = self.options.limit - written.len().min(self.options.limit);
        let room = self.session.capacity() - self.session.tokens().len();
        let before = written.len();
        let generation = Generation::new(&mut self.session, &mut self.sampler, left.min(room));
        for token in generation.with_drafts(self.options.drafts) {
            let token = token?;
            written.push(token);
            let piece = answer.push(token);
            *text += &piece;
            let go = listener(Event::Text(&piece));
            if answer.stop().is_some() {
                return Ok(End::Stop);
            }
            if go.is_break() {
                return Ok(End::Stopped);
            }
        }
        let written = written.len() - before;
        Ok(match () {
            () if written < left.min(room) => End::Model,
            () if written == left => End::Limit,
            () => End::Full,
        })
    }
}

fn is_question(message: &Message) -> bool {
    message.role == "user"
}
