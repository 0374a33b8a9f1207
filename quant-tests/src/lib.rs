//! Helpers shared by the tests: fixtures, generated rows, the oracle.

pub mod allocator;
pub mod fixture;
pub mod products;
pub mod rows;
