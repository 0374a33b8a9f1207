//! Conversations: turns, overflow, and files that hold them with their keys and values.

use std::ops::{ControlFlow, Deref};
use std::path::Path;
use std::sync::Arc;

use fewbit::chat::{Message, Style, Template};
use fewbit::conversation::{Conversation, End, Error, Event, FileError, Options, Overflow, Reply};
use fewbit::engine::{self, Engine};
use fewbit::model::KvKind;
use fewbit::sampler::Settings;
use quant_tests::fixture::{self, ModelFile};
use tempfile::TempDir;

/// An engine and its file, which saving reads again.
struct Loaded {
    engine: Arc<Engine>,
    _file: ModelFile,
}

impl Deref for Loaded {
    type Target = Arc<Engine>;

    fn deref(&self) -> &Arc<Engine> {
        &self.engine
    }
}

fn engine(kv: Option<KvKind>) -> Loaded {
    let file = fixture::tiny_mixtral("Q8_0");
    let threads = Some(1);
    let engine = file.load(&engine::Options {
        kv,
        threads,
        ..engine::Options::default()
    });
    Loaded {
        engine,
        _file: file,
    }
}

fn conversation(engine: &Arc<Engine>, context: usize, settings: Settings) -> Conversation {
    let template = Template::from_style(Style::Plain, engine.tokenizer());
    let options = Options {
        limit: 12,
        ..Options::default()
    };
    let session = engine.session(context).unwrap();
    Conversation::new(session, template, settings, options)
}

/// Answers without an interruption.
fn ask(conversation: &mut Conversation, question: &str) -> Result<Reply, Error> {
    let mut shown = String::new();
    let mut listener = |event: Event<'_>| {
        if let Event::Text(text) = event {
            shown += text;
        }
        ControlFlow::Continue(())
    };
    let reply = conversation.ask(question.to_owned(), None, &mut listener)?;
    assert_eq!(shown, reply.text, "what was shown is what is kept");
    Ok(reply)
}

fn say(conversation: &mut Conversation, question: &str) -> String {
    ask(conversation, question).unwrap().text
}

/// Settings that draw, so that a sampler's position counts.
fn drawing() -> Settings {
    Settings {
        seed: 5,
        mirostat: 2,
        ..Settings::default()
    }
}

#[test]
fn only_what_is_new_is_read() {
    let engine = engine(None);
    let mut talk = conversation(&engine, 256, Settings::greedy());
    let first = ask(&mut talk, "The history of the town is long.").unwrap();
    let second = ask(&mut talk, "And then?").unwrap();
    let kept = talk.session().tokens().len() - second.read - second.fed;
    assert!(
        kept >= first.read && first.read > 5,
        "{kept} of {}",
        first.read
    );
    assert_eq!(talk.turns(), 2);
}

#[test]
fn turns_are_taken_back_and_answered_anew() {
    let engine = engine(None);
    let mut talk = conversation(&engine, 256, Settings::greedy());
    talk.set_system(Some("Be brief.".into()));
    let first = say(&mut talk, "Hello.");
    let other = say(&mut talk, "Why?");
    assert_eq!(talk.undo().as_deref(), Some("Why?"));
    assert_eq!(say(&mut talk, "Why?"), other);
    let before = talk.messages().to_vec();
    let mut go = |_: Event<'_>| ControlFlow::Continue(());
    let anew = talk.retry(None, &mut go).unwrap().unwrap();
    assert_eq!((anew.text, talk.messages()), (other, &before[..]));
    // Stopped at once, it leaves everything as it was.
    let mut stop = |_: Event<'_>| ControlFlow::Break(());
    let stopped = talk.retry(None, &mut stop).unwrap().unwrap();
    assert_eq!(
        (stopped.end, talk.messages()),
        (End::TakenBack, &before[..])
    );
    let stopped = talk.ask("More?".into(), None, &mut stop).unwrap();
    assert_eq!(
        (stopped.end, talk.messages()),
        (End::TakenBack, &before[..])
    );
    talk.reset();
    assert_eq!(talk.messages(), [Message::system("Be brief.")]);
    assert_eq!(say(&mut talk, "Hello."), first);
    talk.undo();
    assert_eq!((talk.undo(), talk.turns()), (None, 0));
    assert!(talk.retry(None, &mut go).unwrap().is_none());
}

#[test]
fn an_answer_that_is_stopped_is_kept_as_far_as_it_was_written() {
    let engine = engine(None);
    let mut talk = conversation(&engine, 256, Settings::greedy());
    let mut pieces = 0;
    let mut listener = |event: Event<'_>| {
        pieces += usize::from(matches!(event, Event::Text(text) if !text.trim().is_empty()));
        match pieces {
            3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let reply = talk.ask("Hello.".into(), None, &mut listener).unwrap();
    assert_eq!(reply.end, End::Stopped);
    let kept = talk.messages().last().unwrap();
    assert_eq!((&kept.role[..], &kept.content), ("assistant", &reply.text));
    let mut whole = conversation(&engine, 256, Settings::greedy());
    let whole = say(&mut whole, "Hello.");
    assert!(whole.starts_with(reply.text.trim_end()) && whole.len() > reply.text.len());
}

#[test]
fn stop_strings_end_an_answer() {
    let engine = engine(None);
    let mut talk = conversation(&engine, 256, Settings::greedy());
    let whole = say(&mut talk, "Hello.");
    let stop: String = whole.chars().skip(4).take(3).collect();
    let mut talk = conversation(&engine, 256, Settings::greedy());
    talk.options.stops = vec![stop.clone()];
    let reply = ask(&mut talk, "Hello.").unwrap();
    let end = whole.find(&stop).unwrap();
    assert_eq!((&reply.text[..], reply.end), (&whole[..end], End::Stop));
}

#[test]
fn the_oldest_turns_are_dropped_and_never_the_system_message() {
    let engine = engine(None);
    let mut talk = conversation(&engine, 120, Settings::greedy());
    talk.set_system(Some("System.".into()));
    let (mut forgotten, mut last) = (0, String::new());
    for number in 0..12 {
        let mut listener = |event: Event<'_>| {
            if let Event::Forgot(turns) = event {
                forgotten += turns;
            }
            ControlFlow::Continue(())
        };
        last = format!("Question {number}.");
        let reply = talk.ask(last.clone(), None, &mut listener).unwrap();
        assert_eq!(reply.end, End::Limit);
    }
    assert!(forgotten > 3, "{forgotten}");
    assert_eq!(talk.turns(), 12 - forgotten, "each is told");
    assert_eq!(talk.system(), Some("System."));
    assert_eq!(talk.messages()[1].content, format!("Question {forgotten}."));

    // What is left is answered as if nothing else had been.
    let mut fresh = conversation(&engine, 120, Settings::greedy());
    fresh.set_system(Some("System.".into()));
    let left = talk.messages().to_vec();
    for turn in left[1..].chunks(2) {
        say(&mut fresh, &turn[0].content);
    }
    assert_eq!(fresh.messages()[fresh.messages().len() - 2].content, last);
}

#[test]
fn an_answer_goes_on_when_the_context_is_full_in_its_middle() {
    let engine = engine(None);
    let mut talk = conversation(&engine, 128, Settings::greedy());
    for number in 0..3 {
        say(&mut talk, &format!("Question {number}."));
    }
    assert_eq!(talk.turns(), 3);
    let used = talk.session().tokens().len();
    talk.options.limit = 128 - used + 20;
    let mut forgotten = 0;
    let mut listener = |event: Event<'_>| {
        if let Event::Forgot(turns) = event {
            forgotten += turns;
        }
        ControlFlow::Continue(())
    };
    let reply = talk.ask("And?".into(), None, &mut listener).unwrap();
    assert!(
        forgotten > 0 && reply.written > 128 - used,
        "{forgotten} {}",
        reply.written
    );
    assert_ne!(reply.end, End::Full);

    // Refusing, the answer ends there and nothing is forgotten.
    let mut talk = conversation(&engine, 128, Settings::greedy());
    talk.options.overflow = Overflow::Refuse;
    for number in 0..3 {
        say(&mut talk, &format!("Question {number}."));
    }
    talk.options.limit = usize::MAX;
    assert_eq!(ask(&mut talk, "And?").unwrap().end, End::Full);
    assert_eq!(talk.turns(), 4);
    let before = talk.messages().to_vec();
    assert!(matches!(
        ask(&mut talk, "Why?"),
        Err(Error::Full { capacity: 128, .. })
    ));
    assert_eq!(talk.messages(), before);
}

#[test]
fn a_message_that_never_fits_is_refused() {
    let engine = engine(None);
    let mut talk = conversation(&engine, 64, Settings::greedy());
    say(&mut talk, "Hello.");
    let error = ask(&mut talk, &"word ".repeat(100)).unwrap_err();
    assert!(
        matches!(error, Error::TooLong { capacity: 64, .. }),
        "{error}"
    );
    assert!(
        !talk
            .messages()
            .iter()
            .any(|m| m.content.starts_with("word"))
    );
}

#[test]
fn a_conversation_from_its_file_goes_on_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("chat.session");
    for kv in [KvKind::F16, KvKind::Q8_0, KvKind::F32] {
        let engine = engine(Some(kv));
        for settings in [Settings::greedy(), drawing()] {
            let mut talk = conversation(&engine, 256, settings);
            talk.set_system(Some("Système.".into()));
            say(&mut talk, "The history of the town is long.");
            talk.save(&path).unwrap();
            let wanted = ask(&mut talk, "And then?").unwrap();
            let logits = talk.session().logits().to_vec();

            // Another context, too: files do not depend on it.
            let mut other = conversation(&engine, 300, Settings::default());
            other.load(&path).unwrap();
            assert_eq!(other.settings(), talk.settings());
            let reply = ask(&mut other, "And then?").unwrap();
            assert_eq!((&reply.text, reply.read), (&wanted.text, wanted.read));
            assert_eq!(other.messages(), talk.messages());
            let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(other.session().logits()), bits(&logits));
        }
    }
    let names: Vec<_> = std::fs::read_dir(&folder).unwrap().collect();
    assert_eq!(names.len(), 1, "nothing is left beside it: {names:?}");
}

#[test]
fn an_empty_conversation_is_kept_too() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("chat.session");
    let engine = engine(None);
    let mut talk = conversation(&engine, 64, Settings::greedy());
    talk.save(&path).unwrap();
    talk.load(&path).unwrap();
    say(&mut talk, "Hello.");
}

/// What loading the bytes gives, in a conversation that must then be as it was.
fn damaged(talk: &mut Conversation, path: &Path, bytes: &[u8]) -> FileError {
    std::fs::write(path, bytes).unwrap();
    let error = talk.load(path).expect_err("it is damaged");
    assert!(error.to_string().contains("bad.session"), "{error}");
    assert!(talk.messages().is_empty() && talk.session().tokens().is_empty());
    error
}

#[test]
fn damaged_files_are_refused_wherever_they_are_damaged() {
    let folder = TempDir::new().unwrap();
    let (path, bad) = (
        folder.path().join("chat.session"),
        folder.path().join("bad.session"),
    );
    let engine = engine(None);
    let mut talk = conversation(&engine, 128, Settings::greedy());
    say(&mut talk, "Hello.");
    talk.save(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let mut empty = conversation(&engine, 128, Settings::greedy());

    // Every offset of the head and beyond, then many.
    let offsets = || {
        (0..2000.min(good.len()))
            .chain((2000..good.len()).step_by(997))
            .chain(good.len() - 8..good.len())
    };
    for at in offsets() {
        let mut flipped = good.clone();
        flipped[at] ^= 1 << (at % 8);
        damaged(&mut empty, &bad, &flipped);
    }
    for len in offsets().step_by(7) {
        damaged(&mut empty, &bad, &good[..len]);
    }
    let longer = [&good[..], &[0]].concat();
    damaged(&mut empty, &bad, &longer);
    // Sizes beyond all memory are not believed.
    for size in [u64::MAX, u64::MAX / 2, 1 << 40, good.len() as u64] {
        let mut huge = good.clone();
        huge[16..24].copy_from_slice(&size.to_le_bytes());
        let error = damaged(&mut empty, &bad, &huge);
        assert!(
            matches!(error, FileError::Malformed { offset: 16, .. }),
            "{error}"
        );
    }
    // A head that is whole in itself, and says something else.
    let head = |change: &dyn Fn(&mut serde_json::Value)| {
        let len = u64::from_le_bytes(good[16..24].try_into().unwrap()) as usize;
        let mut head: serde_json::Value = serde_json::from_slice(&good[24..24 + len]).unwrap();
        change(&mut head);
        let head = serde_json::to_vec(&head).unwrap();
        let mut bytes = good[..12].to_vec();
        bytes.extend(crc32fast::hash(&head).to_le_bytes());
        bytes.extend((head.len() as u64).to_le_bytes());
        bytes.extend(head);
        bytes.extend(&good[24 + len..]);
        bytes
    };
    for tokens in [0, 1, 1 << 20, u64::MAX / 8, u64::MAX] {
        let bytes = head(&|head| head["tokens"] = tokens.into());
        damaged(&mut empty, &bad, &bytes);
    }
    let error = damaged(
        &mut empty,
        &bad,
        &head(&|head| head["fingerprint"] = "00".into()),
    );
    assert!(matches!(error, FileError::Foreign { .. }), "{error}");
    let error = damaged(&mut empty, &bad, &head(&|head| head["kv"] = "Q4_0".into()));
    assert!(error.to_string().contains("--kv q4_0"), "{error}");
    damaged(&mut empty, &bad, &head(&|head| head["messages"] = 3.into()));

    let mut narrow = conversation(&engine, 16, Settings::greedy());
    let error = narrow.load(&path).unwrap_err().to_string();
    assert!(error.contains("--ctx"), "{error}");
    empty.load(&path).unwrap();
    assert_eq!(empty.messages(), talk.messages());
}

#[test]
fn a_file_that_cannot_be_written_leaves_the_old_one() {
    let folder = TempDir::new().unwrap();
    let engine = engine(None);
    let talk = conversation(&engine, 64, Settings::greedy());
    let error = talk
        .save(&folder.path().join("no/chat.session"))
        .unwrap_err();
    assert!(error.to_string().contains("no/chat.session"), "{error}");
    // A folder cannot be replaced by a file.
    let taken = folder.path().join("taken");
    std::fs::create_dir(&taken).unwrap();
    talk.save(&taken).unwrap_err();
    assert_eq!(
        std::fs::read_dir(&folder).unwrap().count(),
        1,
        "nothing is left beside it"
    );
}
