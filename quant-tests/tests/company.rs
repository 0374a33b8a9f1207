//! A session's results do not depend on its company: the same bits alone or with others, with
//! any number of threads, with its prompt cut anywhere, one token at a time or several.

use std::sync::Arc;

use fewbit::engine::{Engine, Options, Session, Turn};
use fewbit::generation::Generation;
use fewbit::gguf::{Value, names};
use fewbit::kernels::Kernels;
use fewbit::sampler::{Sampler, Settings};
use quant_tests::fixture::{self, LANGUAGES, ModelFile, Parts};

/// Types whose rows take every kind of kernel: blocks of 32, blocks of 256, none.
const MIXES: [&str; 5] = ["Q4_0", "Q4_K_M", "Q6_K", "Q8_0", "F16"];

/// Tokens that each session generates.
const STEPS: usize = 5;

/// The tables of kernels to run a mix with. Scalar code, slow and the same for all types, runs
/// one mix.
fn tables(mix: &str) -> impl Iterator<Item = &'static Kernels> {
    let tables = Kernels::available().into_iter();
    tables.filter(move |kernels| kernels.name != "scalar" || mix == "Q4_K_M")
}

/// Calls `check` with an engine for each mix and table of kernels.
fn everywhere(threads: usize, check: impl Fn(&Arc<Engine>, &str)) {
    for mix in MIXES {
        let file = fixture::tiny_mixtral(mix);
        for kernels in tables(mix) {
            let engine = load(&file, kernels.name, threads);
            check(&engine, &format!("{mix}, {}", kernels.name));
        }
    }
}

fn load(file: &ModelFile, kernels: &str, threads: usize) -> Arc<Engine> {
    file.load(&Options {
        threads: Some(threads),
        kernels: Some(kernels.to_owned()),
        ..Options::default()
    })
}

/// Sixteen prompts of many lengths, around the 64 positions of a block of attention too.
fn prompts(engine: &Engine) -> Vec<Vec<u32>> {
    let lengths = [
        1, 40, 3, 64, 17, 63, 2, 90, 65, 8, 31, 5, 60, 12, 62, 33usize,
    ];
    let languages = LANGUAGES.into_iter().cycle();
    let prompts = lengths.into_iter().zip(languages);
    prompts
        .map(|(len, language)| prompt(engine, language, len))
        .collect()
}

fn prompt(engine: &Engine, language: &str, len: usize) -> Vec<u32> {
    let start: String = fixture::text(language).chars().take(20 * len).collect();
    let mut tokens = engine.tokenizer().encode_with_bos(&start, false).unwrap();
    assert!(tokens.len() >= len);
    tokens.truncate(len);
    tokens
}

fn fed(engine: &Arc<Engine>, prompt: &[u32]) -> Session {
    let mut session = engine.session(1024).unwrap();
    session.feed(prompt).unwrap();
    session
}

/// The most likely token.
fn greedy(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    best as u32
}

/// The logits after a prompt and after each of some greedy steps.
fn alone(engine: &Arc<Engine>, prompt: &[u32]) -> Vec<Vec<f32>> {
    let mut session = fed(engine, prompt);
    let mut logits = vec![session.logits().to_vec()];
    for _ in 0..STEPS {
        let token = greedy(session.logits());
        logits.push(session.step(token).unwrap().to_vec());
    }
    logits
}

/// The same for several sessions, all steps together.
fn together(engine: &Arc<Engine>, prompts: &[Vec<u32>]) -> Vec<Vec<Vec<f32>>> {
    let mut sessions: Vec<_> = prompts.iter().map(|prompt| fed(engine, prompt)).collect();
    let row = |session: &Session| session.logits().to_vec();
    let mut logits: Vec<_> = sessions.iter().map(|session| vec![row(session)]).collect();
    for _ in 0..STEPS {
        let tokens: Vec<_> = sessions.iter().map(|s| [greedy(s.logits())]).collect();
        let turns = sessions.iter_mut().zip(&tokens);
        let mut turns: Vec<_> = turns
            .map(|(session, tokens)| Turn { session, tokens })
            .collect();
        for result in engine.generate(&mut turns) {
            result.unwrap();
        }
        for (logits, session) in logits.iter_mut().zip(&sessions) {
            logits.push(row(session));
        }
    }
    logits
}

#[test]
fn sessions_of_a_batch_have_the_bits_that_each_has_alone() {
    everywhere(2, |engine, what| {
        let prompts = prompts(engine);
        let alone: Vec<_> = prompts.iter().map(|prompt| alone(engine, prompt)).collect();
        for company in [2, 5, 16] {
            let found = together(engine, &prompts[..company]);
            assert!(found == alone[..company], "{what}: a batch of {company}");
        }
    });
}

#[test]
fn threads_do_not_change_a_bit_of_a_batch() {
    let with = |threads: usize| {
        let found = std::cell::RefCell::new(Vec::new());
        everywhere(threads, |engine, what| {
            let logits = together(engine, &prompts(engine)[..5]);
            found.borrow_mut().push((what.to_owned(), logits));
        });
        found.into_inner()
    };
    let one = with(1);
    for threads in [2, 3] {
        for ((what, expected), (_, found)) in one.iter().zip(with(threads)) {
            assert!(*expected == found, "{what}, {threads} threads");
        }
    }
}

#[test]
fn a_prompt_cut_at_any_place_generates_the_same_bits() {
    everywhere(2, |engine, what| {
        let prompt = prompt(engine, "de", 40);
        let whole = alone(engine, &prompt);
        for cut in 1..prompt.len() {
            let mut session = fed(engine, &prompt[..cut]);
            session.feed(&prompt[cut..]).unwrap();
            assert!(session.logits() == whole[0], "{what}, cut at {cut}");
            let token = greedy(session.logits());
            let after = session.step(token).unwrap();
            assert!(after == whole[1], "{what}, a step after a cut at {cut}");
        }
    });
}

/// 512 tokens go through the model in one pass, so that longer prompts are cut unasked.
#[test]
fn a_prompt_of_several_passes_generates_the_same_bits_wherever_it_is_cut() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let engine = file.load(&Options::default());
    let prompt = prompt(&engine, "fr", 520);
    let whole = alone(&engine, &prompt);
    for cut in [1, 8, 255, 511, 512, 513, 519] {
        let mut session = fed(&engine, &prompt[..cut]);
        session.feed(&prompt[cut..]).unwrap();
        assert!(session.logits() == whole[0], "cut at {cut}");
        let token = greedy(session.logits());
        assert!(session.step(token).unwrap() == whole[1], "cut at {cut}");
    }
}

#[test]
fn several_tokens_in_one_pass_have_the_bits_of_single_steps() {
    everywhere(2, |engine, what| {
        let text = prompt(engine, "it", 60 + 24);
        let (prompt, rest) = text.split_at(60);
        let mut session = fed(engine, prompt);
        let steps = rest.iter();
        let single: Vec<_> = steps
            .map(|&token| session.step(token).unwrap().to_vec())
            .collect();
        for draft in [2, 3, 4, 5, 7, 8, 16, 17, 24] {
            let mut session = fed(engine, prompt);
            for (index, some) in rest.chunks(draft).enumerate() {
                session.steps(some).unwrap();
                for (at, expected) in (index * draft..).zip(&single[index * draft..]) {
                    let Some(found) = session.logits_after(60 + at) else {
                        assert_eq!(at, index * draft + some.len());
                        break;
                    };
                    assert!(found == expected, "{what}: token {at} in parts of {draft}");
                }
            }
            // Half of it taken back, as when a guess was wrong, and said again.
            session.rewind(60 + 12);
            session.step(rest[12]).unwrap();
            assert!(session.logits() == single[12], "{what}: after a rewind");
        }
    });
}

/// Turns of different lengths, more tokens in all than one pass holds.
#[test]
fn turns_that_do_not_fit_into_one_pass_have_the_same_bits() {
    let file = fixture::tiny_mixtral("Q4_K_M");
    let engine = file.load(&Options::default());
    let texts = [
        prompt(&engine, "en", 300),
        prompt(&engine, "es", 400),
        prompt(&engine, "fr", 5),
    ];
    let session = || engine.session(1000).unwrap();
    let expected = texts.each_ref().map(|text| {
        let mut session = session();
        session.steps(text).unwrap();
        let rows = (0..text.len()).map(|at| session.logits_after(at).unwrap().to_vec());
        rows.collect::<Vec<_>>()
    });
    let mut sessions = texts.each_ref().map(|_| session());
    let turns = sessions.iter_mut().zip(&texts);
    let mut turns: Vec<_> = turns
        .map(|(session, tokens)| Turn { session, tokens })
        .collect();
    for result in engine.generate(&mut turns) {
        result.unwrap();
    }
    for ((session, text), expected) in sessions.iter().zip(&texts).zip(expected) {
        assert_eq!(session.tokens(), text);
        for (at, expected) in expected.iter().enumerate() {
            assert!(session.logits_after(at).unwrap() == expected);
        }
    }
}

#[test]
fn a_turn_that_fails_harms_nobody() {
    let file = fixture::tiny_mixtral("Q8_0");
    let engine = file.load(&Options::default());
    let text = prompt(&engine, "en", 20);
    let mut expected = fed(&engine, &text);
    let expected = expected.step(7).unwrap();

    let mut full = engine.session(20).unwrap();
    full.feed(&text).unwrap();
    let before = full.logits().to_vec();
    let (mut good, mut bad, mut mute, mut last) = (
        fed(&engine, &text),
        fed(&engine, &text),
        fed(&engine, &text),
        fed(&engine, &text),
    );
    let mut turns = [
        (&mut full, &[7][..]),
        (&mut good, &[7]),
        (&mut bad, &[7, 5000]),
        (&mut mute, &[]),
        (&mut last, &[7]),
    ]
    .map(|(session, tokens)| Turn { session, tokens });
    let results = engine.generate(&mut turns);
    let messages: Vec<_> = results
        .iter()
        .map(|result| result.as_ref().err().map(ToString::to_string))
        .collect();
    for (message, part) in messages.iter().zip(["21 tokens", "", "5000", "empty", ""]) {
        match message {
            None => assert_eq!(part, ""),
            Some(message) => assert!(!part.is_empty() && message.contains(part), "{message}"),
        }
    }
    for session in [&good, &last] {
        assert!(session.logits() == expected);
        assert_eq!(session.tokens().len(), 21);
    }
    for session in [&full, &bad, &mute] {
        assert!(session.logits() == before);
        assert_eq!(session.tokens(), text);
    }
}

/// A router that sends every token to expert 0, the others having none, is a dense model.
#[test]
fn all_tokens_on_one_expert_are_a_dense_model_to_the_bit() {
    for mix in MIXES {
        let file = fixture::tiny_mixtral(mix);
        let (mut one, mut dense) = (Parts::read(&file.path), Parts::read(&file.path));
        one.metadata
            .insert("llama.expert_used_count", Value::U32(1));
        for (decl, bytes) in &mut one.tensors {
            if decl.name.contains("ffn_gate_inp") {
                // Equal scores: the lowest expert.
                bytes.fill(0);
            }
        }
        dense
            .tensors
            .retain(|(decl, _)| !decl.name.contains("ffn_gate_inp"));
        dense.metadata.remove("llama.expert_count");
        dense.metadata.remove("llama.expert_used_count");
        for (decl, bytes) in &mut dense.tensors {
            let name = names::parse(&decl.name);
            if let Some(name) = name.filter(|name| name.experts == names::Experts::All) {
                bytes.truncate(bytes.len() / decl.shape.pop().unwrap());
                decl.name = names::block(name.layer, name.part);
            }
        }
        let (one, dense) = (one.write(), dense.write());
        for kernels in tables(mix) {
            let [one, dense] = [&one, &dense].map(|file| load(file, kernels.name, 2));
            assert!(one.shape().is_moe() && !dense.shape().is_moe());
            let prompts = prompts(&one);
            let what = format!("{mix}, {}", kernels.name);
            assert!(
                together(&one, &prompts) == together(&dense, &prompts),
                "{what}"
            );
        }
    }
}

/// What a session generates: its tokens, the logits after the last one, and how many drafts
/// there were and came true.
fn generated(
    engine: &Arc<Engine>,
    prompt: &[u32],
    settings: &Settings,
    drafts: usize,
    limit: usize,
) -> (Vec<u32>, Vec<f32>, usize, usize) {
    let mut session = engine.session(prompt.len() + 80).unwrap();
    session.feed(prompt).unwrap();
    let mut sampler = Sampler::new(settings.clone());
    let mut generation = Generation::new(&mut session, &mut sampler, limit).with_drafts(drafts);
    let tokens: Vec<_> = generation.by_ref().map(Result::unwrap).collect();
    let (drafted, accepted) = (generation.drafted(), generation.accepted());
    drop(generation);
    let all = [prompt, &tokens].concat();
    assert!(all.starts_with(session.tokens()) && session.tokens().len() + 1 >= all.len());
    if session.tokens().len() < all.len() {
        session.step(all[all.len() - 1]).unwrap();
    }
    (tokens, session.logits().to_vec(), drafted, accepted)
}

#[test]
fn drafts_change_neither_tokens_nor_logits() {
    let (mut drafted, mut accepted) = (0, 0);
    for mix in ["Q4_K_M", "Q8_0"] {
        let file = fixture::tiny_mixtral(mix);
        let engine = file.load(&Options::default());
        let once = prompt(&engine, "fr", 30);
        let repeated = [&once[..], &once, &once[..20]].concat();
        for (temperature, seed) in [(0.0, 0), (0.3, 1), (0.8, 2), (0.8, 3), (1.5, 4)] {
            let settings = Settings {
                temperature,
                seed,
                repeat_penalty: if seed == 2 { 1.1 } else { 1.0 },
                ..Settings::default()
            };
            for prompt in [&once, &repeated] {
                let (tokens, logits, none, _) = generated(&engine, prompt, &settings, 0, 60);
                assert!(!tokens.is_empty() && none == 0);
                for drafts in [1, 2, 5, 16] {
                    let found = generated(&engine, prompt, &settings, drafts, 60);
                    let what = format!("{mix}, temperature {temperature}, {drafts} drafts");
                    assert_eq!(found.0, tokens, "{what}");
                    assert!(found.1 == logits, "{what}");
                    drafted += found.2;
                    accepted += found.3;
                }
            }
        }
    }
    println!("{accepted} of {drafted} drafts accepted");
    assert!(
        accepted > 50 && drafted > accepted + 50,
        "both kinds occur: {accepted} of {drafted}"
    );
}

/// Drafts reach neither beyond the limit nor beyond the context, and nothing of them stays.
#[test]
fn drafts_end_with_the_limit_and_the_context() {
    let file = fixture::tiny_mixtral("Q8_0");
    let engine = file.load(&Options::default());
    let prompt = prompt(&engine, "en", 10).repeat(3);
    let greedy = Settings::greedy();
    let (tokens, ..) = generated(&engine, &prompt, &greedy, 0, 40);
    for limit in [1, 2, 3, 10, 37] {
        let found = generated(&engine, &prompt, &greedy, 8, limit);
        assert_eq!(found.0, tokens[..limit]);
    }
    for room in [1, 2, 5, 20] {
        let mut session = engine.session(prompt.len() + room).unwrap();
        session.feed(&prompt).unwrap();
        let mut sampler = Sampler::new(greedy.clone());
        let generation = Generation::new(&mut session, &mut sampler, 40).with_drafts(8);
        let found: Vec<_> = generation.map_while(Result::ok).collect();
        // The context ends with a token that is chosen and cannot be fed.
        assert_eq!(found, tokens[..room + 1]);
        assert_eq!(session.tokens().len(), prompt.len() + room);
    }
    // Broken off after some tokens.
    let mut session = engine.session(200).unwrap();
    session.feed(&prompt).unwrap();
    let mut sampler = Sampler::new(greedy);
    let generation = Generation::new(&mut session, &mut sampler, 40).with_drafts(8);
    assert_eq!(generation.take(9).count(), 9);
    let fed = session.tokens().len() - prompt.len();
    assert!((8..=9).contains(&fed), "{fed}");
    assert_eq!(session.tokens()[prompt.len()..], tokens[..fed]);
}
