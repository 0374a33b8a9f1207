//! Texts through a model layer by layer: every weight is read once, whatever the texts' length.

use std::io;
use std::sync::Arc;

use super::{Engine, Error, Session};
use crate::kernels::Phase;
use crate::model::{Observer, Slot, forward_part};

/// Texts on their way through the layers. Between two layers it holds each token's residual
/// stream, 4 · hidden bytes: what a whole pass over one text after the other need not keep, but
/// for which that would read the model once a text.
pub struct Walk {
    session: Session,
    texts: Vec<Vec<u32>>,
    /// The residual streams, `[tokens of all texts, hidden]`.
    x: Vec<f32>,
    layer: usize,
}

impl Engine {
    /// Starts `texts` on their way.
    ///
    /// # Errors
    /// [`Error::Empty`] for a text without tokens, [`Error::Token`], and [`Error::NoRoom`] where the longest
    /// text's keys and values or the residual streams find no memory.
    pub fn walk(self: &Arc<Self>, texts: Vec<Vec<u32>>) -> Result<Walk, Error> {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let session = self.session(longest)?;
        for text in &texts {
            session.check(text)?;
        }
        let len = texts.iter().map(Vec::len).sum::<usize>() * self.shape().hidden;
        let mut x = Vec::new();
        x.try_reserve_exact(len).map_err(|_| Error::NoRoom {
            context: longest,
            bytes: 4 * len as u64,
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        x.resize(len, 0.0);
        Ok(Walk {
            session,
            texts,
            x,
            layer: 0,
        })
    }
}

impl Walk {
    /// The layer that comes next; `None` when all are done.
    pub fn next_layer(&self) -> Option<usize> {
        (self.layer < self.session.engine().shape().layers).then_some(self.layer)
    }

    /// Takes all texts through the next layer, and through the output head after the last one.
    /// `observer` sees every token at every site of it, a batch at a time and in the texts' order;
    /// `progress` is called after each text.
    ///
    /// # Errors
    /// [`Error::NotFinite`] where the weights are damaged; when experts cannot be read.
    pub fn step(
        &mut self,
        observer: Observer<'_>,
        mut progress: impl FnMut(),
    ) -> Result<(), Error> {
        let engine = Arc::clone(self.session.engine());
        let hidden = engine.shape().hidden;
        let last = self.layer + 1 == engine.shape().layers;
        let mut at = 0;
        for text in &self.texts {
            self.session.rewind(0);
            for part in text.chunks(engine.batch) {
                let x = &mut self.x[at..at + part.len() * hidden];
                at += x.len();
                let mut state = engine.lock();
                state.x[..x.len()].copy_from_slice(x);
                let slot = Slot {
                    cache: &mut self.session.cache,
                    tokens: part,
                    logits_from: if last { 0 } else { part.len() },
                };
                forward_part(
                    &engine.model,
                    &engine.pool,
                    &engine.kernels,
                    Phase::Prompt,
                    &mut state,
                    vec![slot],
                    self.layer..self.layer + 1,
                    Some(&mut *observer),
                )?;
                x.copy_from_slice(&state.x[..x.len()]);
                if let Some(bad) = x.iter().position(|x| !x.is_finite()) {
                    return Err(Error::NotFinite {
                        file: engine.path.clone(),
                        position: self.session.cache.len - part.len() + bad / hidden,
                    });
                }
            }
            progress();
        }
        self.layer += 1;
        Ok(())
    }
}
