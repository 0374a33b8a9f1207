//! Where the lines of a conversation come from.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::cli::common::{STDOUT, utf8};

/// Where lines come from.
pub enum Input {
    /// A person, with editing and history.
    Terminal {
        editor: Box<DefaultEditor>,
        /// Where the history is kept; `None` where there is no such place.
        history: Option<PathBuf>,
    },
    /// A pipe or a file, and how many lines have been read.
    Pipe(io::StdinLock<'static>, usize),
}

impl Input {
    pub fn new() -> anyhow::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe(io::stdin().lock(), 0));
        }
        let mut editor = DefaultEditor::new().context("standard input")?;
        let history = history_path();
        if let Some(path) = &history {
            // There is none before the first conversation.
            let _ = editor.load_history(path);
        }
        Ok(Self::Terminal {
            editor: Box::new(editor),
            history,
        })
    }

    /// Whether a person types.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next line; `None` at the end. Ctrl-C drops what was typed.
    pub fn read(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Pipe(stdin, lines) => {
                let mut line = Vec::new();
                let length = stdin
                    .read_until(b'\n', &mut line)
                    .context("standard input")?;
                *lines += 1;
                let source = || format!("standard input, line {lines}");
                (length > 0).then(|| utf8(line, source())).transpose()
            }
            Self::Terminal { editor, history } => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        remember(editor, &line, history.as_deref());
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => {
                        writeln!(io::stdout(), "(Ctrl-D or /quit leaves)").context(STDOUT)?;
                    }
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("standard input"),
                }
            },
        }
    }
}

/// Adds `line` to the history, and to its file: losing it is no reason to stop a conversation.
fn remember(editor: &mut DefaultEditor, line: &str, path: Option<&Path>) {
    let added = editor.add_history_entry(line).unwrap_or(false);
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
