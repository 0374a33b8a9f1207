//! Watching what a layer's matrices are given: what calibration hangs into the forward pass.

use crate::kernels::Activations;
use crate::kernels::experts::Routes;

/// Where in the graph activations meet matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// Queries, keys and values: a row of `hidden` columns a token.
    Attention,
    /// Attention's output projection: a row of `heads · head_dim` columns a token.
    AttentionOutput,
    /// Router, gate and up: a row of `hidden` columns a token; the routes say which experts it meets.
    FeedForward,
    /// Down: a row of `ffn` columns a route.
    Down,
    /// The output head: a row of `hidden` columns for each token whose logits are wanted.
    Output,
}

/// Sees the rows that a site's matrices were multiplied with, and in the feed-forward part the
/// routes (a dense model's are one expert of weight 1).
pub type Observer<'a> = &'a mut dyn FnMut(Site, &Activations, Option<&Routes>);
