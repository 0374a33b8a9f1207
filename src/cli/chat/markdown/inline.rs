//! Emphasis, code, links: what stands inside a line (CommonMark, section 6).
//!
//! A line that is not whole yet is read as if what is open were closed at its end, so that bold text is bold from its
//! first letter on; marks at its end, which may yet become others, are not shown.

use super::style::{Cell, Style, cells};

/// A part of a line.
struct Item {
    cells: Vec<Cell>,
    /// A run of marks, which may open or close emphasis.
    run: Option<Run>,
}

struct Run {
    mark: char,
    /// Those that are left.
    count: usize,
    /// How many there were.
    all: usize,
    opens: bool,
    closes: bool,
    /// Whether it may open at the end of a line that is not whole.
    may_open: bool,
}

/// The characters of a line as they look. `whole`: nothing comes after it. Without colour, code keeps its marks.
pub fn line(text: &str, whole: bool, base: Style, colour: bool) -> Vec<Cell> {
    let text = match whole {
        true => text,
        false => text.trim_end_matches(['*', '_', '`', '~', '\\']),
    };
    let chars: Vec<char> = text.chars().collect();
    inline(&chars, whole, base, colour)
}

fn inline(chars: &[char], whole: bool, base: Style, colour: bool) -> Vec<Cell> {
    let mut items: Vec<Item> = Vec::new();
    let mut plain: Vec<Cell> = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let c = chars[at];
        let next = chars.get(at + 1).copied();
        match c {
            '\\' if next.is_some_and(|next| next.is_ascii_punctuation()) => {
                plain.extend(next.map(|next| (next, base)));
                at += 2;
            }
            '`' => {
                let count = run_of(chars, at);
                let start = at + count;
                let end = closing_code(chars, start, count);
                at = match (end, whole) {
                    (Some(end), _) => {
                        plain.extend(code(&chars[start..end], base, colour));
                        end + count
                    }
                    (None, false) => {
                        plain.extend(code(&chars[start..], base, colour));
                        chars.len()
                    }
                    (None, true) => {
                        plain.extend(chars[at..start].iter().map(|&c| (c, base)));
                        start
                    }
                };
            }
            '*' | '_' | '~' => {
                let all = run_of(chars, at);
                items.extend((!plain.is_empty()).then(|| Item::text(std::mem::take(&mut plain))));
                items.push(Item::run(chars, at, all, base));
                at += all;
            }
            '!' if next == Some('[') && link(chars, at + 1).is_some() => at += 1,
            '[' => match link(chars, at) {
                Some(Link { text, target, end }) => {
                    let style = Style {
                        underline: true,
                        ..base
                    };
                    plain.extend(inline(&chars[text.clone()], true, style, colour));
                    let (text, target) = (&chars[text], &chars[target]);
                    if text != target && !target.is_empty() {
                        let target: String = target.iter().collect();
                        plain.extend(cells(&format!(" ({target})"), base.and(Style::FAINT)));
                    }
                    at = end;
                }
                None => {
                    plain.push((c, base));
                    at += 1;
                }
            },
            '<' => match angle(chars, at) {
                Some((found, end)) => {
                    plain.extend(found.iter().map(|&c| {
                        let underline = c != '\n' || base.underline;
                        (c, Style { underline, ..base })
                    }));
                    at = end;
                }
                None => {
                    plain.push((c, base));
                    at += 1;
                }
            },
            _ => {
                plain.push((c, base));
                at += 1;
            }
        }
    }
    items.extend((!plain.is_empty()).then(|| Item::text(plain)));
    pair(&mut items);
    if !whole {
        close(&mut items);
    }
    items.into_iter().flat_map(|item| item.cells).collect()
}

impl Item {
    fn text(cells: Vec<Cell>) -> Self {
        Self { cells, run: None }
    }

    /// The run of `all` marks that begins at `at`, with what it may do by what stands around it.
    fn run(chars: &[char], at: usize, all: usize, base: Style) -> Self {
        let mark = chars[at];
        let before = at.checked_sub(1).map(|before| chars[before]);
        let after = chars.get(at + all).copied();
        let space = |c: Option<char>| c.is_none_or(char::is_whitespace);
        let sign = |c: Option<char>| c.is_some_and(is_sign);
        let left = !space(after) && (!sign(after) || space(before) || sign(before));
        let right = !space(before) && (!sign(before) || space(after) || sign(after));
        let (opens, closes) = match mark {
            '_' => (
                left && (!right || sign(before)),
                right && (!left || sign(after)),
            ),
            // Two only: a single one is rather an "about".
            '~' => (left && all == 2, right && all == 2),
            _ => (left, right),
        };
        Self {
            cells: vec![(mark, base); all],
            run: Some(Run {
                mark,
                count: all,
                all,
                opens,
                closes,
                may_open: opens && !before.is_some_and(char::is_alphanumeric),
            }),
        }
    }

    fn take_marks(&mut self, count: usize) {
        if let Some(run) = &mut self.run {
            run.count -= count;
            self.cells.truncate(run.count);
        }
    }
}

/// What so many marks mean.
fn meaning(mark: char, count: usize) -> Style {
    let mut style = Style::PLAIN;
    match (mark, count) {
        ('~', _) => style.strike = true,
        (_, 1) => style.italic = true,
        (_, 2) => style.bold = true,
        _ => (style.bold, style.italic) = (true, true),
    }
    style
}

fn dress(items: &mut [Item], style: Style) {
    for (_, old) in items.iter_mut().flat_map(|item| &mut item.cells) {
        *old = old.and(style);
    }
}

/// Pairs runs that close with runs that open (CommonMark, "process emphasis").
fn pair(items: &mut [Item]) {
    for closer in 0..items.len() {
        while let Some(run) = items[closer]
            .run
            .as_ref()
            .filter(|run| run.closes && run.count > 0)
        {
            let (mark, all, both) = (run.mark, run.all, run.opens);
            let fits = |item: &Item| {
                item.run.as_ref().is_some_and(|open| {
                    let odd = (both || open.closes)
                        && (open.all + all).is_multiple_of(3)
                        && !(open.all.is_multiple_of(3) && all.is_multiple_of(3));
                    open.opens && open.mark == mark && open.count > 0 && !odd
                })
            };
            let Some(opener) = items[..closer].iter().rposition(fits) else {
                break;
            };
            let counts =
                [opener, closer].map(|at| items[at].run.as_ref().map_or(0, |run| run.count));
            let used = counts[0].min(counts[1]).min(2);
            for item in &mut items[opener + 1..closer] {
                if let Some(run) = &mut item.run {
                    run.opens = false;
                }
            }
            dress(&mut items[opener + 1..closer], meaning(mark, used));
            items[opener].take_marks(used);
            items[closer].take_marks(used);
        }
    }
}

/// Closes what is open at the end.
fn close(items: &mut [Item]) {
    for opener in 0..items.len().saturating_sub(1) {
        let run = items[opener].run.as_ref();
        let Some(run) = run.filter(|run| run.opens && run.may_open && run.count > 0) else {
            continue;
        };
        let (mark, count) = (run.mark, run.count.min(3));
        dress(&mut items[opener + 1..], meaning(mark, count));
        items[opener].take_marks(count);
    }
}

fn is_sign(c: char) -> bool {
    !c.is_alphanumeric()
        && !c.is_whitespace()
        && (c.is_ascii_punctuation() || super::style::width(c) > 0)
}

/// Equal characters from `at` on.
fn run_of(chars: &[char], at: usize) -> usize {
    chars[at..].iter().take_while(|&&c| c == chars[at]).count()
}

/// Where a run of just `count` backticks begins, from `start` on.
fn closing_code(chars: &[char], start: usize, count: usize) -> Option<usize> {
    let mut at = start;
    while at < chars.len() {
        if chars[at] != '`' {
            at += 1;
            continue;
        }
        let run = run_of(chars, at);
        if run == count {
            return Some(at);
        }
        at += run;
    }
    None
}

fn code(chars: &[char], base: Style, colour: bool) -> Vec<Cell> {
    let spaced = chars.first() == Some(&' ') && chars.last() == Some(&' ');
    let chars = match spaced && chars.iter().any(|&c| c != ' ') && chars.len() > 2 {
        true => &chars[1..chars.len() - 1],
        false => chars,
    };
    let style = base.and(Style::CODE);
    let mark = (!colour).then_some(('`', style));
    let inner = chars.iter().map(|&c| (c, style));
    mark.into_iter().chain(inner).chain(mark).collect()
}

/// `[text](target)`.
struct Link {
    text: std::ops::Range<usize>,
    target: std::ops::Range<usize>,
    end: usize,
}

/// The link that begins at `at`, if all of it is there.
fn link(chars: &[char], at: usize) -> Option<Link> {
    let close = closing(chars, at, '[', ']')?;
    if chars.get(close + 1) != Some(&'(') {
        return None;
    }
    let end = closing(chars, close + 1, '(', ')')?;
    // A title behind the target is not shown.
    let inside = close + 2..end;
    let title = chars[inside.clone()].iter().position(|c| c.is_whitespace());
    let target = inside.start..title.map_or(inside.end, |title| inside.start + title);
    Some(Link {
        text: at + 1..close,
        target,
        end: end + 1,
    })
}

fn closing(chars: &[char], at: usize, open: char, close: char) -> Option<usize> {
    /// No link is longer.
    const MOST: usize = 2000;
    let mut depth = 0;
    let mut escaped = false;
    for (index, &c) in chars.iter().enumerate().skip(at).take(MOST) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == open => depth += 1,
            c if c == close => {
                depth -= 1;
                if depth == 0 {
                    return Some(index);
                }
            }
            _ => {}
        }
    }
    None
}

/// `<https://…>` without its brackets, and `<br>` as a line's end.
fn angle(chars: &[char], at: usize) -> Option<(Vec<char>, usize)> {
    let end = at + chars[at..].iter().take(500).position(|&c| c == '>')?;
    let inside: String = chars[at + 1..end].iter().collect();
    let found = match inside.to_lowercase().trim_end_matches(['/', ' ']) {
        "br" => vec!['\n'],
        address if address.starts_with("http://") || address.starts_with("https://") => {
            inside.chars().collect()
        }
        _ => return None,
    };
    Some((found, end + 1))
}
