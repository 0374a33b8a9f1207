//! The gate for damaged files, up to a loaded model: the trained fixture truncated anywhere, or
//! with any header byte changed, loads or is refused with a line that names it; it never panics
//! and never allocates over 1 GiB. One test alone in its process, so that the peak is its own.

use std::fs;
use std::path::Path;

use fewbit::engine::{Engine, Options};
use fewbit::gguf;
use quant_tests::allocator::{self, CountingAllocator};
use quant_tests::fixture;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Loads a damaged file and lets it read two tokens; returns whether it loaded.
fn survives(path: &Path, bytes: &[u8], damage: &str) -> bool {
    fs::write(path, bytes).unwrap();
    let options = Options {
        threads: Some(1),
        ..Options::default()
    };
    let fed = Engine::load(path, &options).and_then(|engine| {
        let logits = engine.session(2)?.feed(&[1, 7])?.len();
        assert_eq!(logits, engine.shape().vocab, "{damage}");
        Ok(())
    });
    if let Err(error) = &fed {
        let message = error.to_string();
        assert!(
            message.contains(path.to_str().unwrap()),
            "{damage}: {message}"
        );
        assert!(!message.contains('\n'), "{damage}: {message}");
    }
    fed.is_ok()
}

#[test]
fn damaged_models_load_or_are_refused_in_bounded_memory() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let whole = fs::read(&file.path).unwrap();
    let header = gguf::read(&file.path).unwrap().tensors[0].offset as usize;
    let path = file.path.with_file_name("damaged.gguf");
    let mut rng = ChaCha8Rng::seed_from_u64(2);

    for _ in 0..200 {
        let end = rng.random_range(0..whole.len());
        let loaded = survives(&path, &whole[..end], &format!("cut at {end}"));
        // Only the padding after the last tensor can be missed.
        assert!(!loaded || whole.len() - end < 32, "cut at {end}");
    }

    let mut loaded = 0;
    for _ in 0..2000 {
        let at = rng.random_range(0..header);
        let change = rng.random_range(1..=255_u8);
        let mut bytes = whole.clone();
        bytes[at] ^= change;
        loaded += usize::from(survives(&path, &bytes, &format!("byte {at} ^ {change}")));
    }
    assert!((1..2000).contains(&loaded), "{loaded} of 2000 loaded");

    let peak = allocator::peak();
    println!("{loaded} of 2000 loaded, peak {} MiB", peak >> 20);
    assert!(peak < 1 << 30, "{peak} bytes were allocated at a time");
}
