//! Answers on standard output.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use terminal_size::{Height, Width, terminal_size};

use super::look::Look;
use super::markdown::{Markdown, Size};

/// Prints an answer as it comes.
pub enum Screen {
    /// As it is: into a pipe or a file.
    Pipe,
    /// On a terminal, as it is but for what would steer the terminal.
    Plain {
        /// Whether the cursor is at the beginning of a row.
        fresh: bool,
    },
    /// On a terminal that moves its cursor, laid out.
    Laid(Box<Markdown>),
}

impl Screen {
    /// The screen for an answer.
    pub fn new(look: &Look, markdown: bool) -> Self {
        match io::stdout().is_terminal() {
            true if markdown && look.screen => {
                Self::Laid(Box::new(Markdown::new(size(), look.colour)))
            }
            true => Self::Plain { fresh: true },
            false => Self::Pipe,
        }
    }

    /// The answer goes on.
    pub fn push(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        match self {
            Self::Pipe => write(text),
            Self::Plain { fresh } => {
                *fresh = text.ends_with('\n');
                write(&harmless(text))
            }
            Self::Laid(markdown) => {
                let out = markdown.resize(size()) + &markdown.push(&harmless(text));
                write(&out)
            }
        }
    }

    /// Something else is to be said in the middle of an answer.
    pub fn pause(&mut self) -> io::Result<()> {
        match self {
            Self::Pipe => Ok(()),
            Self::Plain { fresh } => match std::mem::replace(fresh, true) {
                true => Ok(()),
                false => write("\n"),
            },
            Self::Laid(markdown) => write(&markdown.pause()),
        }
    }

    /// The answer ends.
    pub fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Pipe => write("\n"),
            Self::Plain { .. } => self.pause(),
            Self::Laid(markdown) => write(&markdown.finish()),
        }
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The terminal's size; the usual one where it does not say.
fn size() -> Size {
    match terminal_size() {
        Some((Width(columns), Height(rows))) if columns > 0 && rows > 0 => Size {
            columns: columns.into(),
            rows: rows.into(),
        },
        _ => Size {
            columns: 80,
            rows: 24,
        },
    }
}

/// The text with control characters made visible: what a model writes must not steer the terminal.
fn harmless(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    match text.contains(steers) {
        true => (text.chars())
            .map(|c| match steers(c) {
                true => char::REPLACEMENT_CHARACTER,
                false => c,
            })
            .collect(),
        false => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_written_steers_the_terminal() {
        let steering = "a\x1b]0;title\x07b\r\u{9b}31mc\td\ne";
        assert_eq!(
            harmless(steering),
            "a\u{fffd}]0;title\u{fffd}b\u{fffd}\u{fffd}31mc\td\ne"
        );
        assert!(matches!(harmless("plain"), Cow::Borrowed("plain")));
    }
}
