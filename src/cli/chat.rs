//! `fewbit chat`: a conversation in the terminal.

mod command;
mod input;
mod interrupt;
mod look;
mod markdown;
mod screen;
mod talk;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::ValueEnum;

use super::common::{ModelArgs, at_least, context_of, file_stem, note, read_text, style, utf8};
use super::sampling::SamplingArgs;
use crate::chat::{Style, Template};
use crate::conversation::{self, Conversation};
use crate::engine::Engine;
use crate::sampler::Settings;
use input::Input;
use interrupt::Interrupt;
use look::Look;
use talk::{Constraints, Talk, Totals, text_or_file};

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
    /// System message at the head of the conversation; @FILE takes it from a file
    #[arg(long, visible_alias = "system-prompt", value_name = "TEXT")]
    system: Option<String>,
    /// The first message is what this file holds, all of it, and is answered at once; - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Keep the conversation in this file, with all that was read and written: taken up from it at once if it is there,
    /// and saved to it when the conversation ends (and after each answer, as long as that takes no time)
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// When the context is full: drop forgets the oldest turns, never the system message; refuse forgets nothing
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Overflow::Drop)]
    overflow: Overflow,
    /// End an answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Show answers as they are written, not as the Markdown that they are
    #[arg(long)]
    no_markdown: bool,
    /// Chat template by name, instead of the file's own
    #[arg(long, visible_alias = "chat-template", value_name = "NAME", value_parser = style)]
    template: Option<Style>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[cfg(feature = "grammar")]
    #[command(flatten)]
    shape: super::shape::ShapeArgs,
}

/// See [`conversation::Overflow`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Overflow {
    Drop,
    Refuse,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let system = args.system.as_deref().map(text_or_file).transpose()?;
    let first = args.file.as_deref().map(whole_file).transpose()?;
    let engine = args.model.load(args.ctx)?;
    let look = Look::of_environment();
    let mut input = Input::new(&look)?;
    let at_terminal = input.is_terminal();
    let mut talk = Talk {
        conversation: conversation(&args, &engine)?,
        constraints: constraints(&args, &engine)?,
        interrupt: Interrupt::install(!at_terminal)?,
        look,
        forgiving: at_terminal,
        markdown: !args.no_markdown,
        file: args.session.clone(),
        keep: args.session.clone(),
        totals: Totals::default(),
    };
    if at_terminal {
        let name = file_stem(args.model.path());
        let template = talk.conversation.template().name();
        note(format_args!(
            "{name}: {template} template. /help lists what can be typed."
        ));
    }
    if let Some(path) = args.session.as_deref().filter(|path| path.exists()) {
        talk.load(path)?;
        // What is asked for now counts more than what was then.
        let settings = talk
            .conversation
            .settings()
            .with(&args.sampling.changes())?;
        let seed = args.sampling.seed().unwrap_or(settings.seed);
        talk.conversation.change(Settings { seed, ..settings });
    }
    if system.is_some() {
        talk.conversation.set_system(system);
    }
    let went = match first {
        Some(first) => talk.ask(first),
        None => Ok(()),
    };
    let went = went.and_then(|()| talk.go_on(&mut input));
    // Whatever ended it.
    let saved = args
        .session
        .as_deref()
        .map_or(Ok(()), |path| talk.save(path));
    went.and(saved)
}

/// The text in a file, or on standard input. A line's end belongs to the file, not to the message.
fn whole_file(path: &Path) -> anyhow::Result<String> {
    let text = match path.to_str() {
        Some("-") => {
            let mut bytes = Vec::new();
            let read = std::io::stdin().lock().read_to_end(&mut bytes);
            read.context("standard input: cannot read the first message")?;
            utf8(bytes, "standard input")?
        }
        _ => read_text(path)?,
    };
    let text = text.trim_end();
    anyhow::ensure!(
        !text.is_empty(),
        "{}: there is no text in it",
        path.display()
    );
    Ok(text.to_owned())
}

fn conversation(args: &Args, engine: &Arc<Engine>) -> anyhow::Result<Conversation> {
    let tokenizer = engine.tokenizer();
    let template = match args.template {
        None => Template::from_metadata(&engine.gguf().metadata, tokenizer)?,
        Some(style) => Template::from_style(style, tokenizer),
    };
    let session = engine.session(context_of(engine, args.ctx))?;
    let options = conversation::Options {
        limit: args.n.unwrap_or(usize::MAX),
        drafts: args.sampling.drafts(),
        stops: args.stop.clone(),
        overflow: match args.overflow {
            Overflow::Drop => conversation::Overflow::Drop,
            Overflow::Refuse => conversation::Overflow::Refuse,
        },
    };
    let settings = args.sampling.settings();
    Ok(Conversation::new(session, template, settings, options))
}

#[cfg(feature = "grammar")]
fn constraints(args: &Args, engine: &Arc<Engine>) -> anyhow::Result<Constraints> {
    use crate::grammar::Grammars;
    let Some(grammar) = args.shape.grammar()? else {
        return Ok(Box::new(|| Ok(None)));
    };
    let grammars = Grammars::new(engine.tokenizer())?;
    // A wrong grammar shows now.
    grammars.constraint(&grammar)?;
    Ok(Box::new(move || Ok(Some(grammars.constraint(&grammar)?))))
}

#[cfg(not(feature = "grammar"))]
fn constraints(_: &Args, _: &Arc<Engine>) -> anyhow::Result<Constraints> {
    Ok(Box::new(|| Ok(None)))
}
