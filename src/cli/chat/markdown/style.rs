//! Characters and how they look.

use std::fmt::Write;

use unicode_width::UnicodeWidthChar;

/// How a character looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    pub bold: bool,
    pub italic: bool,
    pub strike: bool,
    pub underline: bool,
    pub faint: bool,
    pub code: bool,
    pub heading: bool,
}

impl Style {
    pub const FAINT: Self = Self {
        faint: true,
        ..Self::PLAIN
    };
    pub const CODE: Self = Self {
        code: true,
        ..Self::PLAIN
    };
    pub const PLAIN: Self = Self {
        bold: false,
        italic: false,
        strike: false,
        underline: false,
        faint: false,
        code: false,
        heading: false,
    };

    /// What both have.
    pub fn and(self, other: Self) -> Self {
        Self {
            bold: self.bold | other.bold,
            italic: self.italic | other.italic,
            strike: self.strike | other.strike,
            underline: self.underline | other.underline,
            faint: self.faint | other.faint,
            code: self.code | other.code,
            heading: self.heading | other.heading,
        }
    }

    /// The sequence (ECMA-48, SGR) that turns it on; empty where it is plain.
    fn sequence(self, colour: bool) -> String {
        let codes = [
            (self.bold, "1"),
            (self.faint, "2"),
            (self.italic, "3"),
            (self.underline, "4"),
            (self.strike, "9"),
            (self.heading && colour, "35"),
            (self.code && colour, "36"),
        ];
        let codes: Vec<&str> = codes
            .into_iter()
            .filter_map(|(on, code)| on.then_some(code))
            .collect();
        match codes.is_empty() {
            true => String::new(),
            false => format!("\x1b[{}m", codes.join(";")),
        }
    }
}

/// A character and its style.
pub type Cell = (char, Style);

/// Columns that a character takes.
pub fn width(c: char) -> usize {
    c.width().unwrap_or(0)
}

/// Columns that a row takes.
pub fn row_width(row: &[Cell]) -> usize {
    row.iter().map(|&(c, _)| width(c)).sum()
}

/// The cells of a text in one style.
pub fn cells(text: &str, style: Style) -> impl Iterator<Item = Cell> + '_ {
    text.chars().map(move |c| (c, style))
}

/// Writes cells, and leaves the style plain.
pub fn paint(out: &mut String, cells: &[Cell], colour: bool) {
    for run in cells.chunk_by(|a, b| a.1 == b.1) {
        let sequence = run[0].1.sequence(colour);
        out.push_str(&sequence);
        out.extend(run.iter().map(|&(c, _)| c));
        if !sequence.is_empty() {
            let _ = write!(out, "\x1b[0m");
        }
    }
}
