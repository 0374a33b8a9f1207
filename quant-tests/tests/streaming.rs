//! A model in less memory than it takes: the same bits as mapped, whatever the file looks like; errors
//! where it cannot be read; and no more memory than it was given.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fewbit::engine::{Engine, Loading, Options};
use fewbit::generation::Generation;
use fewbit::gguf::{self, Metadata, names};
use fewbit::plan::fit::Fit;
use fewbit::plan::memory::Memory;
use fewbit::plan::{Shape, Size};
use fewbit::sampler::{Sampler, Settings};
use fewbit_convert::config::ModelConfig;
use fewbit_convert::synth::{self, Preset};
use quant_tests::fixture::{self, Parts, binary};
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
        // Guesses of what a trained router does are right more often than chance, 1 in 4.
        let accuracy = counters.accuracy().expect("steps were made");
        assert!(accuracy > 0.3, "{what}: {accuracy} of guesses were right");
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

/// Guesses of tokens, verified several in one pass, through the cache.
#[test]
fn drafts_streamed_are_the_tokens_and_bits_of_none_mapped() {
    let file = fixture::tiny_mixtral("Q8_0");
    let written = |engine: &Arc<Engine>, drafts: usize| {
        let text = fixture::text("en");
        let tokens = engine.tokenizer().encode_with_bos(&text, false).unwrap();
        let mut session = engine.session(CONTEXT).unwrap();
        session.feed(&tokens[..20].repeat(3)).unwrap();
        let mut sampler = Sampler::new(Settings::greedy());
        let mut generation = Generation::new(&mut session, &mut sampler, 100).with_drafts(drafts);
        let tokens: Vec<u32> = generation.by_ref().map(Result::unwrap).collect();
        let (drafted, accepted) = (generation.drafted(), generation.accepted());
        drop(generation);
        let bits: Vec<u32> = session.logits().iter().map(|x| x.to_bits()).collect();
        (tokens, bits, drafted, accepted)
    };
    let mapped = load(&file.path, Memory::Bytes(1 << 40), 2);
    let (tokens, bits, ..) = written(&mapped, 0);
    let (least, slot) = least(&file.path);
    for more in [0, 9] {
        let engine = load(&file.path, Memory::Bytes(least + more * slot), 2);
        let before = engine.expert_cache().expect("it does not fit").counters();
        let (alone, _, none, _) = written(&engine, 0);
        let between = engine.expert_cache().unwrap().counters();
        let (drafted_tokens, drafted_bits, drafted, accepted) = written(&engine, 8);
        let after = engine.expert_cache().unwrap().counters();
        assert!(alone == tokens && drafted_tokens == tokens && drafted_bits == bits);
        assert!(
            none == 0 && accepted > 20 && drafted > accepted,
            "{accepted} of {drafted}"
        );
        // An expert that several tokens of a pass need is needed once.
        let (alone, with) = ((between - before).needed, (after - between).needed);
        assert!(with < alone, "{with} and {alone} experts needed");
    }
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
    let figure = format!("at least {}", Size(least).rounded_up());
    assert!(message.contains(&figure), "{message}");
    assert!(message.contains("--memory"), "{message}");
    Engine::load(&file.path, &options(least)).unwrap();
}

/// What a command that succeeds prints with `--json`.
#[track_caller]
fn json_of(command: &mut Command) -> serde_json::Value {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Synthetic routers choose evenly, or as unevenly as was asked for.
#[test]
fn synthetic_routing_is_as_uneven_as_asked_for() {
    let folder = TempDir::new().unwrap();
    let habits = |zipf: f32| {
        let options = synth::Options {
            name: "routed".to_owned(),
            config: ModelConfig {
                vocab: 512,
                context: 512,
                hidden: 512,
                layers: 6,
                ffn: 512,
                heads: 8,
                kv_heads: 2,
                head_dim: 64,
                ..Preset::Mixtral8x7b.config()
            },
            mix: "Q8_0".parse().unwrap(),
            seed: 3,
            zipf,
            force: true,
        };
        let path = folder.path().join("routed.gguf");
        synth::synth(&path, &options, &indicatif::ProgressBar::hidden()).unwrap();
        let engine = load(&path, Memory::Bytes(1 << 40), 2);
        let mut session = engine.session(CONTEXT).unwrap();
        engine.start_trace();
        for index in 0..CONTEXT as u32 {
            session.step(index * 101 % 512).unwrap();
        }
        engine.take_trace().unwrap().habits().by_rank
    };
    let (even, zipf) = (habits(0.0), habits(1.0));
    assert!(even[0] < 0.2 && even[7] > 0.05, "{even:?}");
    // Two experts a token by Zipf's law: the first of eight takes 30 % of the uses, the last 6 %.
    assert!(
        (0.24..0.42).contains(&zipf[0]) && zipf[7] < 0.09,
        "{zipf:?}"
    );
    assert!(zipf.is_sorted_by(|a, b| a >= b));
}

/// Six times as large as the memory that it gets.
fn large_model(folder: &Path) -> PathBuf {
    let config = ModelConfig {
        vocab: 512,
        context: 512,
        hidden: 1024,
        layers: 8,
        ffn: 3584,
        heads: 8,
        kv_heads: 2,
        head_dim: 128,
        ..Preset::Mixtral8x7b.config()
    };
    let options = synth::Options {
        name: "large".to_owned(),
        config,
        mix: "Q8_0".parse().unwrap(),
        seed: 7,
        zipf: 0.0,
        force: false,
    };
    let path = folder.join("large.gguf");
    synth::synth(&path, &options, &indicatif::ProgressBar::hidden()).unwrap();
    path
}

/// The largest resident set of a command while it runs, mapped pages included.
#[cfg(target_os = "linux")]
fn peak_of(command: &mut std::process::Command) -> (u64, std::process::Output) {
    use std::process::Stdio;
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
        peak = kib.unwrap_or(0u64).max(peak);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    (peak * 1024, child.wait_with_output().unwrap())
}

/// Prompt and generation together stay within the memory given; and the plan says what then happens.
#[cfg(target_os = "linux")]
#[test]
fn the_memory_given_is_not_exceeded() {
    let folder = TempDir::new().unwrap();
    let path = large_model(folder.path());
    let file_bytes = fs::metadata(&path).unwrap().len();
    let memory = 256 << 20;
    assert!(file_bytes > 2 * memory, "{file_bytes}");
    let mut run = Command::new(binary());
    let text = "the history of ".repeat(40);
    run.args([
        "run", "-n", "8", "--temp", "0", "--ctx", "512", "--json", "--memory", "256MiB", "-t", "2",
    ]);
    let (peak, output) = peak_of(run.arg("-m").arg(&path).arg(&text));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert!(error.contains("in slots"), "{error}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let cache = &json["expert_cache"];
    assert!(
        cache["read_bytes_per_token"].as_f64().unwrap() > 1e6,
        "{json}"
    );
    assert!(cache["hit_rate"].as_f64().unwrap() < 1.0, "{json}");
    assert!(json["prompt_tokens"].as_u64().unwrap() > 100, "{json}");
    assert!(peak <= memory, "{peak} bytes were resident of {memory}");
    // Not for want of trying: most of it is used.
    assert!(peak > memory / 2, "{peak} bytes were resident of {memory}");

    // Mapped, the same takes more: the test can tell.
    let mut run = Command::new(binary());
    run.args([
        "run", "-n", "8", "--temp", "0", "--ctx", "512", "--json", "--mmap", "-t", "2",
    ]);
    let (mapped, output) = peak_of(run.arg("-m").arg(&path).arg(&text));
    let same: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["text"], same["text"]);
    assert!(same["expert_cache"].is_null());
    assert!(mapped > memory, "{mapped}");
}

/// A mapped file that shrinks ends the program with a line, not with a signal.
#[cfg(target_os = "linux")]
#[test]
fn a_mapped_file_that_shrinks_is_an_error() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::Stdio;
    let file = fixture::tiny_mixtral("Q8_0");
    let mut child = Command::new(binary())
        .args([
            "chat",
            "--mmap",
            "-n",
            "4",
            "--template",
            "mistral-v1",
            "-m",
        ])
        .arg(&file.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    input.write_all(b"hello\n").unwrap();
    let mut answer = String::new();
    lines.read_line(&mut answer).unwrap();
    let handle = fs::File::options().write(true).open(&file.path).unwrap();
    handle.set_len(4096).unwrap();
    // It may have ended already: the rest of its first answer needs weights too.
    let _ = input.write_all(b"again\n");
    drop(input);
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("was cut off") && error.contains("--no-mmap"),
        "{error}"
    );
    assert_eq!(output.status.code(), Some(1));
}

/// Locked memory of a chat that has answered once, and what it says of the matter.
#[cfg(target_os = "linux")]
fn locked(path: &Path, options: &[&str]) -> (u64, String, Option<i32>) {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::Stdio;
    let mut child = Command::new(binary())
        .args(["chat", "-n", "2", "--template", "mistral-v1"])
        .args(options)
        .arg("-m")
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    // Where nothing can be locked it may have ended.
    let _ = input.write_all(b"hello\n");
    lines.read_line(&mut String::new()).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kib = locked.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    drop(input);
    let mut error = String::new();
    let mut errors = child.stderr.take().unwrap();
    errors.read_to_string(&mut error).unwrap();
    (
        kib.unwrap_or(0_u64) * 1024,
        error,
        child.wait().unwrap().code(),
    )
}

#[cfg(target_os = "linux")]
#[test]
fn weights_are_locked_mapped_and_in_slots_or_it_is_said_why_not() {
    let file = fixture::tiny_mixtral("Q8_0");
    let bytes = fs::metadata(&file.path).unwrap().len();
    let (least, slot) = least(&file.path);
    let memory = (least + 8 * slot).to_string();
    let context = CONTEXT.to_string();
    let streamed = ["--mlock", "--memory", &memory, "--ctx", &context];
    for (options, weights) in [(&["--mlock"][..], bytes), (&streamed[..], 8 * slot)] {
        let (none, _, code) = locked(&file.path, &options[1..]);
        assert_eq!((none, code), (0, Some(0)), "{options:?}");
        let (locked, error, code) = locked(&file.path, options);
        match code {
            Some(0) => assert!(locked >= weights, "{locked} bytes of {weights}: {error}"),
            // Users may be kept from locking so much.
            _ => assert!(code == Some(1) && error.contains("ulimit -l"), "{error}"),
        }
    }
}

/// Two models that are compared share the memory given.
#[cfg(target_os = "linux")]
#[test]
fn a_base_and_its_model_share_one_budget() {
    let folder = TempDir::new().unwrap();
    let path = large_model(folder.path());
    let text = folder.path().join("text");
    fs::write(&text, "the history of ".repeat(60)).unwrap();
    let memory = 384 << 20;
    let mut perplexity = Command::new(binary());
    perplexity.args([
        "perplexity",
        "--ctx",
        "64",
        "--chunks",
        "1",
        "-t",
        "2",
        "--json",
    ]);
    perplexity.args(["--memory", "384MiB", "-f"]).arg(&text);
    perplexity.arg("-m").arg(&path).arg("--base").arg(&path);
    let (peak, output) = peak_of(&mut perplexity);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert_eq!(error.matches("in slots").count(), 2, "{error}");
    assert!(peak <= memory, "{peak} bytes were resident of {memory}");
    assert!(peak > memory / 2, "{peak} bytes were resident of {memory}");
}

#[test]
fn routing_by_chance_is_generated_and_replayed() {
    let folder = TempDir::new().unwrap();
    let trace = folder.path().join("trace.jsonl");
    let generate = |options: &[&str]| {
        let mut generate = Command::new(binary());
        generate
            .args(["experts", "generate"])
            .arg(&trace)
            .args(options);
        generate.status().unwrap().code()
    };
    let hits = |policy: &str, slots: &str| {
        let mut replay = Command::new(binary());
        replay.args(["experts", "replay", "--json", "--slots", slots]);
        let json = json_of(replay.arg(&trace));
        let policies = json["policies"].as_array().unwrap();
        let found = policies.iter().find(|found| found["name"] == policy);
        found.unwrap()["hit_rate"].as_f64().unwrap()
    };
    // What the table at the head of `experts/policy.rs` says of the default: best or nearly so everywhere.
    let kinds: [&[&str]; 4] = [
        &[],
        &["--zipf", "1"],
        &["--repeats", "0.4"],
        &["--zipf", "1", "--repeats", "0.4"],
    ];
    for options in kinds {
        assert_eq!(generate(options), Some(0));
        for slots in ["107", "205"] {
            let default = hits("next-use", slots);
            for other in ["lru", "lfu", "least-stale"] {
                let other_hits = hits(other, slots);
                assert!(
                    default > other_hits - 0.04,
                    "{options:?}, {slots} slots: {default}, {other} {other_hits}"
                );
            }
            assert!(default < hits("belady", slots));
        }
    }
    assert_eq!(generate(&["--used", "9"]), Some(2));
    assert_eq!(generate(&["--repeats", "2"]), Some(2));
}

#[test]
fn a_recorded_run_is_replayed() {
    let folder = TempDir::new().unwrap();
    let file = fixture::tiny_mixtral("Q8_0");
    let trace = folder.path().join("trace.jsonl");
    let mut run = Command::new(binary());
    run.args([
        "run",
        "-n",
        "40",
        "--temp",
        "0",
        "--json",
        "The history of",
        "--trace-experts",
    ])
    .arg(&trace)
    .arg("-m")
    .arg(&file.path);
    json_of(&mut run);
    let replay = |slots: &str| -> serde_json::Value {
        let mut replay = Command::new(binary());
        replay.args(["experts", "replay", "--json", "--slots", slots]);
        json_of(replay.arg(&trace))
    };
    let rates = |json: &serde_json::Value| -> Vec<(String, f64)> {
        let policies = json["policies"].as_array().unwrap().iter();
        let rate = |p: &serde_json::Value| {
            (
                p["name"].as_str().unwrap().to_owned(),
                p["hit_rate"].as_f64().unwrap(),
            )
        };
        policies.map(rate).collect()
    };
    let half = rates(&replay("8"));
    let names: Vec<_> = half.iter().map(|(name, _)| &name[..]).collect();
    assert_eq!(
        names,
        ["lru", "lfu", "least-stale", "next-use", "static", "belady"]
    );
    let best = half.last().unwrap().1;
    assert!(
        half.iter().all(|&(_, rate)| rate <= best && rate < 1.0),
        "{half:?}"
    );
    // With room for all, everything that the prompt has brought in is there.
    assert!(rates(&replay("1000")).iter().all(|&(_, rate)| rate > 0.9));
}

/// What `fewbit plan` announces is what the engine then does.
#[test]
fn the_plan_is_what_happens() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let (least, slot) = least(&file.path);
    let memory = least + 2 * slot;
    let mut plan = Command::new(binary());
    let size = memory.to_string();
    plan.args(["plan", "--json", "--ctx", "256", "--memory", &size, "-m"]);
    let plan = json_of(plan.arg(&file.path));
    let engine = load(&file.path, Memory::Bytes(memory), 1);
    let slots = engine.fit().unwrap().slots.as_ref().unwrap();
    assert_eq!(plan["slots"], slots.count());
    assert!(plan["resident_bytes"].as_u64().unwrap() + slots.bytes() <= memory);
    assert!(plan["disk_gb_s"].as_f64().unwrap() > 0.0 && plan["tok_s"].as_f64().unwrap() > 0.0);
    assert!(plan["read_bytes_per_token"].as_f64().unwrap() > 0.0);

    let refused = Command::new(binary())
        .args(["plan", "--memory", "1MiB", "-m"])
        .arg(&file.path)
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        error.contains("at least") && error.lines().count() == 1,
        "{error}"
    );
}

/// In memory of its own and mapped, all of it.
#[test]
fn read_and_mapped_give_the_same_bits() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let options = |loading| Options {
        loading,
        context: Some(CONTEXT),
        memory: Memory::Bytes(1 << 40),
        ..Options::default()
    };
    let read = file.load(&options(Loading::Read));
    let mapped = file.load(&options(Loading::Mapped));
    assert!(logits(&read) == logits(&mapped));
}
