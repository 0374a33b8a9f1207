//! Texts through a model layer by layer: every weight is read once, whatever the texts' length.

use std::io;
use std::sync::Arc;

use super::{Engine, Error, Session};
use crate::kernels::Phase;
use crate::model::{Model, Observer, Slot, forward_part};
use crate::tensor::Matrix;

/// Texts on their way through the layers. Between two layers it holds each token's residual
/// stream, 4 · hidden bytes: what a whole pass over one text after the other need not keep, but
/// for which that would read the model once a text.
pub struct Walk {
    session: Session,
    texts: Vec<Vec<u32>>,
    /// The residual streams, `[tokens of all texts, hidden]`.
    x: Vec<f32>,
    layer: usize,
    /// Weights in place of the engine's.
    variant: Option<Model>,
}

/// Where texts stand between two layers.
pub struct Stand {
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
            variant: None,
        })
    }
}

impl Walk {
    /// The layer that comes next; `None` when all are done.
    pub fn next_layer(&self) -> Option<usize> {
        (self.layer < self.session.engine().shape().layers).then_some(self.layer)
    }

    /// Where the texts stand now.
    pub fn stand(&self) -> Stand {
        Stand {
            x: self.x.clone(),
            layer: self.layer,
        }
    }

    /// Layers that are behind the texts, and their residual streams.
    pub fn streams(&self) -> (usize, &[f32]) {
        (self.layer, &self.x)
    }

    /// Puts the texts behind the number of layers that `fill` returns, with the residual streams that it writes.
    pub fn resume(&mut self, fill: impl FnOnce(&mut [f32]) -> usize) {
        self.layer = fill(&mut self.x);
    }

    /// Puts the texts back to where they stood, and the engine's own weights in force, but for those in whose place `visit`
    /// puts others, by name. `false` where the engine does not hold all its experts in memory: nothing is visited then.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn go_on_with<E>(
        &mut self,
        stand: &Stand,
        visit: impl FnMut(&str, &mut Matrix) -> Result<(), E>,
    ) -> Result<bool, E> {
        self.x.copy_from_slice(&stand.x);
        self.layer = stand.layer;
        self.variant = self.session.engine().model.varied(visit)?;
        Ok(self.variant.is_some())
    }

    /// Takes all texts through all layers that are left and calls `visit(text, position, logits)` for each token of
    /// each text from position `from` on, in order.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn finish(
        &mut self,
        from: usize,
        mut visit: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), Error> {
        while self.next_layer().is_some() {
            self.pass(from, None, &mut visit, &mut || {})?;
        }
        Ok(())
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
        self.pass(0, Some(observer), &mut |_, _, _| {}, &mut progress)
    }

    fn pass(
        &mut self,
        logits_from: usize,
        mut observer: Option<Observer<'_>>,
        visit: &mut dyn FnMut(usize, usize, &[f32]),
        progress: &mut dyn FnMut(),
    ) -> Result<(), Error> {
        let engine = Arc::clone(self.session.engine());
        let model = self.variant.as_ref().unwrap_or(&engine.model);
        let (hidden, vocab) = (engine.shape().hidden, engine.shape().vocab);
        let last = self.layer + 1 == engine.shape().layers;
        let mut at = 0;
        for (index, text) in self.texts.iter().enumerate() {
            self.session.rewind(0);
            for (part, start) in text.chunks(engine.batch).zip((0..).step_by(engine.batch)) {
                let x = &mut self.x[at..at + part.len() * hidden];
                at += x.len();
                let mut state = engine.lock();
                state.x[..x.len()].copy_from_slice(x);
                let wanted = match last {
                    true => logits_from.saturating_sub(start).min(part.len()),
                    false => part.len(),
                };
                let slot = Slot {
                    cache: &mut self.session.cache,
                    tokens: part,
                    logits_from: wanted,
                };
                forward_part(
                    model,
                    &engine.pool,
                    &engine.kernels,
                    Phase::Prompt,
                    &mut state,
                    vec![slot],
                    self.layer..self.layer + 1,
                    observer
                        .as_mut()
                        .map(|observer| &mut **observer as Observer<'_>),
                )?;
                x.copy_from_slice(&state.x[..x.len()]);
                if let Some(bad) = x.iter().position(|x| !x.is_finite()) {
                    return Err(Error::NotFinite {
                        file: engine.path.clone(),
                        position: self.session.cache.len - part.len() + bad / hidden,
                    });
                }
                if last {
                    let rows = state.logits.chunks_exact(vocab);
                    for (position, logits) in (start + wanted..).zip(rows) {
                        visit(index, position, logits);
                    }
                }
            }
            progress();
        }
        self.layer += 1;
        Ok(())
    }
}
