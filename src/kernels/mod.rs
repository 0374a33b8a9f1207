//! Dot products and matrix products; one file an instruction set.
