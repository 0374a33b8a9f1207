//! What a bench says of a model whose experts come from disk: how many were in memory, what was read, and the
//! time that the disk alone would have taken.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::bench::Test;
use crate::cli::common::{CacheUse, PROBE};
use crate::engine::Engine;
use crate::experts::Counters;
use crate::plan::fit::Fit;
use crate::tensor::direct::{Error, Files};

/// Bytes a second that the disk of a model's file gives now; `None` for a model that is in memory.
///
/// # Errors
/// As [`Files::speed`].
pub fn disk_speed(engine: &Arc<Engine>) -> Result<Option<f64>, Error> {
    match engine.expert_cache() {
        None => Ok(None),
        Some(_) => Files::open(engine.gguf())?.speed(PROBE).map(Some),
    }
}

/// What the cache did over the timed repetitions of a test.
#[derive(Default)]
pub struct Streamed {
    repetitions: u32,
    time: Duration,
    counters: Option<Counters>,
}

impl Streamed {
    /// Adds a repetition that took `time`, between two readings of the counters; those of the warm-up are none.
    pub fn add(&mut self, time: Duration, before: Option<Counters>, after: Option<Counters>) {
        let (Some(before), Some(after)) = (before, after) else {
            return;
        };
        self.repetitions += 1;
        self.time += time;
        let done = after - before;
        self.counters = Some(self.counters.map_or(done, |sum| sum + done));
    }

    /// The line of `test`, on a disk that gives `disk` bytes a second; `None` where nothing was streamed.
    pub fn row(&self, test: Test, fit: Option<&Fit>, disk: Option<f64>) -> Option<Row> {
        let (counters, fit, disk) = (self.counters?, fit?, disk?);
        let tokens = test.tokens() * self.repetitions as usize;
        let time = self.time.as_secs_f64();
        let bound = match test {
            // All experts are needed.
            Test::Prompt(_) => fit.expert_bytes as f64 / disk * f64::from(self.repetitions),
            Test::Generate { .. } => fit.read_bytes_per_token() / disk * tokens as f64,
        };
        Some(Row {
            cache: CacheUse::new(counters, tokens),
            read_gb_s: counters.read_bytes as f64 / time / 1e9,
            unused: counters.unused_bytes as f64 / counters.read_bytes.max(1) as f64,
            busy: counters.busy.as_secs_f64() / time,
            share_of_disk: bound / time,
        })
    }
}

/// What is printed below a test.
pub struct Row {
    cache: CacheUse,
    read_gb_s: f64,
    /// The share of what was read that was not used.
    unused: f64,
    /// The share of the time that something was being read.
    busy: f64,
    share_of_disk: f64,
}

impl Row {
    /// As `expert_cache` in JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let mut object = self.cache.json();
        object["read_gb_s"] = json!(self.read_gb_s);
        object["unused"] = json!(self.unused);
        object["disk_busy"] = json!(self.busy);
        object["share_of_disk"] = json!(self.share_of_disk);
        object
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "  {}; {:.2} GB/s read, {:.1} % of it for nothing, disk busy {:.0} % of the time; {:.1} % of what it allows",
            self.cache,
            self.read_gb_s,
            100.0 * self.unused,
            100.0 * self.busy,
            100.0 * self.share_of_disk
        )
    }
}
