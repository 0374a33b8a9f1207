//! Where the messages of a conversation come from.
//!
//! A message is a line. It goes on in the next one after a backslash at a line's end, and between `"""` and `"""`;
//! on a terminal also where Alt-Enter is pressed, and where several lines are pasted.

use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Behavior, Cmd, Config, Context, Editor, Helper, KeyCode, KeyEvent, Modifiers};

use super::command;
use super::look::Look;
use crate::cli::common::{note, utf8};

/// Opens and closes a message of several lines.
const BLOCK: &str = "\"\"\"";

/// Where messages come from.
pub enum Input {
    /// A person, with editing and history.
    Terminal {
        editor: Box<Editor<Typing, DefaultHistory>>,
        /// Where the history is kept; `None` where there is no such place.
        history: Option<PathBuf>,
        /// As it is, and as it looks.
        prompt: (&'static str, Cow<'static, str>),
    },
    /// A pipe or a file, and how many lines have been read.
    Pipe(io::StdinLock<'static>, usize),
}

impl Input {
    pub fn new(look: &Look) -> anyhow::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe(io::stdin().lock(), 0));
        }
        let behavior = match io::stdout().is_terminal() {
            true => Behavior::Stdio,
            // Answers go elsewhere, what is typed must be seen.
            false => Behavior::PreferTerm,
        };
        let config = Config::builder().behavior(behavior);
        let mut editor = Editor::with_config(config.build()).context("standard input")?;
        editor.set_helper(Some(Typing));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        let history = history_path();
        if let Some(path) = &history {
            // There is none before the first conversation.
            let _ = editor.load_history(path);
        }
        Ok(Self::Terminal {
            editor: Box::new(editor),
            history,
            prompt: look.prompt("> "),
        })
    }

    /// Whether a person types.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next message, as it was typed; `None` at the end. Ctrl-C drops what was typed.
    pub fn read(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Pipe(stdin, lines) => {
                let mut text = String::new();
                loop {
                    let mut line = Vec::new();
                    let length = stdin
                        .read_until(b'\n', &mut line)
                        .context("standard input")?;
                    *lines += 1;
                    text += &utf8(line, format_args!("standard input, line {lines}"))?;
                    if length == 0 {
                        return Ok((!text.is_empty()).then_some(text));
                    }
                    let whole = text.trim_end_matches(['\n', '\r']);
                    if !is_open(whole) {
                        return Ok(Some(whole.to_owned()));
                    }
                }
            }
            Self::Terminal {
                editor,
                history,
                prompt,
            } => loop {
                match editor.readline(prompt) {
                    Ok(text) => {
                        remember(editor, &text, history.as_deref());
                        return Ok(Some(text));
                    }
                    Err(ReadlineError::Interrupted) => note("(Ctrl-D or /quit leaves)"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("standard input"),
                }
            },
        }
    }
}

/// Whether a message goes on in the next line.
fn is_open(text: &str) -> bool {
    match text.trim_start().strip_prefix(BLOCK) {
        Some(rest) => !rest.trim_end().ends_with(BLOCK),
        None => ends_in_backslash(text),
    }
}

/// Whether a text ends in a backslash that is not itself behind one.
fn ends_in_backslash(text: &str) -> bool {
    let slashes = text.bytes().rev().take_while(|&byte| byte == b'\\').count();
    slashes % 2 == 1
}

/// What a message says: without the marks that made it one.
pub fn content(text: &str) -> String {
    let block = text.trim().strip_prefix(BLOCK);
    if let Some(block) = block {
        let block = block.strip_suffix(BLOCK).unwrap_or(block);
        let block = block.strip_prefix('\n').unwrap_or(block);
        return block.strip_suffix('\n').unwrap_or(block).to_owned();
    }
    let mut content = String::new();
    for line in text.split_inclusive('\n') {
        let whole = line.strip_suffix('\n').unwrap_or(line);
        let whole = whole.strip_suffix('\r').unwrap_or(whole);
        match ends_in_backslash(whole) && line.len() > whole.len() {
            true => content.extend([&whole[..whole.len() - 1], "\n"]),
            false => content += line,
        }
    }
    content.trim().to_owned()
}

/// What the editor asks while a person types.
pub struct Typing;

impl Helper for Typing {}
impl Highlighter for Typing {}

impl Hinter for Typing {
    type Hint = String;
}

impl Validator for Typing {
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(match is_open(context.input()) {
            true => ValidationResult::Incomplete,
            false => ValidationResult::Valid(None),
        })
    }
}

impl Completer for Typing {
    type Candidate = String;

    /// Names of commands, and of what can be set.
    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..position];
        let start = typed.rfind(' ').map_or(0, |space| space + 1);
        let names = command::completions(&typed[..start]);
        let fits = |name: &String| name.starts_with(&typed[start..]);
        Ok((start, names.into_iter().filter(fits).collect()))
    }
}

/// Adds `text` to the history, and to its file: losing it is no reason to stop a conversation.
fn remember(editor: &mut Editor<Typing, DefaultHistory>, text: &str, path: Option<&Path>) {
    let added = editor.add_history_entry(text).unwrap_or(false);
    if let Some(path) = path.filter(|_| added) {
        let _ = path.parent().map(std::fs::create_dir_all);
        let _ = editor.append_history(path);
    }
}

/// `fewbit/history` in the user's folder for state, by the XDG base directory specification.
fn history_path() -> Option<PathBuf> {
    let folder = |name| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let state = folder("XDG_STATE_HOME").or_else(|| Some(folder("HOME")?.join(".local/state")))?;
    Some(state.join("fewbit/history"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_goes_on_after_a_backslash_and_in_a_block() {
        for (text, open) in [
            ("one line", false),
            ("one \\", true),
            ("a backslash \\\\", false),
            ("one \\\ntwo", false),
            ("\"\"\"", true),
            ("\"\"\"one\ntwo", true),
            ("\"\"\"one\ntwo\"\"\" ", false),
            ("\"\"\"\"\"\"", false),
            ("say \"\"\"", false),
        ] {
            assert_eq!(is_open(text), open, "{text:?}");
        }
    }

    #[test]
    fn what_makes_a_message_long_is_no_part_of_it() {
        assert_eq!(content(" one \\\ntwo \\\r\nthree "), "one \ntwo \nthree");
        assert_eq!(content("\"\"\"\n one\\\n\ntwo \n\"\"\""), " one\\\n\ntwo ");
        assert_eq!(content("\"\"\"cut off"), "cut off");
        assert_eq!(content("back\\slash\\"), "back\\slash\\");
    }
}
