//! The text of an answer as it grows: tokens in, characters out, up to a stop string.

use crate::tokenizer::{Stream, TokenKind, Tokenizer};

/// Turns the tokens of an answer into its text, without the white space that the template puts before it, and without
/// anything from a stop string on, wherever tokens cut it.
#[derive(Debug)]
pub struct Answer<'t> {
    stream: Stream<'t>,
    /// What of the template's white space may still come.
    lead: String,
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// The stop string that came.
    stop: Option<usize>,
}

impl<'t> Answer<'t> {
    /// Text that goes on where a prompt ends.
    pub fn continuing(tokenizer: &'t Tokenizer) -> Self {
        Self {
            stream: tokenizer.stream(),
            lead: String::new(),
            stops: Vec::new(),
            held: String::new(),
            stop: None,
        }
    }

    /// An answer to `prompt`, after which the template writes `lead`
    /// ([`Template::lead`](crate::chat::Template::lead)).
    pub fn to(prompt: &[u32], lead: &str, tokenizer: &'t Tokenizer) -> Self {
        // The space that begins an answer belongs to the template if that writes one, and else
        // to a vocabulary that puts it after a control token.
        let special = |&id: &u32| {
            let kind = tokenizer.kind(id);
            kind.is_some_and(|kind| !matches!(kind, TokenKind::Normal | TokenKind::Byte))
        };
        let mut answer = Self::continuing(tokenizer);
        if lead.is_empty() && prompt.last().is_some_and(special) {
            answer.stream = answer.stream.at_start();
        }
        answer.lead = lead.to_owned();
        answer
    }

    /// Ends the text before the first of `stops` that comes; empty ones never do.
    pub fn with_stops(mut self, stops: Vec<String>) -> Self {
        self.stops = stops;
        self.stops.retain(|stop| !stop.is_empty());
        self
    }

    /// Writes control tokens out.
    pub fn with_special(mut self) -> Self {
        self.stream = self.stream.with_special();
        self
    }

    /// Takes a token; returns the text that is certain now, often none.
    pub fn push(&mut self, token: u32) -> String {
        let piece = self.stream.push(token);
        self.add(&piece)
    }

    /// Ends the answer; returns the text that was held back.
    pub fn finish(&mut self) -> String {
        let tail = self.stream.finish();
        let mut text = self.add(&tail);
        text += &std::mem::take(&mut self.held);
        text
    }

    /// The stop string that ended the text.
    pub fn stop(&self) -> Option<&str> {
        self.stop.map(|index| &self.stops[index][..])
    }

    fn add(&mut self, piece: &str) -> String {
        if self.stop.is_some() {
            return String::new();
        }
        let pairs = piece.bytes().zip(self.lead.bytes());
        let common = pairs.take_while(|(a, b)| a == b).count();
        let piece = &piece[common..];
        match piece.is_empty() {
            true => drop(self.lead.drain(..common)),
            false => self.lead.clear(),
        }
        self.held += piece;
        let found = (self.stops.iter().enumerate())
            .filter_map(|(index, stop)| Some((self.held.find(&stop[..])?, index)))
            .min();
        if let Some((at, index)) = found {
            self.stop = Some(index);
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let rest = self.held.split_off(certain(&self.held, &self.stops));
        std::mem::replace(&mut self.held, rest)
    }
}

/// Bytes of `text` that belong to none of `stops`, whatever comes after it.
pub fn certain(text: &str, stops: &[impl AsRef<str>]) -> usize {
    let longest = stops.iter().map(|stop| stop.as_ref().len()).max();
    let first = text
        .len()
        .saturating_sub(longest.unwrap_or(0).saturating_sub(1));
    let begins = |&at: &usize| {
        let rest = text.is_char_boundary(at).then(|| &text[at..]);
        rest.is_some_and(|rest| stops.iter().any(|stop| stop.as_ref().starts_with(rest)))
    };
    (first..text.len()).find(begins).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, Metadata, Value};

    /// A vocabulary of characters in bytes: `<0x00>` to `<0xFF>` from id 3 on.
    fn tokenizer() -> Tokenizer {
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let pieces: Vec<String> = ["<unk>", "<s>", "</s>"]
            .map(str::to_owned)
            .into_iter()
            .chain(bytes)
            .collect();
        let kinds = (0..pieces.len()).map(|id| match id {
            0 => 2,
            1 | 2 => 3,
            _ => 6,
        });
        let text = |text: &str| Value::String(text.into());
        let metadata = Metadata::from_iter([
            ("tokenizer.ggml.model".to_owned(), text("llama")),
            (
                "tokenizer.ggml.scores".to_owned(),
                Value::Array(Array::F32(vec![0.0; pieces.len()])),
            ),
            (
                "tokenizer.ggml.token_type".to_owned(),
                Value::Array(Array::I32(kinds.collect())),
            ),
            (
                "tokenizer.ggml.tokens".to_owned(),
                Value::Array(Array::String(pieces)),
            ),
        ]);
        Tokenizer::from_metadata(&metadata).unwrap()
    }

    /// What comes of `text` byte by byte: the pieces in order, and the stop string.
    fn pieces(text: &str, lead: &str, stops: &[&str]) -> (Vec<String>, Option<String>) {
        let tokenizer = tokenizer();
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut answer = Answer::to(&[], lead, &tokenizer).with_stops(stops);
        let mut pieces = Vec::new();
        for byte in text.bytes() {
            pieces.push(answer.push(u32::from(byte) + 3));
        }
        pieces.push(answer.finish());
        pieces.retain(|piece| !piece.is_empty());
        (pieces, answer.stop().map(str::to_owned))
    }

    #[test]
    fn stop_strings_are_found_across_tokens() {
        let (pieces, stop) = pieces("one STOP two", "", &["STOP", "two"]);
        assert_eq!(
            (pieces.concat(), stop),
            ("one ".into(), Some("STOP".into()))
        );
    }

    #[test]
    fn what_only_looks_like_a_stop_string_comes_after_all() {
        let (pieces, stop) = self::pieces("a STO STOR ST", "", &["STOP"]);
        assert_eq!((pieces.concat(), stop), ("a STO STOR ST".into(), None));
        assert_eq!(pieces[..4], ["a", " ", "STO ", "STOR"], "{pieces:?}");
    }

    #[test]
    fn of_two_stop_strings_the_one_that_begins_first_counts() {
        let (pieces, stop) = self::pieces("abcd", "", &["d", "bcd", "cd"]);
        assert_eq!((pieces.concat(), stop), ("a".into(), Some("bcd".into())));
    }

    #[test]
    fn stop_strings_of_several_bytes_a_character() {
        let (pieces, stop) = self::pieces("größer é", "", &["ßé", "é"]);
        assert_eq!(
            (pieces.concat(), stop),
            ("größer ".into(), Some("é".into()))
        );
    }

    #[test]
    fn the_templates_white_space_is_no_part_of_an_answer() {
        assert_eq!(pieces("\n\n hi", "\n\n", &[]).0.concat(), " hi");
        assert_eq!(pieces("\nhi\n\n", "\n\n", &[]).0.concat(), "hi\n\n");
        assert_eq!(pieces(" hi", " ", &["h"]), (vec![], Some("h".into())));
    }
}
