//! Ids → text, one at a time, in whole characters.

use super::Tokenizer;

/// A streaming decoder: a token may end in the middle of a character, and nobody should see half of one.
#[derive(Debug)]
pub struct Stream<'t> {
    tokenizer: &'t Tokenizer,
    /// The start of a character whose rest has not come yet: at most 3 bytes between two calls.
    pending: Vec<u8>,
    strips_space: bool,
    special: bool,
}

impl<'t> Stream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        Stream {
            tokenizer,
            pending: Vec::new(),
            strips_space: false,
            special: false,
        }
    }

    /// Decodes a text from its start: the space that encoding puts in front is taken off.
    pub fn at_start(mut self) -> Self {
        self.strips_space = self.tokenizer.adds_space;
        self
    }

    /// Writes control tokens out.
    pub fn with_special(mut self) -> Self {
        self.special = true;
        self
    }

    /// Takes a token; returns the characters that are whole now, often none. Bytes that cannot begin or continue
    /// a character become replacement characters.
    pub fn push(&mut self, id: u32) -> String {
        if !self.special && self.tokenizer.is_hidden(id) {
            return String::new();
        }
        let mut bytes = self.tokenizer.token_bytes(id);
        if self.strips_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strips_space = false;
        }
        self.pending.extend_from_slice(bytes);

        let mut text = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text += chunk.valid();
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            let at_end = done + invalid.len() == self.pending.len();
            if at_end && may_continue(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                done += invalid.len();
            }
        }
        self.pending.drain(..done);
        text
    }

    /// Ends the text: what is left of an unfinished character becomes a replacement character.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether `bytes` are the start of a character that more bytes could complete.
fn may_continue(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
