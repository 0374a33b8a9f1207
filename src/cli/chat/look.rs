//! What a terminal can show.

use std::borrow::Cow;
use std::io::{self, IsTerminal};

/// What the terminal behind standard output and standard error can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Standard output is a terminal that moves its cursor.
    pub screen: bool,
    /// So is standard error.
    pub status: bool,
    /// Colours are wanted.
    pub colour: bool,
}

impl Look {
    /// By the environment: `TERM`, and `NO_COLOR` (no-color.org).
    pub fn of_environment() -> Self {
        let able = std::env::var_os("TERM").is_some_and(|term| term != "dumb" && !term.is_empty());
        let able = able || cfg!(windows);
        Self {
            screen: able && io::stdout().is_terminal(),
            status: able && io::stderr().is_terminal(),
            colour: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        }
    }

    /// A line on standard error that is not to stand out.
    pub fn faint<'t>(&self, text: &'t str) -> Cow<'t, str> {
        match self.status && self.colour {
            true => format!("\x1b[2m{text}\x1b[0m").into(),
            false => text.into(),
        }
    }

    /// The prompt as it is, and as it looks.
    pub fn prompt(&self, text: &'static str) -> (&'static str, Cow<'static, str>) {
        match self.screen && self.colour {
            true => (text, format!("\x1b[1;36m{text}\x1b[0m").into()),
            false => (text, text.into()),
        }
    }
}
