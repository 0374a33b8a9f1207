//! A model in less memory than it takes: the same bits as mapped, whatever the file looks like; errors
//! where it cannot be read; and no more memory than it was given.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewbit::engine::{Engine, Options};
use fewbit::gguf::{self, Metadata, names};
use fewbit::plan::Shape;
use fewbit::plan::fit::Fit;
use fewbit::plan::memory::Memory;
use quant_tests::fixture::{self, Parts};
use tempfile::TempDir;

const CONTEXT: usize = 256;

/// The least memory that the model in `path` runs in, and what a slot takes more.
fn least(path: &Path) -> (u64, u64) {
    let gguf = gguf::read(path).unwrap();
    let shape = Shape::from_metadata(&gguf.metadata).unwrap();
    let all_f32 = gguf
        .tensors
        .iter()
        .all(|tensor| tensor.kind.name() == "F32");
    let kv = match all_f32 {
        true => fewbit::quant::BlockType::F32,
        false => shape.kv_type(),
    };
    let refused = Fit::new(&shape, &gguf.tensors, 1, Some(CONTEXT), kv).unwrap_err();
    let fits = Fit::new(&shape, &gguf.tensors, refused.needed, Some(CONTEXT), kv).unwrap();
    let classes = fits.slots.expect("the least is not enough for all").classes;
    let slot = classes.iter().map(|class| class.slot_bytes).max().unwrap();
    (refused.needed, slot)
}

fn load(path: &Path, memory: Memory, threads: usize) -> Arc<Engine> {
    let options = Options {
        memory,
        threads: Some(threads),
        context: Some(CONTEXT),
        ..Options::default()
    };
    Engine::load(path, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// The logits after every token of a prompt, and after some steps alone and some together.
fn logits(engine: &Arc<Engine>) -> Vec<u32> {
    let text: String = fixture::text("fr").chars().take(400).collect();
    let mut tokens = engine.tokenizer().encode_with_bos(&text, false).unwrap();
    tokens.truncate(80);
    let mut session = engine.session(CONTEXT).unwrap();
    let mut bits = Vec::new();
    session
        .score(&tokens[..60], 0, |_, logits| {
            bits.extend(logits.iter().map(|x| x.to_bits()));
        })
        .unwrap();
    for token in &tokens[60..70] {
        let logits = session.step(*token).unwrap();
        bits.extend(logits.iter().map(|x| x.to_bits()));
    }
    session.steps(&tokens[70..]).unwrap();
    for position in 70..80 {
        let logits = session.logits_after(position).unwrap();
        bits.extend(logits.iter().map(|x| x.to_bits()));
    }
    bits
}

/// Checks a file with few slots, with more, and with other numbers of threads.
fn check(path: &Path, what: &str) {
    let mapped = load(path, Memory::Bytes(1 << 40), 2);
    assert!(mapped.expert_cache().is_none());
    let expected = logits(&mapped);
    let (least, slot) = least(path);
    for (more, threads) in [(0, 2), (3, 1), (9, 2)] {
        let engine = load(path, Memory::Bytes(least + more * slot), threads);
        let cache = engine.expert_cache().expect("it does not fit");
        assert!(logits(&engine) == expected, "{what}, {more} slots more");
        let counters = cache.counters();
        assert!(counters.read_bytes > 0 && counters.needed > counters.hits);
    }
}

#[test]
fn the_same_bits_streamed_and_mapped() {
    for mix in ["Q4_0", "Q4_K_M", "Q8_0", "F16", "F32"] {
        check(&fixture::tiny_mixtral(mix).path, mix);
    }
}

#[test]
fn old_files_with_a_tensor_an_expert() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let old = Parts::read(&file.path).per_expert().write();
    check(&old.path, "per expert");
}

/// Matrices that begin at every multiple of 32 and end anywhere: other metadata before them.
#[test]
fn any_alignment() {
    let file = fixture::tiny_mixtral("Q4_0");
    let mut parts = Parts::read(&file.path);
    let mut starts = std::collections::BTreeSet::new();
    for padding in [1, 500, 1900, 3000] {
        parts
            .metadata
            .insert("general.description", "x".repeat(padding).as_str());
        let file = parts.write();
        let gguf = gguf::read(&file.path).unwrap();
        let experts = names::experts(0, names::FFN_UP);
        starts.insert(gguf.tensor(&experts).unwrap().offset % 4096);
        check(&file.path, &format!("{padding} bytes of metadata more"));
    }
    assert!(starts.len() == 4 && !starts.contains(&0), "{starts:?}");
}

/// Writes a model in three files; returns the first's path.
fn split(parts: &Parts, folder: &Path) -> PathBuf {
    let path = |number: usize| folder.join(format!("model-{number:05}-of-00003.gguf"));
    let third = parts.tensors.len().div_ceil(3);
    for (number, tensors) in parts.tensors.chunks(third).enumerate() {
        let mut metadata = match number {
            0 => parts.metadata.clone(),
            _ => Metadata::new(),
        };
        metadata.insert("split.no", number as u16);
        metadata.insert("split.tensors.count", parts.tensors.len() as i32);
        // The writer makes single files only: the count is patched in afterwards.
        metadata.insert("split.count", 1_u16);
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(decl, bytes)| (decl.clone(), &bytes[..]))
            .collect();
        let path = path(number + 1);
        gguf::write_whole(&path, &metadata, &tensors).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let key = b"split.count";
        let at = bytes.windows(key.len()).position(|window| window == key);
        bytes[at.unwrap() + key.len() + 4..][..2].copy_from_slice(&3_u16.to_le_bytes());
        fs::write(path, bytes).unwrap();
    }
    path(1)
}

#[test]
fn split_files() {
    let folder = TempDir::new().unwrap();
    let parts = Parts::read(&fixture::tiny_mixtral("Q8_0").path);
    let first = split(&parts, folder.path());
    assert_eq!(gguf::read(&first).unwrap().files.len(), 3);
    check(&first, "three files");
}

#[test]
fn a_file_that_shrinks_is_an_error_and_whole_again_it_goes_on() {
    let file = fixture::tiny_mixtral("Q8_0");
    let (least, _) = least(&file.path);
    let engine = load(&file.path, Memory::Bytes(least), 2);
    let mut session = engine.session(CONTEXT).unwrap();
    session.feed(&[1, 2, 3]).unwrap();
    let before = session.tokens().len();

    let bytes = fs::read(&file.path).unwrap();
    let shrink = |len: usize| {
        let handle = fs::File::options().write(true).open(&file.path).unwrap();
        handle.set_len(len as u64).unwrap();
    };
    shrink(bytes.len() / 10);
    let prompt = [5; 40];
    let step = session.step(4).unwrap_err().to_string();
    let feed = session.feed(&prompt).unwrap_err().to_string();
    for message in [step, feed] {
        assert!(
            message.contains("variant.gguf") || message.contains("model.gguf"),
            "{message}"
        );
        assert!(message.contains("was cut off"), "{message}");
    }
    assert_eq!(session.tokens().len(), before);

    fs::write(&file.path, bytes).unwrap();
    // What was on its way when it failed may fail once more.
    let _ = session.step(4);
    session.rewind(before);
    let expected = {
        let mut other = engine.session(CONTEXT).unwrap();
        other.feed(&[1, 2, 3]).unwrap();
        other.step(4).unwrap().to_vec()
    };
    assert!(session.step(4).unwrap() == expected);
}

#[test]
fn too_little_memory_says_how_much_is_needed() {
    let file = fixture::tiny_mixtral("Q8_0");
    let (least, _) = least(&file.path);
    let options = |memory| Options {
        memory: Memory::Bytes(memory),
        context: Some(CONTEXT),
        ..Options::default()
    };
    let error = Engine::load(&file.path, &options(least - 1)).err().unwrap();
    let message = error.to_string();
    let figure = format!("at least {:.2} GB", least as f64 / 1e9);
    assert!(message.contains(&figure), "{message}");
    assert!(message.contains("--memory"), "{message}");
    Engine::load(&file.path, &options(least)).unwrap();
}
