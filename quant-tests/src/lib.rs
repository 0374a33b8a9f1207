//! Helpers shared by the tests: fixtures, generated rows, the oracle.

pub mod rows;
