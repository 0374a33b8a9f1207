//! `fewbit chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context;
use rustyline::error::ReadlineError;

use super::common::{ModelArgs, SamplingArgs};
use crate::chat::{Message, Style, Template};
use crate::engine::{Engine, Session};
use crate::sampler::{Generation, Sampler};

/// Options of `fewbit chat`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Context: tokens of the whole conversation
    #[arg(short, long, value_name = "N", default_value_t = 4096)]
    ctx: usize,
    /// Tokens of an answer at most [default: until the context is full]
    #[arg(short, long, value_name = "TOKENS")]
    n: Option<usize>,
    /// System message at the head of the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Chat template by name, instead of the file's own
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
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
    let engine = args.model.load()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || flag.store(true, Ordering::SeqCst))
        .context("cannot catch Ctrl-C")?;

    let mut input = Input::new()?;
    let mut chat = Chat::new(&args, &engine, interrupted)?;
    if let Input::Terminal(_) = input {
        println!(
            "{}: {} template. /help lists what can be typed.",
            name(args.model.path()),
            chat.template.name()
        );
    }
    while let Some(line) = input.read()? {
        match line.trim() {
            "" => {}
            "/quit" | "/exit" => break,
            "/reset" => {
                chat.reset();
                println!("The conversation starts anew.");
            }
            "/help" => println!("{HELP}"),
            command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                println!("There is no {command}; /help lists what there is.");
            }
            text => chat.answer(text)?,
        }
    }
    Ok(())
}

fn name(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A conversation and the session that holds it.
struct Chat {
    session: Session,
    sampler: Sampler,
    template: Template,
    /// The system message, if any, then turns of user and assistant.
    messages: Vec<Message>,
    /// How many messages a reset keeps.
    kept: usize,
    limit: usize,
    interrupted: Arc<AtomicBool>,
}

impl Chat {
    fn new(
        args: &Args,
        engine: &Arc<Engine>,
        interrupted: Arc<AtomicBool>,
    ) -> anyhow::Result<Self> {
        let tokenizer = engine.tokenizer();
        let template = match &args.template {
            None => Template::from_metadata(&engine.gguf().metadata, tokenizer)?,
            Some(name) => {
                let style = Style::named(name).with_context(|| {
                    format!(
                        "no chat template named {name:?}; there are: {}",
                        Style::names()
                    )
                })?;
                Template::from_style(style, tokenizer)
            }
        };
        let messages: Vec<_> = args.system.iter().map(Message::system).collect();
        Ok(Self {
            session: engine.session(args.ctx)?,
            sampler: Sampler::new(args.sampling.settings()),
            template,
            kept: messages.len(),
            messages,
            limit: args.n.unwrap_or(usize::MAX),
            interrupted,
        })
    }

    fn reset(&mut self) {
        self.messages.truncate(self.kept);
    }

    /// Answers `text`, printing as tokens come. A turn that does not fit is taken back.
    fn answer(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(Message::user(text));
        match self.generate() {
            Ok(answer) => {
                self.messages.push(Message::assistant(answer));
                Ok(())
            }
            Err(error) if error.downcast_ref::<std::io::Error>().is_some() => Err(error),
            Err(error) => {
                self.messages.pop();
                eprintln!("fewbit: {error:#}; /reset starts anew");
                Ok(())
            }
        }
    }

    fn generate(&mut self) -> anyhow::Result<String> {
        let engine = Arc::clone(self.session.engine());
        let tokenizer = engine.tokenizer();
        let prompt = self.template.prompt_ids(tokenizer, &self.messages)?;
        let fed = feed_rest(&mut self.session, &prompt)?;

        self.interrupted.store(false, Ordering::SeqCst);
        let room = self.session.capacity() - self.session.tokens().len();
        let mut out = std::io::stdout().lock();
        let mut stream = tokenizer.stream();
        let mut answer = String::new();
        let mut tokens = 0;
        let start = Instant::now();
        for token in Generation::new(&mut self.session, &mut self.sampler, self.limit.min(room)) {
            let piece = stream.push(token?);
            tokens += 1;
            // A model's answer often begins with a space that belongs to the template.
            let piece = if answer.is_empty() {
                piece.trim_start()
            } else {
                &piece
            };
            out.write_all(piece.as_bytes())?;
            out.flush()?;
            answer.push_str(piece);
            if self.interrupted.load(Ordering::SeqCst) {
                break;
            }
        }
        let time = start.elapsed().as_secs_f64();
        let tail = stream.finish();
        answer.push_str(&tail);
        writeln!(out, "{tail}")?;
        if std::io::stderr().is_terminal() {
            let used = self.session.tokens().len();
            let full = if tokens == room {
                " (the context is full: /reset)"
            } else {
                ""
            };
            eprintln!(
                "\x1b[2m[{fed} tokens read, {tokens} written, {:.1} tok/s; context {used} of {}{full}]\x1b[0m",
                tokens as f64 / time.max(1e-9),
                self.session.capacity()
            );
        }
        Ok(answer)
    }
}

/// Brings `session` to hold exactly `prompt`, feeding only what differs from what it holds;
/// returns how many tokens were fed.
fn feed_rest(session: &mut Session, prompt: &[u32]) -> anyhow::Result<usize> {
    let common = session
        .tokens()
        .iter()
        .zip(prompt)
        .take_while(|(a, b)| a == b)
        .count();
    // The last token is always fed: its logits are needed.
    let kept = common.min(prompt.len().saturating_sub(1));
    session.rewind(kept);
    session.feed(&prompt[kept..])?;
    Ok(prompt.len() - kept)
}

/// Where lines come from.
enum Input {
    /// A person, with editing and history.
    Terminal(Box<rustyline::DefaultEditor>),
    /// A pipe or a file.
    Pipe(std::io::Lines<std::io::StdinLock<'static>>),
}

impl Input {
    fn new() -> anyhow::Result<Self> {
        Ok(match std::io::stdin().is_terminal() {
            true => Self::Terminal(Box::new(rustyline::DefaultEditor::new()?)),
            false => Self::Pipe(std::io::stdin().lock().lines()),
        })
    }

    /// The next line; `None` at the end. Ctrl-C drops what was typed.
    fn read(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Pipe(lines) => Ok(lines.next().transpose()?),
            Self::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        editor.add_history_entry(&line)?;
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => println!("(Ctrl-D or /quit leaves)"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            },
        }
    }
}
