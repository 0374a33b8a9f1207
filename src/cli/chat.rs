//! `fewbit chat`: a conversation in the terminal.

mod input;
mod interrupt;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;

use super::common::{
    CacheUse, ModelArgs, STDOUT, at_least, context_of, file_stem, note, speed, style,
};
use super::one_line;
use super::sampling::SamplingArgs;
use crate::answer::Answer;
use crate::chat::{Message, Style, Template};
use crate::engine::{self, Engine, Session};
use crate::experts::Cache;
use crate::generation::Generation;
use crate::plan::PROMPT_BATCH;
use crate::sampler::Sampler;
use input::Input;
use interrupt::Interrupt;

/// Options of `fewbit chat`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Context: tokens of the whole conversation [default: 4096, or what the model was trained for if that is less]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    ctx: Option<usize>,
    /// Tokens of an answer at most [default: until the context is full]
    #[arg(
        short,
        long = "predict",
        visible_alias = "n-predict",
        value_name = "TOKENS",
        allow_negative_numbers = true,
        value_parser = at_least(0)
    )]
    n: Option<usize>,
    /// System message at the head of the conversation
    #[arg(long, visible_alias = "system-prompt", value_name = "TEXT")]
    system: Option<String>,
    /// Chat template by name, instead of the file's own
    #[arg(long, visible_alias = "chat-template", value_name = "NAME", value_parser = style)]
    template: Option<Style>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const HELP: &str = "\
/reset   forget the conversation
/quit    leave (Ctrl-D too)
/help    this list
Ctrl-C   stops an answer";

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let engine = args.model.load(args.ctx)?;
    let mut input = Input::new()?;
    let at_terminal = input.is_terminal();
    let interrupt = Interrupt::install(!at_terminal)?;
    let mut chat = Chat::new(&args, &engine, interrupt)?;
    if at_terminal {
        let name = file_stem(args.model.path());
        let template = chat.template.name();
        say(&format!(
            "{name}: {template} template. /help lists what can be typed."
        ))?;
    }
    while let Some(line) = input.read()? {
        match line.trim() {
            "" => {}
            "/quit" | "/exit" => break,
            "/reset" => {
                chat.reset();
                say("The conversation starts anew.")?;
            }
            "/help" => say(HELP)?,
            command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                say(&format!(
                    "There is no {command}; /help lists what there is."
                ))?;
            }
            text => match chat.answer(text) {
                // A person can go on from here; a script must know.
                Err(error) if at_terminal && error.downcast_ref::<io::Error>().is_none() => {
                    let full = matches!(
                        error.downcast_ref(),
                        Some(engine::Error::ContextFull { .. })
                    );
                    let advice = if full { "; /reset starts anew" } else { "" };
                    note(format_args!("fewbit: {}{advice}", one_line(&error)));
                }
                result => result?,
            },
        }
    }
    Ok(())
}

/// Prints a line of the program's own.
fn say(line: &str) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{line}").context(STDOUT)
}

/// A conversation and the session that holds it.
struct Chat {
    session: Session,
    sampler: Sampler,
    template: Template,
    /// What the template writes between a prompt and its answer.
    lead: String,
    /// The system message, if any, then turns of user and assistant.
    messages: Vec<Message>,
    /// How many messages a reset keeps.
    kept: usize,
    limit: usize,
    /// Tokens guessed ahead at most.
    drafts: usize,
    interrupt: Interrupt,
}

impl Chat {
    fn new(args: &Args, engine: &Arc<Engine>, interrupt: Interrupt) -> anyhow::Result<Self> {
        let tokenizer = engine.tokenizer();
        let template = match args.template {
            None => Template::from_metadata(&engine.gguf().metadata, tokenizer)?,
            Some(style) => Template::from_style(style, tokenizer),
        };
        let messages: Vec<_> = args.system.iter().map(Message::system).collect();
        Ok(Self {
            session: engine.session(context_of(engine, args.ctx))?,
            sampler: Sampler::new(args.sampling.settings()).with_vocabulary(tokenizer),
            lead: template.lead(),
            template,
            kept: messages.len(),
            messages,
            limit: args.n.unwrap_or(usize::MAX),
            drafts: args.sampling.drafts(),
            interrupt,
        })
    }

    fn reset(&mut self) {
        self.messages.truncate(self.kept);
    }

    /// Answers `text`, printing as tokens come. A turn that does not fit, or that is stopped
    /// before it was read, is taken back.
    fn answer(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(Message::user(text));
        self.interrupt.start();
        let answer = self.generate();
        self.interrupt.end();
        match answer {
            Ok(Some(answer)) => self.messages.push(Message::assistant(answer)),
            Ok(None) => {
                self.messages.pop();
                note("(stopped; the message is taken back)");
            }
            Err(error) => {
                self.messages.pop();
                return Err(error);
            }
        }
        Ok(())
    }

    /// The answer to the messages; `None` if it was stopped before they were read.
    fn generate(&mut self) -> anyhow::Result<Option<String>> {
        let engine = Arc::clone(self.session.engine());
        let tokenizer = engine.tokenizer();
        let prompt = self.template.prompt_ids(tokenizer, &self.messages)?;
        let Some(read) = self.feed_rest(&prompt)? else {
            return Ok(None);
        };

        let room = self.session.capacity() - prompt.len();
        let mut out = io::stdout().lock();
        let mut text = Answer::to(&prompt, &self.lead, tokenizer);
        let before = engine.expert_cache().map(Cache::counters);
        let fed_before = self.session.tokens().len();
        let mut answer = String::new();
        let mut written = 0;
        let start = Instant::now();
        let limit = self.limit.min(room);
        let generation = Generation::new(&mut self.session, &mut self.sampler, limit);
        for token in generation.with_drafts(self.drafts) {
            let piece = text.push(token?);
            written += 1;
            out.write_all(piece.as_bytes())
                .and_then(|()| out.flush())
                .context(STDOUT)?;
            answer.push_str(&piece);
            if self.interrupt.wanted() {
                break;
            }
        }
        let speed = speed(self.session.tokens().len() - prompt.len(), start.elapsed());
        let tail = text.finish();
        answer.push_str(&tail);
        writeln!(out, "{tail}").context(STDOUT)?;
        let full = written == room;
        if io::stderr().is_terminal() {
            let used = self.session.tokens().len();
            let capacity = self.session.capacity();
            let speed = speed.map_or(String::new(), |speed| format!(", {speed:.1} tok/s"));
            let full = if full { " (full: /reset)" } else { "" };
            let cache = CacheUse::since(&engine, before, used - fed_before);
            let cache = cache.map_or(String::new(), |cache| format!("; {cache}"));
            note(format_args!(
                "\x1b[2m[{read} tokens read, {written} written{speed}{cache}; context {used} of {capacity}{full}]\x1b[0m"
            ));
        } else if full {
            note("fewbit: the answer is cut: the context is full; raise --ctx");
        }
        Ok(Some(answer))
    }

    /// Brings the session to hold exactly `prompt`, feeding only what differs from what it
    /// holds; returns how many tokens were fed, `None` if it was stopped.
    fn feed_rest(&mut self, prompt: &[u32]) -> anyhow::Result<Option<usize>> {
        let capacity = self.session.capacity();
        if prompt.len() > capacity {
            // Before any part of it is computed.
            let wanted = prompt.len();
            return Err(engine::Error::ContextFull { wanted, capacity }.into());
        }
        let held = self.session.tokens().iter();
        let common = held.zip(prompt).take_while(|(a, b)| a == b).count();
        // The last token is always fed: its logits are needed.
        let kept = common.min(prompt.len().saturating_sub(1));
        self.session.rewind(kept);
        for part in prompt[kept..].chunks(PROMPT_BATCH) {
            if self.interrupt.wanted() {
                return Ok(None);
            }
            self.session.feed(part)?;
        }
        Ok((!self.interrupt.wanted()).then_some(prompt.len() - kept))
    }
}
