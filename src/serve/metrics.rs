//! What the server counts, as Prometheus reads it (text exposition format 0.0.4).

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Time that only grows, to the microsecond.
#[derive(Debug, Default)]
pub struct Clock(AtomicU64);

impl Clock {
    /// Adds.
    pub fn add(&self, time: Duration) {
        let micros = time.as_micros() as u64;
        self.0.fetch_add(micros, Ordering::Relaxed);
    }

    fn seconds(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64 / 1e6
    }
}

/// A number that comes and goes.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets it.
    pub fn set(&self, count: u64) {
        self.0.store(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests that were answered with success.
    pub succeeded: Counter,
    /// Requests that the client got wrong.
    pub refused: Counter,
    /// Requests for which the queue had no place.
    pub rejected: Counter,
    /// Requests that failed here.
    pub failed: Counter,
    /// Texts whose client went away.
    pub cancelled: Counter,
    /// Prompt tokens that were read.
    pub read: Counter,
    /// Prompt tokens that a session held already.
    pub cached: Counter,
    /// Time spent on reading.
    pub reading: Clock,
    /// Tokens that were written.
    pub written: Counter,
    /// Passes that wrote them, each for all texts at once.
    pub passes: Counter,
    /// Time spent on these passes.
    pub writing: Clock,
    /// Texts in work.
    pub active: Gauge,
    /// Texts in the queue.
    pub waiting: Gauge,
}

impl Metrics {
    /// The exposition.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
            let _ = writeln!(
                text,
                "# HELP fewbit_{name} {help}\n# TYPE fewbit_{name} {kind}"
            );
            for (labels, value) in samples {
                let _ = writeln!(text, "fewbit_{name}{labels} {value}");
            }
        };
        let count = |counter: &Counter| counter.get() as f64;
        metric(
            "requests_total",
            "counter",
            "Requests by how they went.",
            &[
                (r#"{result="ok"}"#, count(&self.succeeded)),
                (r#"{result="client_error"}"#, count(&self.refused)),
                (r#"{result="queue_full"}"#, count(&self.rejected)),
                (r#"{result="server_error"}"#, count(&self.failed)),
            ],
        );
        let counters = [
            (
                "cancelled_total",
                "Texts whose client went away.",
                count(&self.cancelled),
            ),
            (
                "prompt_tokens_total",
                "Prompt tokens that were read.",
                count(&self.read),
            ),
            (
                "cached_tokens_total",
                "Prompt tokens that a session held already.",
                count(&self.cached),
            ),
            (
                "prompt_seconds_total",
                "Time spent on reading prompts.",
                self.reading.seconds(),
            ),
            (
                "generated_tokens_total",
                "Tokens that were written.",
                count(&self.written),
            ),
            (
                "decode_passes_total",
                "Passes of the model that wrote them.",
                count(&self.passes),
            ),
            (
                "decode_seconds_total",
                "Time spent on these passes.",
                self.writing.seconds(),
            ),
        ];
        for (name, help, value) in counters {
            metric(name, "counter", help, &[("", value)]);
        }
        let gauges = [
            ("active", "Texts in work.", self.active.get()),
            ("waiting", "Texts in the queue.", self.waiting.get()),
        ];
        for (name, help, value) in gauges {
            metric(name, "gauge", help, &[("", value as f64)]);
        }
        text
    }
}
