//! What stands on the screen, by a terminal's emulator.

use std::num::NonZero;

use super::*;

/// An answer with everything in it.
const EVERYTHING: &str = "\
# A *heading* of `one`
Some **bold** and *italic* text with `code`, ~~gone~~ and a [link](https://example.org/a_b_c), which is long enough to be wrapped.

- first item, which is long enough to be wrapped at forty columns
- [x] done **bold
- [ ] open
  1. nested
  2. 二番目の項目はとても長いので折り返されるはずです。
* * *
> quoted *text*
> > twice

```rust
fn main() { println!(\"**no emphasis**\"); }
```
| name | value | a longer heading |
|:-----|------:|:----------------:|
| one | 1 | middle |
| `a\\|b` and **bold** | 20 | this cell is long enough to be cut |
| unfinished | **3

|no table|
2 * 3 * 4 = 24, snake_case_name, *.txt and **never closed
1. one
12) twelve
---
***both*** __bold__ _italic_ a*b*c \\*escaped\\* <https://example.org> ![image](a.png)
The end \u{1F600}e\u{301}";

struct Terminal(vt100::Parser);

impl Terminal {
    fn new(size: Size) -> Self {
        let [rows, columns] = [size.rows, size.columns].map(|n| NonZero::new(n as u16).unwrap());
        Self(vt100::Parser::new(rows, columns, 2000))
    }

    fn text(&self) -> String {
        let rows = self.0.screen().rows(0, self.0.screen().size().1.get());
        let rows: Vec<String> = rows.map(|row| row.trim_end().to_owned()).collect();
        rows.join("\n").trim_end().to_owned()
    }

    /// All that can be seen, styles included.
    fn screen(&self) -> String {
        self.0.screen().contents_formatted()
    }
}

fn size(columns: usize, rows: usize) -> Size {
    Size { columns, rows }
}

/// The terminal after `text` came in these pieces.
fn shown<'t>(pieces: impl IntoIterator<Item = &'t str>, size: Size, colour: bool) -> Terminal {
    let mut markdown = Markdown::new(size, colour);
    let mut terminal = Terminal::new(size);
    for piece in pieces {
        terminal.0.process(markdown.push(piece).as_bytes());
    }
    terminal.0.process(markdown.finish().as_bytes());
    assert_eq!(terminal.0.screen().cursor_position().1, 0);
    terminal
}

fn text(markdown: &str, columns: usize) -> String {
    shown([markdown], size(columns, 100), true).text()
}

/// A text's characters, one by one.
fn characters(text: &str) -> impl Iterator<Item = &str> {
    text.char_indices()
        .map(|(at, c)| &text[at..at + c.len_utf8()])
}

#[test]
fn everything_is_laid_out() {
    let expected = "\
A heading of one
Some bold and italic text with code,
gone and a link
(https://example.org/a_b_c), which is
long enough to be wrapped.

• first item, which is long enough to
  be wrapped at forty columns
☑ done **bold
☐ open
  1. nested
  2. 二番目の項目はとても長いので折り返
     されるはずです。
───────────────────────────────────────
│ quoted text
│ │ twice

```rust
fn main() { println!(\"**no emphasis**\");
 }
```";
    let screen = text(EVERYTHING, 40);
    for (found, expected) in screen.lines().zip(expected.lines()) {
        assert_eq!(found, expected, "{screen}");
    }
    let wide = text(EVERYTHING, 100);
    let table = "\
name         │ value │          a longer heading
─────────────┼───────┼───────────────────────────────────
one          │     1 │               middle
a|b and bold │    20 │ this cell is long enough to be cut
unfinished   │   **3 │
";
    assert!(wide.contains(table), "{wide}");
    assert!(wide.contains("|no table|\n2 * 3 * 4 = 24, snake_case_name, *.txt and **never closed\n1. one\n12) twelve\n"), "{wide}");
    assert!(wide.ends_with("both bold italic abc *escaped* https://example.org image (a.png)\nThe end \u{1F600}e\u{301}"), "{wide}");
}

#[test]
fn any_cut_gives_the_same_screen() {
    for columns in [10, 24, 40, 100] {
        for colour in [true, false] {
            let size = size(columns, 400);
            let whole = shown([EVERYTHING], size, colour).screen();
            assert!(
                shown(characters(EVERYTHING), size, colour).screen() == whole,
                "{columns}"
            );
            let chars: Vec<&str> = characters(EVERYTHING).collect();
            for step in [2, 3, 5, 7, 11, 64] {
                let pieces: Vec<String> = chars.chunks(step).map(<[&str]>::concat).collect();
                let pieces = pieces.iter().map(|piece| &piece[..]);
                assert!(
                    shown(pieces, size, colour).screen() == whole,
                    "{columns} {step}"
                );
            }
        }
    }
}

#[test]
fn marks_are_never_seen_while_they_are_written() {
    let mut markdown = Markdown::new(size(60, 20), true);
    let mut terminal = Terminal::new(size(60, 20));
    let answer = "A **bold** and *slanted* word, `code` and ~~gone~~.\n- item **two**\n# Head\n";
    for piece in characters(answer) {
        terminal.0.process(markdown.push(piece).as_bytes());
        let text = terminal.text();
        assert!(!text.contains(['*', '`', '~', '#']), "{text}");
    }
    let cell = |row, column| terminal.0.screen().cell(row, column).unwrap();
    assert!(cell(0, 2).bold() && !cell(0, 6).bold() && cell(0, 11).italic());
    assert!(cell(1, 7).bold() && cell(2, 0).bold() && cell(2, 0).underline());
}

#[test]
fn what_stands_is_not_written_again() {
    let mut markdown = Markdown::new(size(40, 20), true);
    markdown.push("One ");
    assert_eq!(markdown.push("two"), " two");
    assert_eq!(markdown.push(" three"), " three");
    // The word that goes to the next row goes alone.
    let long = markdown.push(" four five six seven");
    assert_eq!(long, " four five six seven");
    assert_eq!(markdown.push(" ni"), " ni");
    let moved = markdown.push("nety");
    assert!(moved.len() < 24 && moved.contains("ninety"), "{moved:?}");
    markdown.push("\n```\n");
    assert_eq!(markdown.push("let x"), "\x1b[36mlet x\x1b[0m");
    assert_eq!(markdown.push(" = 1;"), "\x1b[36m = 1;\x1b[0m");
}

#[test]
fn a_table_shows_while_it_is_written() {
    let mut markdown = Markdown::new(size(60, 20), true);
    let mut terminal = Terminal::new(size(60, 20));
    let mut push = |piece: &str| {
        terminal.0.process(markdown.push(piece).as_bytes());
        terminal.text()
    };
    push("| a | b |\n|---|--");
    assert_eq!(push("-|\n| 1 | tw"), "a │ b\n──┼───\n1 │ tw");
    assert_eq!(
        push("o |\n| a long one | 3 |\n"),
        "a          │ b\n───────────┼────\n1          │ two\na long one │ 3"
    );
    assert_eq!(
        push("Text."),
        "a          │ b\n───────────┼────\n1          │ two\na long one │ 3\nText."
    );
}

#[test]
fn a_screen_that_is_too_low_or_changes_breaks_nothing() {
    let many: String = (0..30)
        .map(|row| format!("| row {row} | {} |\n", "x".repeat(row)))
        .collect();
    let table = format!("| a | b |\n|---|---|\n{many}The end.");
    let low = shown(characters(&table), size(60, 10), true);
    assert!(
        low.text()
            .ends_with("row 29 │ xxxxxxxxxxxxxxxxxxxxxxxxxxxxx\nThe end."),
        "{}",
        low.text()
    );
    let long = "word ".repeat(400);
    let low = shown(characters(&long), size(20, 5), true);
    assert!(
        low.text().starts_with("word word word word"),
        "{}",
        low.text()
    );

    let mut markdown = Markdown::new(size(60, 20), true);
    let mut terminal = Terminal::new(size(30, 20));
    terminal
        .0
        .process(markdown.push("Some text that **is").as_bytes());
    terminal.0.process(markdown.resize(size(30, 20)).as_bytes());
    terminal
        .0
        .process(markdown.push(" bold** and goes on").as_bytes());
    assert_eq!(
        terminal.text(),
        "Some text that is\nSome text that is bold and\ngoes on"
    );
}

#[test]
fn a_pause_begins_the_line_anew() {
    let mut markdown = Markdown::new(size(60, 20), true);
    let mut out = markdown.push("Some text");
    out += &markdown.pause();
    out += "(a note)\r\n";
    out += &markdown.push(" and more");
    let mut terminal = Terminal::new(size(60, 20));
    terminal.0.process(out.as_bytes());
    assert_eq!(terminal.text(), "Some text\n(a note)\nSome text and more");
}

#[test]
fn without_colour_nothing_is_lost() {
    let terminal = shown(["**b** `c` *i*\n```\nx\n```"], size(40, 10), false);
    assert_eq!(terminal.text(), "b `c` i\n```\nx\n```");
    assert!(terminal.0.screen().cell(0, 0).unwrap().bold());
    let bytes = terminal.screen();
    assert!(!bytes.contains("36m"), "{bytes:?}");
}

#[test]
fn endless_lines_and_tables_take_bounded_time() {
    let size = size(80, 24);
    let mut markdown = Markdown::new(size, true);
    let piece = "*a _b **c `d ".repeat(8);
    let written: usize = (0..400).map(|_| markdown.push(&piece).len()).sum();
    assert!(written > 30_000);
    markdown.push("\n");
    for _ in 0..400 {
        let row = format!("| {} |\n|---|\n", "*a _b ".repeat(20));
        markdown.push(&row);
    }
    assert!(markdown.finish().ends_with("\r\n"));
}
