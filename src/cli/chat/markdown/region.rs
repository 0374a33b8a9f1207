//! The rows at the end of the screen that may still change.

use std::fmt::Write;

use super::style::{Cell, paint, row_width};

/// Rows that were written last, the cursor behind the last one. What changes is written over; what stays is not touched,
/// so that nothing flickers.
#[derive(Default)]
pub struct Region {
    rows: Vec<Vec<Cell>>,
}

impl Region {
    /// Whether nothing stands in it.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Makes `rows` of it, on a screen that is `height` rows high: what has left it above cannot be changed.
    pub fn update(&mut self, out: &mut String, rows: Vec<Vec<Cell>>, height: usize, colour: bool) {
        let is_new = |index: &usize| self.rows.get(*index) != rows.get(*index);
        let count = rows.len().max(self.rows.len());
        let last = self.rows.len().saturating_sub(1);
        let top = (last + 1).saturating_sub(height.max(1));
        let Some(first) = (0..count).find(is_new).map(|row| row.max(top)) else {
            self.rows = rows;
            return;
        };
        // Where the cursor is.
        let (mut row, mut column) = (last, self.rows.last().map_or(0, |row| row_width(row)));
        let end = rows.len().saturating_sub(1);
        for (index, new) in rows.iter().enumerate().skip(first) {
            let old = self.rows.get(index);
            if old == Some(new) {
                continue;
            }
            go_to(out, &mut row, &mut column, index, self.rows.len());
            let old = old.map_or(&[][..], |old| old);
            let same = old.iter().zip(new).take_while(|(a, b)| a == b);
            let mut same = same.count();
            // A mark that joins the character before it is written with it.
            while same > 0
                && new
                    .get(same)
                    .is_some_and(|&(c, _)| super::style::width(c) == 0)
            {
                same -= 1;
            }
            let (kept, fresh) = new.split_at(same);
            go_to_column(out, &mut column, row_width(kept));
            paint(out, fresh, colour);
            column += row_width(fresh);
            if row_width(old) > column {
                out.push_str("\x1b[K");
            }
        }
        if self.rows.len() > rows.len() {
            go_to(
                out,
                &mut row,
                &mut column,
                rows.len().max(top),
                self.rows.len(),
            );
            go_to_column(out, &mut column, 0);
            out.push_str("\x1b[J");
        }
        go_to(out, &mut row, &mut column, end, self.rows.len());
        go_to_column(
            out,
            &mut column,
            rows.last().map_or(0, |row| row_width(row)),
        );
        self.rows = rows;
    }

    /// What stands there stays; the cursor goes to a new row.
    pub fn commit(&mut self, out: &mut String) {
        self.rows.clear();
        out.push_str("\r\n");
    }
}

/// Moves to another row; rows from `known` on are not there yet.
fn go_to(out: &mut String, row: &mut usize, column: &mut usize, to: usize, known: usize) {
    if to < *row {
        let _ = write!(out, "\x1b[{}A", *row - to);
    }
    if to > *row {
        let there = to.min(known.saturating_sub(1)).saturating_sub(*row);
        if there > 0 {
            let _ = write!(out, "\x1b[{there}B");
        }
        for _ in *row + there..to {
            out.push_str("\r\n");
            *column = 0;
        }
    }
    *row = to;
}

fn go_to_column(out: &mut String, column: &mut usize, to: usize) {
    if to < *column {
        out.push('\r');
        *column = 0;
    }
    if to > *column {
        let _ = write!(out, "\x1b[{}C", to - *column);
    }
    *column = to;
}
