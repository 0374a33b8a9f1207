//! `fewbit serve` as its clients see it, on the trained fixture.

mod features;
mod limits;
mod served;
mod texts;

use quant_tests::fixture::{self, ModelFile};
use serde_json::{Value as Json, json};

fn model() -> ModelFile {
    fixture::tiny_mixtral("Q8_0")
}

/// A greedy completion.
fn greedy(prompt: &str, tokens: usize) -> Json {
    json!({"prompt": prompt, "temperature": 0, "max_tokens": tokens})
}
