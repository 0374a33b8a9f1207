//! Tables (GitHub's: a row of heads, a row of dashes, rows).

use super::inline;
use super::style::{Cell, Style, cells, row_width};
use super::wrap::wrap;

/// No column is narrower, where a table does not fit.
const LEAST: usize = 4;
const BETWEEN: &str = " │ ";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Left,
    Middle,
    Right,
}

/// The cells of a row, as text.
fn split(line: &str) -> Vec<String> {
    let line = line.trim();
    let line = line.strip_prefix('|').unwrap_or(line);
    let mut parts = vec![String::new()];
    let mut chars = line.chars().peekable();
    let mut last_is_bar = false;
    while let Some(c) = chars.next() {
        last_is_bar = c == '|';
        match c {
            '\\' if chars.peek() == Some(&'|') => {
                parts.last_mut().expect("one at least").extend(chars.next())
            }
            '|' => parts.push(String::new()),
            c => parts.last_mut().expect("one at least").push(c),
        }
    }
    if last_is_bar {
        parts.pop();
    }
    parts.iter().map(|part| part.trim().to_owned()).collect()
}

/// The sides that a row of dashes asks for.
fn sides(line: &str) -> Option<Vec<Side>> {
    let side = |part: &String| {
        let dashes = part.strip_prefix(':').unwrap_or(part);
        let inner = dashes.strip_suffix(':').unwrap_or(dashes);
        let is_dashes = !inner.is_empty() && inner.bytes().all(|byte| byte == b'-');
        is_dashes.then_some(match (part.starts_with(':'), part.ends_with(':')) {
            (true, true) => Side::Middle,
            (false, true) => Side::Right,
            _ => Side::Left,
        })
    };
    split(line).iter().map(side).collect()
}

/// Whether these are the first two lines of a table.
pub fn begins(head: &str, dashes: &str) -> bool {
    sides(dashes).is_some_and(|sides| sides.len() == split(head).len())
}

/// The rows on the screen of a table's `lines`: heads, dashes, rows; the last one may not be whole. `None` where it is
/// too narrow for so many columns.
pub fn rows(
    lines: &[String],
    last_is_whole: bool,
    most: usize,
    colour: bool,
) -> Option<Vec<Vec<Cell>>> {
    let sides = sides(&lines[1])?;
    let between = row_width(&cells(BETWEEN, Style::PLAIN).collect::<Vec<_>>());
    let room = most.checked_sub(between * (sides.len() - 1))?;
    if room < LEAST * sides.len() {
        return None;
    }
    let body = lines.iter().enumerate().filter(|(index, _)| *index != 1);
    let body: Vec<Vec<Vec<Cell>>> = body
        .map(|(index, line)| {
            let base = Style {
                bold: index == 0,
                ..Style::PLAIN
            };
            let parts = split(line);
            let last = parts.len() - 1;
            let cell = |column: usize| {
                let part = parts.get(column).map_or("", |part| &part[..]);
                let whole = index + 1 < lines.len() || last_is_whole || column < last;
                inline::line(part, whole, base, colour)
            };
            (0..sides.len()).map(cell).collect()
        })
        .collect();

    let wish = |column: usize| {
        let lines = body
            .iter()
            .flat_map(|row| row[column].split(|&(c, _)| c == '\n'));
        lines.map(row_width).max().unwrap_or(0).max(1)
    };
    let mut widths: Vec<usize> = (0..sides.len()).map(wish).collect();
    while widths.iter().sum::<usize>() > room {
        let widest = widths.iter_mut().max().expect("a column at least");
        *widest -= 1;
    }

    let mut rows = Vec::new();
    for (index, row) in body.iter().enumerate() {
        let wrapped: Vec<_> = (row.iter().zip(&widths))
            .map(|(cell, &width)| wrap(cell, &[], &[], width))
            .collect();
        let height = wrapped.iter().map(Vec::len).max().unwrap_or(1);
        for line in 0..height {
            let mut whole = Vec::new();
            for (column, &width) in widths.iter().enumerate() {
                if column > 0 {
                    whole.extend(cells(BETWEEN, Style::FAINT));
                }
                let cell = wrapped[column].get(line).map_or(&[][..], |cell| cell);
                let free = width.saturating_sub(row_width(cell));
                let before = match sides[column] {
                    Side::Left => 0,
                    Side::Middle => free / 2,
                    Side::Right => free,
                };
                whole.extend(cells(&" ".repeat(before), Style::PLAIN));
                whole.extend_from_slice(cell);
                whole.extend(cells(&" ".repeat(free - before), Style::PLAIN));
            }
            while whole
                .last()
                .is_some_and(|&(c, style)| c == ' ' && style == Style::PLAIN)
            {
                whole.pop();
            }
            rows.push(whole);
        }
        if index == 0 {
            let dashes: Vec<String> = widths.iter().map(|&width| "─".repeat(width)).collect();
            rows.push(cells(&dashes.join("─┼─"), Style::FAINT).collect());
        }
    }
    Some(rows)
}
