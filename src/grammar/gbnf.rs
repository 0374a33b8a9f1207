//! llama.cpp's GBNF → Lark as llguidance reads it.

/// Rewrites a grammar; says what is wrong and in which line.
pub(super) fn to_lark(grammar: &str) -> Result<String, String> {
    let mut reader = Reader {
        rest: grammar,
        line: 1,
        lark: String::new(),
    };
    reader.grammar()?;
    Ok(reader.lark)
}

/// A position in a grammar, and what was written so far.
struct Reader<'g> {
    rest: &'g str,
    line: usize,
    lark: String,
}

impl<'g> Reader<'g> {
    fn wrong<T>(&self, what: &str) -> Result<T, String> {
        Err(format!("line {}: {what}", self.line))
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        self.line += usize::from(c == '\n');
        Some(c)
    }

    /// Skips white space and comments, and ends of lines where they do not matter.
    fn skip(&mut self, lines: bool) {
        loop {
            match self.rest.chars().next() {
                Some('#') => {
                    let end = self.rest.find('\n').unwrap_or(self.rest.len());
                    self.rest = &self.rest[end..];
                }
                Some('\n' | '\r') if !lines => return,
                Some(c) if c.is_whitespace() => {
                    self.next();
                }
                _ => return,
            }
        }
    }

    fn word(&mut self) -> Option<&'g str> {
        let end = self
            .rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'));
        let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }

    /// A rule's name in Lark: lower case, so that it is a rule and no terminal.
    fn name(&mut self, word: &str) {
        match word {
            "root" => self.lark += "start",
            // Capitals and hyphens become what no name of GBNF is made of otherwise.
            word => {
                self.lark += "r_";
                for c in word.chars() {
                    match c {
                        '-' => self.lark += "__",
                        c if c.is_ascii_uppercase() => {
                            self.lark += "_u";
                            self.lark.push(c.to_ascii_lowercase());
                        }
                        c => self.lark.push(c),
                    }
                }
            }
        }
    }

    fn grammar(&mut self) -> Result<(), String> {
        loop {
            self.skip(true);
            if self.rest.is_empty() {
                return Ok(());
            }
            let Some(word) = self.word() else {
                return self.wrong("a rule begins with its name");
            };
            self.name(word);
            self.skip(false);
            match self.rest.strip_prefix("::=") {
                Some(rest) => self.rest = rest,
                None => return self.wrong(&format!("::= must follow the name {word}")),
            }
            self.lark += ": ";
            // The first alternative may stand in the next line.
            self.skip(true);
            self.alternatives(0)?;
            self.lark.push('\n');
        }
    }

    fn alternatives(&mut self, depth: usize) -> Result<(), String> {
        if depth > 100 {
            return self.wrong("more than 100 brackets in each other");
        }
        let start = self.lark.len();
        loop {
            self.skip(depth > 0);
            let Some(c) = self.rest.chars().next() else {
                break;
            };
            match c {
                '\n' | '\r' | ')' => break,
                '|' => {
                    self.next();
                    self.skip(true);
                    self.lark += "| ";
                    continue;
                }
                '(' => {
                    self.next();
                    self.lark.push('(');
                    self.alternatives(depth + 1)?;
                    if self.next() != Some(')') {
                        return self.wrong("a bracket ( is not closed");
                    }
                    self.lark.push(')');
                }
                '"' => self.string()?,
                '[' => self.class()?,
                '.' => {
                    self.next();
                    self.lark += r"/(.|\n)/";
                }
                _ => match self.word() {
                    Some(word) => self.name(word),
                    None => return self.wrong(&format!("{c:?} has no meaning here")),
                },
            }
            self.repetition()?;
            self.lark.push(' ');
        }
        if self.lark[start..].trim_end().is_empty() || self.lark.ends_with("| ") {
            self.lark += "\"\"";
        }
        Ok(())
    }

    /// `*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}`.
    fn repetition(&mut self) -> Result<(), String> {
        self.skip(false);
        match self.rest.chars().next() {
            Some(c @ ('*' | '+' | '?')) => {
                self.next();
                self.lark.push(c);
            }
            Some('{') => {
                let Some(end) = self.rest.find('}') else {
                    return self.wrong("a bracket { is not closed");
                };
                let numbers: String = self.rest[1..end].split_whitespace().collect();
                if !numbers
                    .bytes()
                    .all(|byte| byte.is_ascii_digit() || byte == b',')
                {
                    return self.wrong("a repetition is {m}, {m,} or {m,n}");
                }
                self.lark += &format!("{{{numbers}}}");
                self.rest = &self.rest[end + 1..];
            }
            _ => {}
        }
        Ok(())
    }

    /// A character of a string or class, its escape resolved.
    fn character(&mut self) -> Result<char, String> {
        let c = match self.next() {
            Some('\\') => match self.next() {
                Some('n') => '\n',
                Some('r') => '\r',
                Some('t') => '\t',
                Some(kind @ ('x' | 'u' | 'U')) => {
                    let digits = match kind {
                        'x' => 2,
                        'u' => 4,
                        _ => 8,
                    };
                    let code = self.rest.get(..digits);
                    let code = code.and_then(|code| u32::from_str_radix(code, 16).ok());
                    let Some(c) = code.and_then(char::from_u32) else {
                        return self.wrong("an escape names no character");
                    };
                    self.rest = &self.rest[digits..];
                    c
                }
                Some(c @ ('"' | '[' | ']' | '\\' | '-' | '^' | '/')) => c,
                _ => return self.wrong("an unknown escape"),
            },
            Some(c) => c,
            None => return self.wrong("the grammar ends within a string or class"),
        };
        Ok(c)
    }

    fn string(&mut self) -> Result<(), String> {
        self.next();
        let mut text = String::new();
        while !self.rest.starts_with('"') {
            text.push(self.character()?);
        }
        self.next();
        self.lark += &serde_json::Value::from(text).to_string();
        Ok(())
    }

    fn class(&mut self) -> Result<(), String> {
        self.next();
        self.lark += "/[";
        if self.rest.starts_with('^') {
            self.next();
            self.lark.push('^');
        }
        while !self.rest.starts_with(']') {
            // A hyphen makes a range unless it stands last.
            let range = self.rest.starts_with('-') && !self.rest[1..].starts_with(']');
            match range {
                true => {
                    self.next();
                    self.lark.push('-');
                }
                false => {
                    let c = self.character()?;
                    self.lark += &format!("\\u{{{:X}}}", u32::from(c));
                }
            }
        }
        self.next();
        self.lark += "]/";
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_rewritten() {
        let grammar = "# a list\nroot ::= item-A (\",\" ws item-A)* # end\nitem-A ::=\n  \"\\\"x\\n\" [a-z\\]-]{1,3}\n  \
                       | .\nws ::= [ \\t]? |\n";
        // An alternative in a line of its own needs its bar at the end of the line before, as in llama.cpp.
        assert!(to_lark(grammar).is_err());
        let grammar = grammar.replace("\n  | .", " | .");
        assert_eq!(
            to_lark(&grammar).unwrap(),
            "start: r_item___ua (\",\" r_ws r_item___ua )* \n\
             r_item___ua: \"\\\"x\\n\" /[\\u{61}-\\u{7A}\\u{5D}\\u{2D}]/{1,3} | /(.|\\n)/ \n\
             r_ws: /[\\u{20}\\u{9}]/? | \"\"\n"
        );
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (grammar, told) in [
            ("root = \"a\"", "line 1: ::= must follow the name root"),
            (
                "root ::= \"a\"\n\nb ::= (\"c\"",
                "line 3: a bracket ( is not closed",
            ),
            (
                "root ::= \"a",
                "line 1: the grammar ends within a string or class",
            ),
            ("root ::= %", "line 1: '%' has no meaning here"),
            ("root ::= [\\q]", "line 1: an unknown escape"),
            (
                "root ::= \"a\"{x}",
                "line 1: a repetition is {m}, {m,} or {m,n}",
            ),
        ] {
            assert_eq!(to_lark(grammar), Err(told.to_owned()), "{grammar}");
        }
    }
}
