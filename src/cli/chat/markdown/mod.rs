//! Markdown on a terminal, as it is written.
//!
//! Text comes in pieces, and each is shown at once. Lines of code only ever grow. Any other line, and a table, is laid
//! out anew with each piece, and only what has changed is written over ([`Region`]): while a line grows that is its end,
//! the word that goes to the next row, the marks that turn out to be none. When a line is whole it stays. So what stands
//! on the screen in the end is the same however the text was cut into pieces.
//!
//! Line breaks are kept, unlike in HTML; indented code and headings that are underlined are not known. For the rest,
//! CommonMark and GitHub's tables, task lists and strike-through.

mod block;
mod inline;
mod region;
mod style;
mod table;
mod wrap;

use block::Line;
use region::Region;
use style::{Cell, Style, cells, paint};

/// Bytes of a line: the rest of a longer one is shown as it is, since laying it out anew would take too long.
const LONG_LINE: usize = 4096;
/// Bytes of a table: a longer one ends there.
const LONG_TABLE: usize = 16_384;

/// A terminal's columns and rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub columns: usize,
    pub rows: usize,
}

/// A line of backticks or tildes that begins code.
struct Fence {
    mark: char,
    count: usize,
}

/// Turns Markdown into what is to be written to a terminal.
pub struct Markdown {
    size: Size,
    colour: bool,
    /// The present line as far as it has come.
    line: String,
    /// What of it is shown already, where it only grows: bytes.
    shown: usize,
    /// Whether it is too long to be laid out.
    long: bool,
    fence: Option<Fence>,
    /// The lines of a table, or the first one of what may become one.
    table: Vec<String>,
    region: Region,
}

impl Markdown {
    /// For a screen of that size.
    pub fn new(size: Size, colour: bool) -> Self {
        Self {
            size,
            colour,
            line: String::new(),
            shown: 0,
            long: false,
            fence: None,
            table: Vec::new(),
            region: Region::default(),
        }
    }

    /// What is to be written when `text` has come. It must hold no control characters but line ends and tabs.
    pub fn push(&mut self, text: &str) -> String {
        let mut out = String::new();
        for c in text.chars() {
            match c {
                '\n' => self.end_line(&mut out),
                '\t' => self.line.push_str("    "),
                c => self.line.push(c),
            }
            if self.line.len() > LONG_LINE && !self.long {
                self.give_up(&mut out);
            }
        }
        self.show_line(&mut out);
        out
    }

    /// What is to be written at the end: the cursor is then at the beginning of a row.
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        if !self.line.is_empty() {
            self.end_line(&mut out);
        }
        self.end_table(&mut out);
        self.fence = None;
        out
    }

    /// What is to be written before something else is: the present line then begins anew below it.
    pub fn pause(&mut self) -> String {
        let mut out = String::new();
        if !self.region.is_empty() || self.shown > 0 {
            self.region.commit(&mut out);
            self.shown = 0;
        }
        out
    }

    /// The screen has another size now.
    pub fn resize(&mut self, size: Size) -> String {
        match std::mem::replace(&mut self.size, size) == size {
            true => String::new(),
            // The terminal has moved what stood there: nobody knows where.
            false => self.pause(),
        }
    }

    /// Columns that are used: a terminal does odd things in the last one.
    fn most(&self) -> usize {
        self.size.columns.saturating_sub(1).max(8)
    }

    /// Shows what there is of the present line.
    fn show_line(&mut self, out: &mut String) {
        if self.long {
            self.grow(out, Style::PLAIN);
        } else if let Some(fence) = &self.fence {
            // It may yet end the code.
            let ends = self.line.trim_start().chars().all(|c| c == fence.mark);
            if !ends {
                self.grow(out, Style::CODE);
            }
        } else if self.line.trim_start().is_empty() {
            // It may yet go on with a table.
        } else {
            self.lay_out(out, false);
        }
    }

    /// Shows what has been added to a line that only grows.
    fn grow(&mut self, out: &mut String, style: Style) {
        let fresh: Vec<Cell> = cells(&self.line[self.shown..], style).collect();
        paint(out, &fresh, self.colour);
        self.shown = self.line.len();
    }

    /// Lays out the present line, or the table that it belongs to.
    fn lay_out(&mut self, out: &mut String, whole: bool) {
        if !self.table.is_empty() && !is_row(&self.line) {
            self.end_table(out);
        }
        let rows = match self.table.is_empty() {
            true => self.rows_of(&self.line, whole),
            false => self.table_rows(Some(&self.line), whole),
        };
        self.region.update(out, rows, self.size.rows, self.colour);
    }

    fn rows_of(&self, line: &str, whole: bool) -> Vec<Vec<Cell>> {
        let (most, colour) = (self.most(), self.colour);
        if fence(line).is_some() {
            let line: Vec<Cell> = cells(line, Style::FAINT).collect();
            return wrap::wrap(&line, &[], &[], most);
        }
        Line::of(line, whole).rows(whole, most, colour)
    }

    /// The rows of a table, and of a `line` that goes on with it.
    fn table_rows(&self, line: Option<&str>, whole: bool) -> Vec<Vec<Cell>> {
        let mut lines = self.table.clone();
        match line {
            // The second line may yet make a table of the first.
            Some(line) if lines.len() == 1 && !whole && is_dashes(line) => {}
            line => lines.extend(line.map(str::to_owned)),
        }
        let is_table = lines.len() > 1 && table::begins(&lines[0], &lines[1]);
        let rows = is_table.then(|| table::rows(&lines, whole, self.most(), self.colour));
        let plain = || {
            let last = lines.len() - 1;
            let lines = lines.iter().enumerate();
            let rows = lines.map(|(index, line)| self.rows_of(line, whole || index < last));
            rows.flatten().collect()
        };
        rows.flatten().unwrap_or_else(plain)
    }

    /// The present line is whole.
    fn end_line(&mut self, out: &mut String) {
        if self.long {
            self.grow(out, Style::PLAIN);
            self.region.commit(out);
        } else if let Some(open) = &self.fence {
            let closing = fence(&self.line).is_some_and(|end| {
                end.mark == open.mark
                    && end.count >= open.count
                    && self.line.trim().chars().all(|c| c == end.mark)
            });
            match closing {
                true => {
                    self.grow(out, Style::FAINT);
                    self.fence = None;
                }
                false => self.grow(out, Style::CODE),
            }
            self.region.commit(out);
        } else if self.line.trim().is_empty() {
            self.end_table(out);
            self.region.commit(out);
        } else {
            self.lay_out(out, true);
            let size: usize = self.table.iter().map(String::len).sum();
            match is_row(&self.line) && size < LONG_TABLE {
                true => {
                    self.table.push(std::mem::take(&mut self.line));
                    let is_none =
                        self.table.len() == 2 && !table::begins(&self.table[0], &self.table[1]);
                    if is_none {
                        self.end_table(out);
                    }
                }
                false => {
                    self.table.clear();
                    self.region.commit(out);
                    self.fence = fence(&self.line);
                }
            }
        }
        self.line.clear();
        (self.shown, self.long) = (0, false);
    }

    /// Whatever table there was has ended.
    fn end_table(&mut self, out: &mut String) {
        if self.table.is_empty() {
            return;
        }
        let rows = self.table_rows(None, true);
        self.region.update(out, rows, self.size.rows, self.colour);
        self.region.commit(out);
        self.table.clear();
    }

    /// Shows the present line as it is from here on.
    fn give_up(&mut self, out: &mut String) {
        if self.fence.is_none() {
            self.end_table(out);
            self.lay_out(out, false);
            self.region.commit(out);
            self.shown = self.line.len();
        }
        self.long = true;
    }
}

/// Whether a line may be a table's.
fn is_row(line: &str) -> bool {
    line.trim_start().starts_with('|')
}

/// Whether a line may become a table's row of dashes.
fn is_dashes(line: &str) -> bool {
    line.chars().all(|c| matches!(c, '|' | '-' | ':' | ' '))
}

/// The fence that a line is.
fn fence(line: &str) -> Option<Fence> {
    let line = line.trim_start();
    let mark = line.chars().next().filter(|c| matches!(c, '`' | '~'))?;
    let count = line.chars().take_while(|&c| c == mark).count();
    let info = &line[count..];
    (count >= 3 && !(mark == '`' && info.contains('`'))).then_some(Fence { mark, count })
}

#[cfg(test)]
mod tests;
