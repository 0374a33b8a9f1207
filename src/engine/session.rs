//! [`Session`], one timeline of a model.

use std::sync::Arc;

use super::{Engine, Error, Turn};
use crate::kernels::Phase;
use crate::model::{KvCache, KvKind, Slot, hidden_states};

/// One timeline: the tokens so far, their keys and values, and the logits of the last ones.
pub struct Session {
    pub(super) engine: Arc<Engine>,
    pub(super) cache: KvCache,
    pub(super) tokens: Vec<u32>,
    /// `[held, vocab]`: the logits after the last tokens, as many as are held.
    pub(super) logits: Vec<f32>,
}

impl Session {
    /// The model that this is a session of.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Logits after the last token, one a vocabulary entry; empty before the first, and after
    /// a [`rewind`](Self::rewind) to a token whose logits are not held.
    pub fn logits(&self) -> &[f32] {
        let last = self.tokens.len().checked_sub(1);
        last.and_then(|last| self.logits_after(last))
            .unwrap_or_default()
    }

    /// Logits after the token at `position`, where they are held: those of the last token, and
    /// of all tokens that the last [`Engine::generate`] or [`step`](Self::step) appended.
    pub fn logits_after(&self, position: usize) -> Option<&[f32]> {
        let vocab = self.engine.shape().vocab;
        let first = self.tokens.len() - self.logits.len() / vocab;
        let row = position.checked_sub(first)?;
        self.logits.chunks_exact(vocab).nth(row)
    }

    /// Appends a prompt and returns the logits after its last token. They are the same bits
    /// however a prompt is cut into calls.
    ///
    /// # Errors
    /// [`Error::ContextFull`], [`Error::Token`], and [`Error::Empty`] where `tokens` is empty:
    /// the session is then unchanged. [`Error::NotFinite`] where the weights are damaged: it
    /// then holds the tokens that it held, without logits.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], Error> {
        let last = tokens.len().checked_sub(1).ok_or(Error::Empty)?;
        self.score(tokens, last, |_, _| {})?;
        Ok(&self.logits)
    }

    /// Appends a token that was generated, by the kernels for single tokens, and returns the
    /// logits after it. They differ from those of [`feed`](Self::feed) by rounding.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn step(&mut self, token: u32) -> Result<&[f32], Error> {
        self.steps(&[token])?;
        Ok(&self.logits)
    }

    /// Appends several tokens as as many calls of [`step`](Self::step) would, in one pass, and
    /// holds the logits after each: what [`Engine::generate`] does for one session.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn steps(&mut self, tokens: &[u32]) -> Result<(), Error> {
        let engine = Arc::clone(&self.engine);
        let session = self;
        let mut results = engine.generate(&mut [Turn { session, tokens }]);
        results.pop().expect("a result for the turn")
    }

    /// Appends a prompt and calls `visit(i, logits)` for each index `i >= from` with the logits
    /// after `tokens[i]`, in order. The last logits are kept as by [`feed`](Self::feed).
    /// The engine is busy while `visit` runs: it must not feed another session of it.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn score(
        &mut self,
        tokens: &[u32],
        from: usize,
        mut visit: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        self.check(tokens)?;
        let engine = Arc::clone(&self.engine);
        let vocab = engine.shape().vocab;
        let from = from.min(tokens.len() - 1);
        let before = self.tokens.len();
        let mut start = 0;
        for part in tokens.chunks(engine.batch) {
            let logits_from = from.saturating_sub(start).min(part.len());
            let slot = Slot {
                cache: &mut self.cache,
                tokens: part,
                logits_from,
            };
            let state = match engine.forward(Phase::Prompt, vec![slot]) {
                Ok(state) => state,
                Err(error) => {
                    self.rewind(before);
                    self.logits.clear();
                    return Err(error.into());
                }
            };
            if let Err(error) = self.check_logits(logits_from, &state.logits) {
                self.rewind(before);
                self.logits.clear();
                return Err(error);
            }
            self.tokens.extend_from_slice(part);
            for (index, logits) in (start + logits_from..).zip(state.logits.chunks_exact(vocab)) {
                visit(index, logits);
            }
            start += part.len();
            self.logits.clear();
            let last = state.logits.len().saturating_sub(vocab);
            self.logits.extend_from_slice(&state.logits[last..]);
        }
        Ok(())
    }

    /// Appends a prompt and calls `visit(i, hidden)` with the final hidden state (`[hidden]`, after the output norm) of
    /// each of its tokens, in order. There are no logits after it. The engine is busy while `visit` runs, as in
    /// [`score`](Self::score).
    ///
    /// # Errors
    /// As [`feed`](Self::feed), except that damaged weights show in the hidden states only.
    pub fn hidden_states(
        &mut self,
        tokens: &[u32],
        mut visit: impl FnMut(usize, &[f32]),
    ) -> Result<(), Error> {
        self.check(tokens)?;
        let engine = Arc::clone(&self.engine);
        self.logits.clear();
        let before = self.tokens.len();
        let mut start = 0;
        for part in tokens.chunks(engine.batch) {
            let slot = Slot {
                cache: &mut self.cache,
                tokens: part,
                logits_from: part.len(),
            };
            let state = engine.forward(Phase::Prompt, vec![slot]);
            let state = state.inspect_err(|_| self.rewind(before))?;
            self.tokens.extend_from_slice(part);
            let (model, kernels) = (&engine.model, &engine.kernels);
            hidden_states(model, kernels, &state, part.len(), |t, hidden| {
                visit(start + t, hidden)
            });
            start += part.len();
        }
        Ok(())
    }

    /// Whether `tokens` can be appended.
    pub(super) fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        let vocab = self.engine.shape().vocab;
        let wanted = self.tokens.len() + tokens.len();
        if tokens.is_empty() {
            return Err(Error::Empty);
        }
        if wanted > self.capacity() {
            return Err(Error::ContextFull {
                wanted,
                capacity: self.capacity(),
            });
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        Ok(())
    }

    /// Whether the `logits` of tokens to be appended are numbers, those of the token `from`
    /// first.
    pub(super) fn check_logits(&self, from: usize, logits: &[f32]) -> Result<(), Error> {
        // Whole blocks without a branch: a vocabulary is long.
        let finite = |block: &[f32]| block.iter().fold(true, |all, x| all & x.is_finite());
        if logits.chunks(256).all(finite) {
            return Ok(());
        }
        let bad = logits.iter().position(|logit| !logit.is_finite());
        let bad = bad.unwrap_or_default();
        Err(Error::NotFinite {
            file: self.engine.path.clone(),
            position: self.tokens.len() + from + bad / self.engine.shape().vocab,
        })
    }

    /// Forgets everything and takes over the first `len` tokens of `other` with their keys and values, so that
    /// they need not be computed again. There are no logits until the next [`feed`](Self::feed).
    ///
    /// # Panics
    /// If `other` is another engine's, has fewer tokens, or if they do not fit.
    pub fn copy_from(&mut self, other: &Self, len: usize) {
        assert!(
            Arc::ptr_eq(&self.engine, &other.engine),
            "a session of another engine"
        );
        self.cache.copy_from(&other.cache, len);
        self.logits.clear();
        self.tokens.clear();
        self.tokens.extend_from_slice(&other.tokens[..len]);
    }

    /// Bytes of the keys and values of so many tokens; `None` where that is beyond counting.
    pub fn kv_bytes(&self, tokens: usize) -> Option<u64> {
        self.cache.bytes_of(tokens)
    }

    /// How keys and values are kept.
    pub fn kv_kind(&self) -> KvKind {
        self.cache.kind()
    }

    /// The keys and values of the tokens, `[layer][kv_head][keys, values]`: a slice each, as
    /// [`restore`](Self::restore) takes them.
    pub fn keys_and_values(&self) -> impl Iterator<Item = &[u8]> {
        self.cache.planes()
    }

    /// Forgets everything and takes over `tokens`, whose keys and values `fill` provides slice by slice. There are no
    /// logits until the next [`feed`](Self::feed).
    ///
    /// # Errors
    /// Those of `fill`, and of [`feed`](Self::feed) where the tokens cannot be held: the session is then empty.
    pub fn restore<E: From<Error>>(
        &mut self,
        tokens: Vec<u32>,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.rewind(0);
        if tokens.is_empty() {
            return Ok(());
        }
        self.check(&tokens)?;
        self.cache
            .planes_mut(tokens.len())
            .try_for_each(&mut fill)?;
        self.cache.len = tokens.len();
        self.tokens = tokens;
        Ok(())
    }

    /// Forgets all but the first `len` tokens. The logits after the last of those are kept where
    /// they are held ([`logits_after`](Self::logits_after)); else they are gone until the next
    /// [`feed`](Self::feed).
    pub fn rewind(&mut self, len: usize) {
        let vocab = self.engine.shape().vocab;
        let gone = self.tokens.len().saturating_sub(len);
        let held = self.logits.len() / vocab;
        self.logits.truncate(held.saturating_sub(gone) * vocab);
        self.tokens.truncate(len);
        self.cache.len = self.tokens.len();
    }
}
