//! Whole conversions of small checkpoints.

mod common;
mod dry_run;
mod failures;
mod fixture;
mod imatrix;
mod layouts;
mod memory;
mod metadata;
mod outputs;
mod resume;
