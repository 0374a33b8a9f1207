//! What a line is: a heading, an item of a list, a quotation, a rule, or text.

use super::inline;
use super::style::{Cell, Style, cells, row_width};
use super::wrap::wrap;

/// A line of text that is not code and no table's.
pub struct Line<'l> {
    /// What its first row begins with.
    first: Vec<Cell>,
    /// What its other rows begin with.
    rest: Vec<Cell>,
    kind: Kind<'l>,
}

enum Kind<'l> {
    Text(&'l str, Style),
    Rule,
    /// What may yet become one thing or another: nothing of it is shown.
    Open,
}

impl<'l> Line<'l> {
    /// Reads a line. `whole`: nothing comes after it.
    pub fn of(line: &'l str, whole: bool) -> Self {
        let (mut first, mut rest) = (Vec::new(), Vec::new());
        let mut text = line;
        loop {
            let trimmed = text.trim_start_matches(' ');
            let indent = text.len() - trimmed.len();
            if is_rule(trimmed) && whole {
                let kind = Kind::Rule;
                return Self { first, rest, kind };
            }
            if !whole && may_become(trimmed) {
                let kind = Kind::Open;
                return Self { first, rest, kind };
            }
            let space = " ".repeat(indent);
            if let Some(quoted) = trimmed.strip_prefix('>') {
                let bar = format!("{space}│ ");
                first.extend(cells(&bar, Style::FAINT));
                rest.extend(cells(&bar, Style::FAINT));
                text = quoted.strip_prefix(' ').unwrap_or(quoted);
                continue;
            }
            if let Some((mark, item)) = item(trimmed) {
                let mark: Vec<Cell> = cells(&format!("{space}{mark} "), Style::PLAIN).collect();
                rest.extend(cells(&" ".repeat(row_width(&mark)), Style::PLAIN));
                first.extend(mark);
                text = item;
                continue;
            }
            let hashes = trimmed.len() - trimmed.trim_start_matches('#').len();
            let title = &trimmed[hashes..];
            let is_title =
                (1..=6).contains(&hashes) && (title.is_empty() || title.starts_with(' '));
            if is_title && indent < 4 {
                let style = Style {
                    bold: true,
                    heading: true,
                    underline: hashes == 1,
                    ..Style::PLAIN
                };
                let title = title.trim_start();
                let closed = title.trim_end_matches([' ', '#']);
                let bare = title[closed.len()..].starts_with(' ') || closed.is_empty();
                let title = if bare { closed } else { title };
                let kind = Kind::Text(title, style);
                return Self { first, rest, kind };
            }
            first.extend(cells(&space, Style::PLAIN));
            rest.extend(cells(&space, Style::PLAIN));
            let kind = Kind::Text(trimmed, Style::PLAIN);
            return Self { first, rest, kind };
        }
    }

    /// The rows that it takes, of at most `most` columns.
    pub fn rows(&self, whole: bool, most: usize, colour: bool) -> Vec<Vec<Cell>> {
        // Deep nesting leaves no room.
        let fits = row_width(&self.first).max(row_width(&self.rest)) + 8 <= most.max(16);
        let (first, rest) = match fits {
            true => (&self.first[..], &self.rest[..]),
            false => (&[][..], &[][..]),
        };
        match self.kind {
            Kind::Text(text, style) => {
                let text = inline::line(text, whole, style, colour);
                wrap(&text, first, rest, most)
            }
            Kind::Rule => {
                let room = most.saturating_sub(row_width(first)).min(40);
                let rule = cells(&"─".repeat(room), Style::FAINT).collect::<Vec<_>>();
                vec![[first, &rule].concat()]
            }
            Kind::Open => match first.is_empty() {
                true => Vec::new(),
                false => wrap(&[], first, rest, most),
            },
        }
    }
}

/// `---`, `* * *` and their like.
fn is_rule(text: &str) -> bool {
    let mut marks = text.chars().filter(|c| *c != ' ');
    let Some(mark @ ('-' | '*' | '_')) = marks.next() else {
        return false;
    };
    marks.clone().count() >= 2 && marks.all(|c| c == mark)
}

/// Whether the beginning of a line may yet become a mark of a block or of emphasis.
fn may_become(text: &str) -> bool {
    let all = |marks: &[char]| text.chars().all(|c| marks.contains(&c));
    let number = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let is_number = number.len() < text.len() && matches!(number, "" | "." | ")" | ". " | ") ");
    let task = item(text).is_some_and(|(mark, rest)| {
        mark == "•" && ["", "[", "[ ", "[x", "[X", "[ ]", "[x]", "[X]"].contains(&rest)
    });
    all(&['-', '*', '_', ' ', '+'])
        || all(&['#'])
        || all(&['`'])
        || all(&['~'])
        || is_number
        || task
}

/// The mark of a list's item as it is shown, and the item.
fn item(text: &str) -> Option<(String, &str)> {
    let bullet = text.strip_prefix(['-', '*', '+']);
    if let Some(rest) = bullet {
        let rest = rest.strip_prefix(' ').or(rest.is_empty().then_some(rest))?;
        let box_of = |mark: &str| rest.strip_prefix(mark);
        return Some(match (box_of("[ ] "), box_of("[x] ").or(box_of("[X] "))) {
            (Some(task), _) => ("☐".to_owned(), task),
            (_, Some(task)) => ("☑".to_owned(), task),
            _ => ("•".to_owned(), rest.trim_start()),
        });
    }
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    if !(1..=9).contains(&digits) {
        return None;
    }
    let rest = text[digits..].strip_prefix(['.', ')'])?;
    let rest = rest.strip_prefix(' ')?;
    Some((text[..=digits].to_owned(), rest.trim_start()))
}
