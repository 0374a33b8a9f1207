//! [`Engine`], the loaded model, and [`Session`], one timeline with its KV cache.

/// A loaded, shareable model.
pub struct Engine;

/// One timeline with its KV cache.
pub struct Session;
