//! What is done with what was typed: questions are answered, commands obeyed.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::ProgressBar;
use serde_json::{Map, Value};

use super::command::{self, Command, HELP};
use super::input::{Input, content};
use super::interrupt::Interrupt;
use super::look::Look;
use super::screen::Screen;
use crate::cli::common::{
    CacheUse, STDOUT, bytes, file_stem, file_type, note, progress, read_text, speed,
};
use crate::cli::one_line;
use crate::conversation::{Conversation, End, Error, Event, Overflow, Reply};
use crate::engine::Engine;
use crate::experts::{Cache, Counters};
use crate::sampler::Constraint;

/// Fewer tokens than these are read without a bar.
const SHORT: usize = 128;

/// How long a conversation may take to be kept after each answer.
const BRIEF: Duration = Duration::from_millis(300);

/// Makes the constraint that each answer begins with.
pub type Constraints = Box<dyn Fn() -> anyhow::Result<Option<Box<dyn Constraint>>>>;

/// A conversation with a person or a pipe.
pub struct Talk {
    pub conversation: Conversation,
    pub constraints: Constraints,
    pub interrupt: Interrupt,
    pub look: Look,
    /// Whether a person can see what went wrong and go on; a script must know.
    pub forgiving: bool,
    /// Whether answers are shown as the Markdown that they are.
    pub markdown: bool,
    /// The file of `--session`, or that was saved or loaded last.
    pub file: Option<PathBuf>,
    /// Where the conversation is kept after each answer, too, as long as that takes no time.
    pub keep: Option<PathBuf>,
    pub totals: Totals,
}

/// What was done since the beginning.
#[derive(Default)]
pub struct Totals {
    read: usize,
    reading: Duration,
    written: usize,
    fed: usize,
    writing: Duration,
}

/// Whether the conversation goes on.
pub type Flow = ControlFlow<()>;

impl Talk {
    /// Obeys and answers until the end of `input`.
    pub fn go_on(&mut self, input: &mut Input) -> anyhow::Result<()> {
        while let Some(text) = input.read()? {
            if self.take(&text)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Obeys or answers what was typed.
    pub fn take(&mut self, text: &str) -> anyhow::Result<Flow> {
        let done = match command::parse(text) {
            Some(Ok(Command::Quit)) => return Ok(Flow::Break(())),
            Some(Ok(command)) => self.obey(command),
            Some(Err(problem)) => Err(anyhow::anyhow!(problem)),
            None => match content(text) {
                question if question.is_empty() => Ok(()),
                question => self.answer(|conversation, constraint, listener| {
                    conversation.ask(question, constraint, listener).map(Some)
                }),
            },
        };
        match done {
            // That nobody sees answers any more ends it.
            Err(error) if self.forgiving && error.to_string() != STDOUT => {
                note(format_args!("fewbit: {}", one_line(&error)));
            }
            result => result?,
        }
        Ok(Flow::Continue(()))
    }

    /// Answers a question that came with the command.
    pub fn ask(&mut self, question: String) -> anyhow::Result<()> {
        self.answer(|conversation, constraint, listener| {
            conversation.ask(question, constraint, listener).map(Some)
        })
    }

    fn obey(&mut self, command: Command) -> anyhow::Result<()> {
        match command {
            Command::Quit => {}
            Command::Help => note(HELP),
            Command::ShowSystem => match self.conversation.system() {
                Some(system) => note(system),
                None => note("There is no system message."),
            },
            Command::System(text) => {
                let text = text.map(|text| text_or_file(&text)).transpose()?;
                self.conversation.set_system(text);
                note("From the next answer on.");
            }
            Command::Reset => {
                self.conversation.reset();
                note("The conversation starts anew.");
            }
            Command::Undo => match self.conversation.undo() {
                Some(question) => {
                    let turns = count(self.conversation.turns(), "question");
                    note(format_args!(
                        "Taken back: {} ({turns} left)",
                        first_line(&question)
                    ));
                }
                None => note("There is nothing to take back."),
            },
            Command::Retry => {
                if self.conversation.turns() == 0 {
                    note("There is nothing to answer anew.");
                    return Ok(());
                }
                self.answer(|conversation, constraint, listener| {
                    conversation.retry(constraint, listener)
                })?;
            }
            Command::Save(path) => {
                let path = self.file(path, "save")?;
                self.save(&path)?;
                self.file = Some(path);
            }
            Command::Load(path) => {
                let path = self.file(path, "load")?;
                self.load(&path)?;
                self.file = Some(path);
            }
            Command::ShowSettings => self.show_settings(),
            Command::Set(name, value) => {
                self.set(&name, &value)?;
            }
            Command::Stats => self.show_stats(),
        }
        Ok(())
    }

    /// The file that a command names, or the one that was used before.
    fn file(&self, named: Option<String>, command: &str) -> anyhow::Result<PathBuf> {
        let named = named.map(PathBuf::from).or_else(|| self.file.clone());
        named.with_context(|| format!("/{command} lacks the name of a file"))
    }

    /// Keeps the conversation, in case that it ends otherwise than by being left. Once that takes too long, no more.
    fn keep(&mut self) -> anyhow::Result<()> {
        if let Some(path) = &self.keep {
            let start = Instant::now();
            self.conversation.save(path)?;
            if start.elapsed() > BRIEF {
                self.keep = None;
            }
        }
        Ok(())
    }

    /// Writes the conversation to its file.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let start = Instant::now();
        self.conversation.save(path)?;
        let size = std::fs::metadata(path).map_or(0, |file| file.len());
        note(format_args!(
            "Saved to {}: {}, {} in {:.1} s",
            path.display(),
            self.extent(),
            bytes(size),
            start.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    /// Takes up the conversation in a file.
    pub fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let start = Instant::now();
        self.conversation.load(path)?;
        note(format_args!(
            "Taken up from {}: {} in {:.1} s",
            path.display(),
            self.extent(),
            start.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    /// How far the conversation has come, in words.
    fn extent(&self) -> String {
        let tokens = self.conversation.session().tokens().len();
        format!(
            "{}, {}",
            count(self.conversation.turns(), "question"),
            count(tokens, "token")
        )
    }

    /// Has an answer written, and says how it went.
    fn answer(
        &mut self,
        ask: impl FnOnce(
            &mut Conversation,
            Option<Box<dyn Constraint>>,
            &mut dyn FnMut(Event<'_>) -> Flow,
        ) -> Result<Option<Reply>, Error>,
    ) -> anyhow::Result<()> {
        let constraint = (self.constraints)()?;
        let engine = Arc::clone(self.conversation.session().engine());
        let before = engine.expert_cache().map(Cache::counters);
        let mut screen = Screen::new(&self.look, self.markdown);
        let mut failed = None;
        let mut bar: Option<ProgressBar> = None;
        let (interrupt, look) = (&self.interrupt, self.look);
        let mut begun = false;
        let mut listener = |event: Event<'_>| {
            match event {
                Event::Forgot(turns) => {
                    let turns = match turns {
                        1 => "the oldest question and its answer are".to_owned(),
                        turns => format!("the {turns} oldest questions and their answers are"),
                    };
                    let line = format!("({turns} forgotten: the context is full)");
                    // In the middle of an answer, too.
                    let broken = if begun { screen.pause() } else { Ok(()) };
                    failed = failed.take().or(broken.err());
                    note(look.faint(&line));
                }
                Event::Read(read, all) => {
                    if read == 0 && all > SHORT && look.status {
                        bar = Some(progress(all as u64, "reading {wide_bar} {pos}/{len} {eta}"));
                    }
                    if let Some(bar) = &bar {
                        bar.set_position(read as u64);
                    }
                    if read == all {
                        drop(bar.take());
                    }
                }
                Event::Text(text) => {
                    begun |= !text.is_empty();
                    failed = failed.take().or(screen.push(text).err());
                }
            }
            match interrupt.wanted() || failed.is_some() {
                true => Flow::Break(()),
                false => Flow::Continue(()),
            }
        };
        self.interrupt.start();
        let quiet = Quiet::begin();
        let reply = ask(&mut self.conversation, constraint, &mut listener);
        drop(quiet);
        self.interrupt.end();
        drop(bar);
        if begun {
            failed = failed.or(screen.finish().err());
        }
        if let Some(error) = failed {
            return Err(error).context(STDOUT);
        }
        match reply {
            Ok(Some(reply)) => {
                if !begun && reply.end != End::TakenBack {
                    screen.finish().context(STDOUT)?;
                }
                self.report(&reply, before);
                self.keep()
            }
            Ok(None) => Ok(()),
            Err(error @ Error::Full { .. }) if self.forgiving => Err(anyhow::anyhow!(
                "{error}; /undo or /reset make room, /set overflow drop forgets the oldest turns"
            )),
            Err(error @ Error::Full { .. }) => Err(anyhow::anyhow!(
                "{error}; raise --ctx, or forget the oldest turns by --overflow drop"
            )),
            Err(error @ Error::TooLong { .. }) => {
                Err(anyhow::anyhow!("{error}; raise --ctx or shorten it"))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The line after an answer.
    fn report(&mut self, reply: &Reply, before: Option<Counters>) {
        let totals = &mut self.totals;
        totals.read += reply.read;
        totals.reading += reply.reading;
        totals.written += reply.written;
        totals.fed += reply.fed;
        totals.writing += reply.writing;
        let why = match reply.end {
            End::Model | End::Stop => "",
            End::Limit => "; ended by -n",
            End::Full => "; the context is full",
            End::Stopped => "; stopped",
            End::TakenBack => {
                note("(stopped; the question is taken back)");
                return;
            }
        };
        let session = self.conversation.session();
        let engine = session.engine();
        if self.look.status {
            let (used, capacity) = (session.tokens().len(), session.capacity());
            let speed = speed(reply.fed, reply.writing);
            let speed = speed.map_or(String::new(), |speed| format!(", {speed:.1} tok/s"));
            let cache = CacheUse::since(engine, before, reply.read + reply.fed);
            let cache = cache.map_or(String::new(), |cache| format!("; {cache}"));
            let line = format!(
                "[{} read, {} written{speed}; context {used} of {capacity}{cache}{why}]",
                count(reply.read, "token"),
                reply.written
            );
            note(self.look.faint(&line));
        } else if reply.end == End::Full {
            note("fewbit: the answer is cut: the context is full; raise --ctx");
        }
    }

    fn show_settings(&self) {
        let settings = serde_json::to_value(self.conversation.settings());
        let Ok(Value::Object(fields)) = settings else {
            return;
        };
        let options = &self.conversation.options;
        for (name, value) in fields {
            let value = match value {
                Value::Array(items) if name == "samplers" => {
                    let names: Vec<_> = items.iter().filter_map(Value::as_str).collect();
                    names.join(";")
                }
                value => value.to_string(),
            };
            note(format_args!("{name:<22} {value}"));
        }
        let limit = match options.limit {
            usize::MAX => "until the context is full".to_owned(),
            limit => limit.to_string(),
        };
        let seed = self.conversation.settings().seed;
        let overflow = overflow_name(options.overflow);
        for (name, value) in [
            ("n", limit),
            ("seed", seed.to_string()),
            ("stop", serde_json::json!(options.stops).to_string()),
            ("draft", options.drafts.to_string()),
            ("overflow", overflow.to_owned()),
            ("markdown", on_off(self.markdown).to_owned()),
        ] {
            note(format_args!("{name:<22} {value}"));
        }
    }

    fn set(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        let number = || {
            let number = value.parse::<usize>();
            number.with_context(|| format!("{name}: must be a whole number, 0 or more"))
        };
        let options = &mut self.conversation.options;
        match name {
            "n" | "predict" | "n_predict" => {
                options.limit = match value {
                    "-1" => usize::MAX,
                    _ => number()?,
                }
            }
            "draft" => options.drafts = number()?,
            "stop" => {
                options.stops = match serde_json::from_str::<Vec<String>>(value) {
                    Ok(stops) => stops,
                    Err(_) => vec![value.to_owned()],
                }
            }
            "overflow" => {
                options.overflow = match value {
                    "drop" => Overflow::Drop,
                    "refuse" => Overflow::Refuse,
                    _ => anyhow::bail!("overflow: must be drop or refuse"),
                }
            }
            "markdown" => {
                self.markdown = match value {
                    "on" | "true" => true,
                    "off" | "false" => false,
                    _ => anyhow::bail!("markdown: must be on or off"),
                }
            }
            "seed" => {
                let seed = value.parse().ok();
                let seed = seed.context("seed: must be a whole number, 0 or more")?;
                let settings = self.conversation.settings().clone();
                self.conversation
                    .change(crate::sampler::Settings { seed, ..settings });
            }
            _ => self.set_sampler(name, value)?,
        }
        Ok(())
    }

    fn set_sampler(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        let name = match name {
            "temp" => "temperature",
            "typical" => "typical_p",
            name => name,
        };
        if !command::settings().iter().any(|known| known == name) {
            anyhow::bail!("there is no setting {name}; /set lists what there is");
        }
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.into()));
        let fields = Map::from_iter([(name.to_owned(), value)]);
        let settings = self.conversation.settings().with(&fields)?;
        self.conversation.change(settings);
        Ok(())
    }

    fn show_stats(&self) {
        let conversation = &self.conversation;
        let session = conversation.session();
        let engine: &Arc<Engine> = session.engine();
        let (used, capacity) = (session.tokens().len(), session.capacity());
        let rate = |tokens: usize, time| {
            speed(tokens, time).map_or(String::new(), |speed| format!(", {speed:.1} tok/s"))
        };
        let totals = &self.totals;
        let line = |name: &str, what: String| note(format_args!("{name:<9} {what}"));
        line(
            "model",
            format!(
                "{} ({}), template {}",
                file_stem(engine.path()),
                file_type(engine.gguf()),
                conversation.template().name()
            ),
        );
        line("turns", count(conversation.turns(), "question"));
        line(
            "context",
            format!(
                "{used} of {capacity} tokens; keys and values in {}, {}",
                session.kv_kind().block_type().name(),
                bytes(session.kv_bytes(used).unwrap_or(0))
            ),
        );
        line(
            "read",
            count(totals.read, "token") + &rate(totals.read, totals.reading),
        );
        line(
            "written",
            count(totals.written, "token") + &rate(totals.fed, totals.writing),
        );
        line(
            "engine",
            format!(
                "{} kernels, {}",
                engine.kernels(),
                count(engine.pool().threads(), "thread")
            ),
        );
        let beginning = engine.expert_cache().map(|_| Counters::default());
        if let Some(cache) = CacheUse::since(engine, beginning, totals.read + totals.fed) {
            line("experts", cache.to_string());
        }
    }
}

/// The text that an option or a command gives, or that of the file behind an `@`.
pub fn text_or_file(text: &str) -> anyhow::Result<String> {
    match text.strip_prefix('@') {
        Some(path) => Ok(read_text(Path::new(path))?.trim_end().to_owned()),
        None => Ok(text.to_owned()),
    }
}

/// A number of things.
fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn overflow_name(overflow: Overflow) -> &'static str {
    match overflow {
        Overflow::Drop => "drop",
        Overflow::Refuse => "refuse",
    }
}

/// The beginning of a text, to remind of it.
fn first_line(text: &str) -> String {
    const MOST: usize = 60;
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None if line.len() < text.len() => format!("{line}…"),
        None => line.to_owned(),
    }
}

/// While this lives, what is typed is not shown: it would stand in the middle of an answer. It is there for the next
/// message all the same.
struct Quiet {
    #[cfg(unix)]
    was: Option<rustix::termios::Termios>,
}

impl Quiet {
    #[cfg(unix)]
    fn begin() -> Self {
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let stdin = io::stdin();
        let was = tcgetattr(&stdin).ok();
        if let Some(mut modes) = was.clone() {
            modes.local_modes.remove(LocalModes::ECHO);
            let _ = tcsetattr(&stdin, OptionalActions::Now, &modes);
        }
        Self { was }
    }

    #[cfg(not(unix))]
    fn begin() -> Self {
        Self {}
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Some(was) = &self.was {
            use rustix::termios::{OptionalActions, tcsetattr};
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, was);
        }
    }
}
