//! Configuration, weights, state and the forward pass.
