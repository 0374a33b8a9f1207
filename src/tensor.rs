//! A mapped file's tensors as typed rows.
