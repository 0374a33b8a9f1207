//! A session's next tokens, one after the other, with or without drafts.

use crate::draft::draft;
use crate::engine::{Error, Session};
use crate::sampler::Sampler;

/// Where a text that a session writes stands: what is to be fed next, and what was drawn.
///
/// A token is drawn ([`draw`](Self::draw)) whenever nothing is to be fed ([`turn`](Self::turn)); what is drawn is
/// fed with the next turn, and the caller chooses when, and together with which other sessions.
///
/// With drafts, a token is fed together with a guess of those after it, and each of them is drawn from the
/// logits before it as ever: as long as the draw is what was guessed, the next logits are there already. So
/// the tokens are the same, and their logits the same bits, however good the guesses are.
pub struct Writing {
    left: usize,
    /// The last token, which is not fed yet.
    pending: Option<u32>,
    /// Tokens of the session that stand; those behind it are guesses.
    sure: usize,
    drafts: usize,
    drafted: usize,
    accepted: usize,
}

impl Writing {
    /// At most `limit` tokens after what `session` holds; it must have been fed before.
    pub fn new(session: &Session, limit: usize) -> Self {
        Self {
            left: limit,
            pending: None,
            sure: session.tokens().len(),
            drafts: 0,
            drafted: 0,
            accepted: 0,
        }
    }

    /// Guesses up to `tokens` tokens ahead.
    pub fn with_drafts(mut self, tokens: usize) -> Self {
        self.drafts = tokens;
        self
    }

    /// Whether another token may be drawn.
    pub fn is_over(&self) -> bool {
        self.left == 0
    }

    /// Whether the last token has to be fed before another one can be drawn.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// What the session has to be fed before the next token can be drawn: the last one, with guesses where there are
    /// any, no more than could still be drawn. Empty where the logits are there already.
    pub fn turn(&mut self, session: &Session) -> Vec<u32> {
        let Some(token) = self.pending.take() else {
            return Vec::new();
        };
        let room = session.capacity() - self.sure;
        let limit = self.drafts.min(self.left.saturating_sub(1));
        let limit = limit.min(room.saturating_sub(1));
        self.sure += 1;
        if limit == 0 {
            return vec![token];
        }
        let tokens = [session.tokens(), &[token]].concat();
        let guess = draft(&tokens, limit);
        self.drafted += guess.len();
        [&[token][..], &guess].concat()
    }

    /// The logits that the next token is drawn from.
    pub fn logits<'s>(&self, session: &'s Session) -> &'s [f32] {
        let last = self.sure.checked_sub(1);
        last.and_then(|last| session.logits_after(last))
            .unwrap_or_default()
    }

    /// Draws the next token; `None` where the model ends the text, or the limit is reached.
    pub fn draw(&mut self, session: &mut Session, sampler: &mut Sampler) -> Option<u32> {
        self.left = self.left.checked_sub(1)?;
        let token = sampler.sample(self.logits(session), &session.tokens()[..self.sure]);
        if session.engine().tokenizer().is_end(token) {
            self.left = 0;
            return None;
        }
        if session.tokens().get(self.sure) == Some(&token) {
            self.accepted += 1;
            self.sure += 1;
        } else {
            session.rewind(self.sure);
            self.pending = Some(token);
        }
        Some(token)
    }

    /// Takes the guesses back: leaves in the session what was drawn and fed.
    pub fn settle(&self, session: &mut Session) {
        session.rewind(self.sure);
    }
}

/// The tokens that follow what a session holds, up to a token that ends the text (which is not
/// yielded) or a limit. Each is fed to the session when the next one is asked for.
pub struct Generation<'a> {
    session: &'a mut Session,
    sampler: &'a mut Sampler,
    writing: Writing,
}

impl<'a> Generation<'a> {
    /// At most `limit` tokens after what `session` holds; it must have been fed before.
    pub fn new(session: &'a mut Session, sampler: &'a mut Sampler, limit: usize) -> Self {
        Self {
            writing: Writing::new(session, limit),
            session,
            sampler,
        }
    }

    /// Guesses up to `tokens` tokens ahead.
    pub fn with_drafts(mut self, tokens: usize) -> Self {
        self.writing.drafts = tokens;
        self
    }

    /// Tokens that were guessed so far.
    pub fn drafted(&self) -> usize {
        self.writing.drafted
    }

    /// Guesses so far that came true.
    pub fn accepted(&self) -> usize {
        self.writing.accepted
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.writing.is_over() {
            return None;
        }
        let turn = self.writing.turn(self.session);
        if !turn.is_empty()
            && let Err(error) = self.session.steps(&turn)
        {
            self.writing.left = 0;
            return Some(Err(error));
        }
        self.writing.draw(self.session, self.sampler).map(Ok)
    }
}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        self.writing.settle(self.session);
    }
}
