//! A session's next tokens, one after the other, with or without drafts.

use crate::draft::draft;
use crate::engine::{Error, Session};
use crate::sampler::Sampler;

/// The tokens that follow what a session holds, up to a token that ends the text (which is not
/// yielded) or a limit. Each is fed to the session when the next one is asked for.
///
/// With drafts ([`with_drafts`](Self::with_drafts)), a token is fed together with a guess of
/// those after it, and each of them is drawn from the logits before it as ever: as long as the
/// draw is what was guessed, the next logits are there already. So the tokens are the same, and
/// their logits the same bits, however good the guesses are.
pub struct Generation<'a> {
    session: &'a mut Session,
    sampler: &'a mut Sampler,
    left: usize,
    /// The last token, which is not fed yet.
    pending: Option<u32>,
    /// Tokens of the session that stand; those behind it are guesses.
    sure: usize,
    drafts: usize,
    drafted: usize,
    accepted: usize,
}

impl<'a> Generation<'a> {
    /// At most `limit` tokens after what `session` holds; it must have been fed before.
    pub fn new(session: &'a mut Session, sampler: &'a mut Sampler, limit: usize) -> Self {
        Self {
            sure: session.tokens().len(),
            session,
            sampler,
            left: limit,
            pending: None,
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

    /// Tokens that were guessed so far.
    pub fn drafted(&self) -> usize {
        self.drafted
    }

    /// Guesses so far that came true.
    pub fn accepted(&self) -> usize {
        self.accepted
    }

    /// Feeds `token`, with guesses where there are any: no more than could still be yielded.
    fn feed(&mut self, token: u32) -> Result<(), Error> {
        let room = self.session.capacity() - self.sure;
        let limit = self.drafts.min(self.left).min(room.saturating_sub(1));
        if limit == 0 {
            self.session.step(token)?;
        } else {
            let mut tokens = self.session.tokens().to_vec();
            tokens.push(token);
            let guess = draft(&tokens, limit);
            self.drafted += guess.len();
            self.session.steps(&[&[token][..], &guess].concat())?;
        }
        self.sure += 1;
        Ok(())
    }

    /// Draws the token after those that stand.
    fn draw(&mut self) -> u32 {
        let logits = self.session.logits_after(self.sure.saturating_sub(1));
        let history = &self.session.tokens()[..self.sure];
        self.sampler.sample(logits.unwrap_or_default(), history)
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        if let Some(token) = self.pending.take()
            && let Err(error) = self.feed(token)
        {
            self.left = 0;
            return Some(Err(error));
        }
        let token = self.draw();
        if self.session.engine().tokenizer().is_end(token) {
            self.left = 0;
            return None;
        }
        if self.session.tokens().get(self.sure) == Some(&token) {
            self.accepted += 1;
            self.sure += 1;
        } else {
            self.session.rewind(self.sure);
            self.pending = Some(token);
        }
        Some(Ok(token))
    }
}

impl Drop for Generation<'_> {
    /// Leaves in the session what was yielded and fed.
    fn drop(&mut self) {
        self.session.rewind(self.sure);
    }
}
