//! Cells → rows that fit.

use super::style::{Cell, row_width, width};

/// Cuts `text` into rows of at most `most` columns, at spaces where there are any, beside wide characters, and else
/// where it must be. The first row begins with `first`, the others with `rest`; a line's end in the text ends a row.
pub fn wrap(text: &[Cell], first: &[Cell], rest: &[Cell], most: usize) -> Vec<Vec<Cell>> {
    let mut rows = Vec::new();
    let mut row = first.to_vec();
    let mut head = row.len();
    let mut columns = row_width(&row);
    // Where the row may be cut: how many cells stay in it.
    let mut cut: Option<usize> = None;
    for &(c, style) in text {
        if c == '\n' {
            rows.push(std::mem::replace(&mut row, rest.to_vec()));
            (head, columns, cut) = (rest.len(), row_width(rest), None);
            continue;
        }
        let wide = width(c);
        if columns + wide > most && row.len() > head && c != ' ' {
            let at = cut.filter(|&at| at > head).unwrap_or(row.len());
            let tail = row.split_off(at);
            trim_end(&mut row, head);
            rows.push(std::mem::replace(&mut row, rest.to_vec()));
            head = rest.len();
            row.extend(tail);
            columns = row_width(&row);
            cut = None;
        }
        if c == ' ' && columns + wide > most {
            // It stands where the row ends.
            cut = Some(row.len());
            continue;
        }
        if wide == 2 && row.len() > head {
            cut = Some(row.len());
        }
        row.push((c, style));
        columns += wide;
        if c == ' ' || wide == 2 {
            cut = Some(row.len());
        }
    }
    trim_end(&mut row, head);
    rows.push(row);
    rows
}

fn trim_end(row: &mut Vec<Cell>, head: usize) {
    while row.len() > head && row.last().is_some_and(|&(c, _)| c == ' ') {
        row.pop();
    }
}
