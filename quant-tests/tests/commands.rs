//! The commands as scripts and people see them: what stands on standard output, one-line errors,
//! exit codes. Run on the trained fixture.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use fewbit::gguf::{Array, Value};
use quant_tests::fixture::{self, ModelFile, Parts, binary};
use serde_json::Value as Json;

fn model() -> ModelFile {
    fixture::tiny_mixtral("Q8_0")
}

fn command(name: &str, model: Option<&Path>, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg(name);
    if let Some(model) = model {
        command.arg("-m").arg(model);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

/// `fewbit run` on `model`.
fn run(model: &ModelFile, arguments: &[&str]) -> Output {
    command("run", Some(&model.path), arguments)
        .output()
        .unwrap()
}

/// Runs `command` with `input` on its standard input.
fn with_input(mut command: Command, input: &[u8]) -> Output {
    let mut child = piped(&mut command);
    // A command that ends early closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn piped(command: &mut Command) -> Child {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Standard output of a command that succeeded.
#[track_caller]
fn success(output: &Output) -> &str {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn json(output: &Output) -> Json {
    serde_json::from_str(success(output)).unwrap()
}

#[track_caller]
fn assert_keys(object: &Json, wanted: &[&str]) {
    let keys: Vec<&str> = object
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(keys, wanted);
}

/// The one line that a command leaves on standard error when it fails.
#[track_caller]
fn failure(output: &Output) -> &str {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let line = stderr.strip_suffix('\n').unwrap();
    assert!(!line.contains('\n'), "{line}");
    line
}

const PERPLEXITY_KEYS: [&str; 19] = [
    "model",
    "text",
    "ctx",
    "chunks",
    "tokens",
    "ppl",
    "ppl_se",
    "ppl_base",
    "ln_ratio",
    "ln_ratio_se",
    "kld_mean",
    "kld_se",
    "kld_median",
    "kld_p99",
    "kld_p999",
    "kld_max",
    "dp_mean",
    "dp_rms",
    "same_top",
];

#[test]
fn run_prints_the_text_alone_and_the_same_as_json() {
    let model = model();
    let arguments = ["-n", "12", "--temp", "0", "The history of"];
    let plain = run(&model, &arguments);
    let json = json(&run(&model, &[&["--json"], &arguments[..]].concat()));
    assert_keys(
        &json,
        &[
            "prompt_tokens",
            "tokens",
            "text",
            "stop",
            "pp_tok_s",
            "tg_tok_s",
            "drafted",
            "accepted",
            "expert_cache",
        ],
    );
    assert_eq!(
        success(&plain),
        format!("{}\n", json["text"].as_str().unwrap())
    );
    assert_eq!(
        (&json["tokens"], &json["stop"]),
        (&12.into(), &"limit".into())
    );
    assert!(json["tg_tok_s"].as_f64().unwrap() > 0.0);
    assert!(text(&plain.stderr).contains("generated 12 tokens"));
}

#[test]
fn run_names_what_ended_the_text_and_times_only_what_was_fed() {
    let model = model();
    let full = run(&model, &["-c", "10", "--temp", "0", "The history of"]);
    assert!(text(&full.stderr).contains("context of 10 tokens is full"));
    let full = json(&run(
        &model,
        &["-c", "10", "--temp", "0", "--json", "The history of"],
    ));
    assert_eq!(full["stop"], "context");
    let none = json(&run(&model, &["-n", "0", "--json", "The history of"]));
    assert_eq!(
        (&none["tokens"], &none["tg_tok_s"]),
        (&0.into(), &Json::Null)
    );
}

#[test]
fn greedy_text_does_not_depend_on_threads_and_seeds_reproduce() {
    let model = model();
    let draw = |options: &[&str]| {
        let all = [options, &["-n", "40", "The history of"]].concat();
        success(&run(&model, &all)).to_owned()
    };
    let one = draw(&["--temp", "0", "--threads", "1"]);
    assert_eq!(one, draw(&["--temp", "0", "--threads", "2"]));
    let seeded = draw(&["--seed", "7"]);
    assert_eq!(seeded, draw(&["--seed", "7"]));
    assert_eq!(seeded, draw(&["--seed", "7", "--draft", "8"]));
    assert_ne!(seeded, draw(&["--seed", "8"]));
}

#[test]
fn a_prompt_on_standard_input_is_the_same_prompt() {
    let model = model();
    let arguments = ["-n", "8", "--temp", "0"];
    let given = run(&model, &[&arguments[..], &["The history of"]].concat());
    for (dash, input) in [(None, "The history of"), (Some("-"), "The history of\n")] {
        let mut command = command("run", Some(&model.path), &arguments);
        command.args(dash);
        let piped = with_input(command, input.as_bytes());
        assert_eq!(success(&piped), success(&given));
    }
    let broken = with_input(command("run", Some(&model.path), &[]), b"ab\xff");
    assert!(failure(&broken).contains("standard input: byte 2: not UTF-8"));
}

#[test]
fn wrong_usage_exits_with_2() {
    let model = model();
    let path = Some(&*model.path);
    let english = fixture::path("text/en.txt");
    let english = english.to_str().unwrap();
    let cases: [(&str, &[&str]); 15] = [
        ("run", &[]),
        ("run", &["--kernels", "abacus", "hi"]),
        ("run", &["-c", "0", "hi"]),
        ("run", &["-n", "-1", "hi"]),
        ("run", &["--temp", "-1", "hi"]),
        ("run", &["--temp", "nan", "hi"]),
        ("run", &["--top-p", "1.5", "hi"]),
        ("run", &["--repeat-penalty", "0", "hi"]),
        ("run", &["--threads", "0", "hi"]),
        ("run", &["--cpu-mask", "3-1", "hi"]),
        ("run", &["--draft", "-1", "hi"]),
        ("chat", &["--template", "none"]),
        ("perplexity", &["-f", english, "-c", "3"]),
        ("perplexity", &["-f", english, "--chunks", "0"]),
        ("bench", &["-r", "0"]),
    ];
    for (name, arguments) in cases {
        let output = command(name, path, arguments).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty() && !stderr.is_empty());
    }
    let output = run(&model, &["--temp", "-1", "hi"]);
    assert!(text(&output.stderr).contains("must be a number, 0 or more"));
}

#[test]
fn failures_are_one_line_that_names_the_file() {
    let model = model();
    let folder = model.path.parent().unwrap();
    let absent = folder.join("absent.gguf");
    let english = fixture::path("text/en.txt");
    let english = english.to_str().unwrap();
    for (name, arguments) in [
        ("run", &["hi"][..]),
        ("chat", &[]),
        ("perplexity", &["-f", english]),
        ("bench", &[]),
    ] {
        let output = command(name, Some(&absent), arguments).output().unwrap();
        assert!(failure(&output).contains("absent.gguf"));
    }
    let crowded = run(&model, &["--cpu-mask", "0", "--threads", "2", "hi"]);
    assert!(failure(&crowded).contains("2 threads cannot each have one of 1 CPUs"));
    let beyond = run(&model, &["--cpu-mask", "1023", "hi"]);
    assert!(failure(&beyond).contains("--cpu-mask"));
    let mut command = command("perplexity", Some(&model.path), &["-f", "absent.txt"]);
    assert!(failure(&command.output().unwrap()).contains("absent.txt"));
}

#[test]
fn a_context_that_no_memory_holds_is_refused_in_one_line() {
    let model = model();
    let output = run(&model, &["-c", "1000000000000", "hi"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    let lines: Vec<&str> = stderr.lines().collect();
    let &[memory, training, error] = &lines[..] else {
        panic!("{stderr}");
    };
    assert!(memory.contains("does not fit into memory"), "{memory}");
    assert!(training.contains("trained for"), "{training}");
    assert!(error.contains("--ctx"), "{error}");
    assert_eq!(error.matches("os error").count(), 1, "{error}");
}

#[test]
fn a_reader_that_hangs_up_is_no_failure() {
    let model = model();
    for (name, arguments) in [
        ("run", &["--temp", "0", "The history of"][..]),
        ("chat", &[]),
    ] {
        let mut child = piped(&mut command(name, Some(&model.path), arguments));
        drop(child.stdout.take());
        let _ = child.stdin.take().unwrap().write_all(b"/help\nHello\n");
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        assert!(!text(&output.stderr).contains("panic"));
    }
}

#[test]
fn a_piped_chat_answers_forgets_and_leaves() {
    let model = model();
    let chat = |input: &str| {
        let command = command("chat", Some(&model.path), &["-n", "8", "--temp", "0"]);
        with_input(command, input.as_bytes())
    };
    let once = chat("Hello\n");
    let answer = success(&once).to_owned();
    assert!(!answer.starts_with(' ') && !answer.trim().is_empty());
    let again = chat("Hello\n/reset\nHello\n/quit\nHello\n");
    assert_eq!(success(&again), answer.repeat(2));
    assert_eq!(text(&again.stderr), "The conversation starts anew.\n");
}

#[test]
fn a_piped_chat_takes_messages_of_several_lines_and_whole_files() {
    let model = model();
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("question.txt");
    std::fs::write(&file, "One.\nTwo.\n").unwrap();
    let chat = |input: &str, more: &[&str]| {
        let options = [&["-n", "8", "--temp", "0"], more].concat();
        let output = with_input(
            command("chat", Some(&model.path), &options),
            input.as_bytes(),
        );
        success(&output).to_owned()
    };
    let answer = chat("One.\\\nTwo.\n", &[]);
    assert_eq!(chat("\"\"\"\nOne.\nTwo.\n\"\"\"\n", &[]), answer);
    assert_eq!(chat("", &["--file", file.to_str().unwrap()]), answer);
    assert_eq!(chat("One.\nTwo.\n", &["--file", "-"]), answer);
    assert_ne!(chat("One.\nTwo.\n", &[]), answer, "two questions");
}

#[test]
fn a_chat_in_a_file_goes_on_where_it_was() {
    let model = model();
    let folder = tempfile::TempDir::new().unwrap();
    let session = folder.path().join("chat.session");
    let chat = |input: &str, more: &[&str]| {
        let options = [&["-n", "12", "--temp", "0.9", "--seed", "3"], more].concat();
        with_input(
            command("chat", Some(&model.path), &options),
            input.as_bytes(),
        )
    };
    let keep = ["--session", session.to_str().unwrap()];
    let whole = chat("The end.\nWhy?\n", &[]);
    let first = chat("The end.\n", &keep);
    let second = chat("Why?\n", &["--session", session.to_str().unwrap()]);
    // The seed is given again, so the second part draws from its beginning.
    let parts = [success(&first), success(&second)].concat();
    assert!(success(&whole).starts_with(success(&first)));
    assert!(
        text(&second.stderr).contains("Taken up from")
            && text(&second.stderr).contains("1 question")
    );
    assert_eq!(parts, success(&whole));

    let stats = with_input(
        command("chat", Some(&model.path), &keep),
        b"/stats\n/undo\n/undo\n/undo\n/set\n",
    );
    let notes = text(&stats.stderr);
    assert!(
        notes.contains("2 questions") && notes.contains("nothing to take back"),
        "{notes}"
    );
    assert!(
        notes.contains("temperature") && notes.contains("0.9"),
        "{notes}"
    );
    assert!(stats.stdout.is_empty());

    let foreign = fixture::tiny_mixtral("Q4_0");
    let refused = command("chat", Some(&foreign.path), &keep)
        .output()
        .unwrap();
    assert!(
        failure(&refused).contains("another model"),
        "{}",
        failure(&refused)
    );
    let refused = command("chat", Some(&model.path), &keep)
        .args(["--kv", "q8_0"])
        .output()
        .unwrap();
    assert!(
        failure(&refused).contains("--kv f16"),
        "{}",
        failure(&refused)
    );
    assert!(session.is_file(), "what was there is still there");
}

#[cfg(unix)]
#[test]
fn a_chat_that_is_killed_has_kept_what_was_answered() {
    let model = model();
    let folder = tempfile::TempDir::new().unwrap();
    let session = folder.path().join("chat.session");
    let keep = [
        "-n",
        "8",
        "--temp",
        "0",
        "--session",
        session.to_str().unwrap(),
    ];
    let mut child = piped(&mut command("chat", Some(&model.path), &keep));
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"Hello.\n").unwrap();
    let waited = std::time::Instant::now();
    while !session.exists() && waited.elapsed().as_secs() < 60 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let again = with_input(command("chat", Some(&model.path), &keep), b"/stats\n");
    success(&again);
    assert!(
        text(&again.stderr).contains("1 question"),
        "{}",
        text(&again.stderr)
    );
}

#[test]
fn completions_and_man_pages_know_every_command() {
    let folder = tempfile::TempDir::new().unwrap();
    let converter =
        binary().with_file_name(format!("fewbit-convert{}", std::env::consts::EXE_SUFFIX));
    for (program, name, inner) in [
        (binary(), "fewbit", "chat"),
        (converter, "fewbit-convert", "synth"),
    ] {
        let generate = |arguments: &[&str]| {
            let mut command = Command::new(&program);
            command.arg("generate").args(arguments).output().unwrap()
        };
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            let output = generate(&["completions", shell]);
            let script = success(&output);
            assert!(script.contains(name) && script.contains(inner), "{shell}");
        }
        assert_eq!(generate(&["completions", "csh"]).status.code(), Some(2));
        let man = folder.path().join(format!("man-{name}"));
        success(&generate(&["man", man.to_str().unwrap()]));
        let page = |name: &str| std::fs::read_to_string(man.join(format!("{name}.1"))).unwrap();
        assert!(
            page(name).contains(inner) && page(name).starts_with(".ie"),
            "{}",
            page(name)
        );
        assert!(page(&format!("{name}-{inner}")).contains(".SH OPTIONS"));
        let left = std::fs::read_dir(&man)
            .unwrap()
            .map(|file| file.unwrap().file_name());
        assert!(
            left.into_iter()
                .all(|name| name.to_string_lossy().ends_with(".1"))
        );
        std::fs::write(folder.path().join("file"), "").unwrap();
        let taken = folder.path().join("file/man");
        let output = generate(&["man", taken.to_str().unwrap()]);
        assert!(failure(&output).contains("file/man: cannot write"));
    }
}

#[test]
fn wrong_commands_fail_a_piped_chat() {
    let model = model();
    for (input, what) in [
        ("/hlep\n", "there is no /hlep"),
        ("/set top_q 1\n", "no setting top_q"),
        ("/set temp -1\n", "temperature: must be a number, 0 or more"),
        ("/set overflow never\n", "drop or refuse"),
        ("/load\n", "lacks the name of a file"),
        (
            "/load absent.session\n",
            "absent.session: cannot read the conversation",
        ),
        (
            "/save no/such/folder/x\n",
            "no/such/folder/x: cannot write the conversation",
        ),
        ("/system @absent.txt\n", "absent.txt"),
    ] {
        let output = with_input(command("chat", Some(&model.path), &[]), input.as_bytes());
        let line = failure(&output);
        assert!(line.contains(what), "{input}: {line}");
    }
}

#[test]
fn a_turn_that_does_not_fit_fails_a_piped_chat() {
    let model = model();
    let long = format!("{}\nHello\n", "word ".repeat(200));
    let command = command("chat", Some(&model.path), &["-c", "64", "-n", "8"]);
    let output = with_input(command, long.as_bytes());
    let line = failure(&output);
    assert!(
        line.contains("the context has 64") && line.contains("--ctx") && !line.contains("/reset"),
        "{line}"
    );
    assert!(output.stdout.is_empty());
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    let kill = format!("kill -INT {}", child.id());
    assert!(
        Command::new("sh")
            .args(["-c", &kill])
            .status()
            .unwrap()
            .success()
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_piped_chat_that_waits_and_stops_one_that_answers() {
    let model = model();
    let slow = [
        "--activations",
        "f32",
        "--kernels",
        "scalar",
        "--threads",
        "1",
    ];
    let mut chat = command("chat", Some(&model.path), &["--temp", "0"]);
    let mut child = piped(chat.args(slow));
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    // The first letter shows that an answer is under way.
    input.write_all(b"The end.\n").unwrap();
    output.read_exact(&mut [0]).unwrap();
    interrupt(&child);
    input.write_all(b"/reset\n").unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    assert_eq!(line, "The conversation starts anew.\n");
    interrupt(&child);
    let code = child.wait().unwrap().code();
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();
    assert_eq!((code, &rest[..]), (Some(130), ""));
}

#[test]
fn perplexity_prints_what_scripts_rely_on() {
    let model = model();
    let reference = fixture::tiny_mixtral("F32");
    let base = reference.path.to_str().unwrap();
    let french = fixture::path("text/fr.txt");
    let options = ["-f", french.to_str().unwrap(), "-c", "64", "--chunks", "2"];
    let output = |more: &[&str]| {
        command("perplexity", Some(&model.path), &[&options, more].concat())
            .output()
            .unwrap()
    };
    assert_keys(&json(&output(&["--json"])), &PERPLEXITY_KEYS[..7]);
    let compared = json(&output(&["--json", "--base", base]));
    assert_keys(&compared, &PERPLEXITY_KEYS);
    assert_eq!(
        (&compared["chunks"], &compared["tokens"]),
        (&2.into(), &62.into())
    );
    let shown = output(&["--base", base]);
    let shown = success(&shown);
    for figure in ["PPL / base", "PPL − base", "correlation", "RMS", "same top"] {
        assert!(shown.contains(figure), "{figure} is not in\n{shown}");
    }
    assert!(!shown.contains("NaN"));
}

#[test]
fn errors_of_a_single_token_are_undefined() {
    let model = model();
    let english = fixture::path("text/en.txt");
    let options = ["-f", english.to_str().unwrap(), "-c", "4", "--chunks", "1"];
    let output = command("perplexity", Some(&model.path), &options)
        .output()
        .unwrap();
    assert!(success(&output).contains("± -\n"));
    let options = [&options[..], &["--json"]].concat();
    let output = command("perplexity", Some(&model.path), &options)
        .output()
        .unwrap();
    assert_eq!(json(&output)["ppl_se"], Json::Null);
}

#[test]
fn a_base_that_was_kept_stands_for_the_model() {
    let (base, model) = (model(), fixture::tiny_mixtral("Q4_0"));
    let kept = base.path.with_extension("base");
    let french = fixture::path("text/fr.txt");
    let ladder = |reference: &Path, text: &Path, ctx: &str, more: &[&str]| {
        let mut command = command("ladder", None, &["-c", ctx, "--chunks", "4", "--json"]);
        command.arg("-f").arg(text).arg("--base").arg(reference);
        command.arg(&model.path).args(more).output().unwrap()
    };
    let live = json(&ladder(
        &base.path,
        &french,
        "64",
        &["--save-base", kept.to_str().unwrap()],
    ));
    let again = json(&ladder(&kept, &french, "64", &[]));
    let figures = |report: &Json| {
        let mut row = report["rows"][0].as_object().unwrap().clone();
        row.remove("tg_tok_s");
        row
    };
    assert_eq!(figures(&live), figures(&again));

    // Whole distributions say the same but for the tail's draws.
    let options = [
        "-c",
        "64",
        "--chunks",
        "4",
        "--json",
        "-f",
        french.to_str().unwrap(),
    ];
    let perplexity = |reference: &Path| {
        let mut command = command("perplexity", Some(&model.path), &options);
        json(&command.arg("--base").arg(reference).output().unwrap())
    };
    let (whole, small) = (perplexity(&base.path), perplexity(&kept));
    for (key, share) in [("kld_mean", 0.01), ("ppl_base", 1e-6), ("same_top", 1e-9)] {
        let [whole, small] = [&whole, &small].map(|report| report[key].as_f64().unwrap());
        assert!(
            (whole - small).abs() <= share * whole,
            "{key}: {whole} {small}"
        );
    }
    assert_eq!(small["kld_mean"], live["rows"][0]["kld_mean"]);

    let german = fixture::path("text/de.txt");
    assert!(failure(&ladder(&kept, &german, "64", &[])).contains("made from another text"));
    assert!(failure(&ladder(&kept, &french, "32", &[])).contains("give --ctx 64"));
    let bytes = std::fs::read(&kept).unwrap();
    std::fs::write(&kept, &bytes[..bytes.len() / 2]).unwrap();
    failure(&ladder(&kept, &french, "64", &[]));
}

#[test]
fn a_ladder_sets_texts_side_by_side_and_writes_its_report_whole() {
    let models = [model(), fixture::tiny_mixtral("Q4_0")];
    let folder = models[0].path.parent().unwrap().to_owned();
    let (french, german) = (fixture::path("text/fr.txt"), fixture::path("text/de.txt"));
    let ladder = |out: &Path, more: &[&str]| {
        let mut command = command("ladder", None, &["-c", "64", "--chunks", "1"]);
        command.arg("-f").arg(&french).arg("-f").arg(&german);
        command
            .arg("--base")
            .arg(&models[0].path)
            .arg("--out")
            .arg(out);
        command.args(models.each_ref().map(|model| &model.path));
        command.args(more).output().unwrap()
    };
    let report = folder.join("report.md");
    let table = ladder(&report, &[]);
    let table = success(&table);
    for column in ["PPL fr", "PPL de", "KLD fr", "KLD de", "tok/s"] {
        assert!(table.contains(column), "{column} is not in\n{table}");
    }
    assert!(std::fs::read_to_string(&report).unwrap().ends_with(table));

    let json = json(&ladder(&report, &["--json"]));
    assert_keys(&json, &["base", "text", "rows"]);
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    let more = ["file_bytes", "bits_per_weight", "tg_tok_s"];
    assert_keys(&rows[0], &[&PERPLEXITY_KEYS[..], &more].concat());

    let [plot, page] = ["report.svg", "report.html"].map(|name| folder.join(name));
    success(&ladder(&plot, &["--out", page.to_str().unwrap()]));
    let [plot, page] = [plot, page].map(|path| std::fs::read_to_string(path).unwrap());
    for name in models
        .each_ref()
        .map(|model| model.path.file_stem().unwrap())
    {
        let name = name.to_str().unwrap();
        assert!(plot.contains(name) && page.contains(&format!("<td>{name}</td>")));
    }
    assert!(plot.starts_with("<svg") && page.contains("<svg") && page.ends_with("</html>\n"));
    let wrong = ladder(&folder.join("report.pdf"), &[]);
    assert_eq!(wrong.status.code(), Some(2));

    let nowhere = folder.join("absent/report.md");
    assert!(failure(&ladder(&nowhere, &[])).contains("cannot write the report"));
    let left = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert!(
        left.into_iter()
            .all(|name| !name.to_string_lossy().contains("partial"))
    );
}

#[test]
fn a_base_of_another_vocabulary_is_refused_by_the_first_token_that_differs() {
    let model = model();
    let mut parts = Parts::read(&model.path);
    let key = "tokenizer.ggml.tokens";
    let Some(Value::Array(Array::String(mut tokens))) = parts.metadata.get(key).cloned() else {
        panic!("the fixture has tokens");
    };
    tokens[700] = "another".into();
    parts
        .metadata
        .insert(key, Value::Array(Array::String(tokens)));
    let other = parts.write();
    let english = fixture::path("text/en.txt");
    let mut command = command("perplexity", Some(&model.path), &["--chunks", "1"]);
    command
        .arg("-f")
        .arg(&english)
        .arg("--base")
        .arg(&other.path);
    let output = command.output().unwrap();
    let line = failure(&output);
    assert!(
        line.contains("token 700") && line.contains("another"),
        "{line}"
    );
}

#[test]
fn bench_prints_what_scripts_rely_on() {
    let model = model();
    let options = [
        "-p",
        "8,33",
        "-n",
        "2",
        "-d",
        "5",
        "-r",
        "1",
        "--first-token",
        "--json",
    ];
    let json = json(
        &command("bench", Some(&model.path), &options)
            .output()
            .unwrap(),
    );
    assert_keys(
        &json,
        &[
            "model",
            "type",
            "threads",
            "kernels",
            "limits",
            "results",
            "peak_rss_bytes",
            "own_rss_bytes",
            "first_token",
        ],
    );
    assert_keys(&json["limits"], &["read_gb_s", "int8_gop_s"]);
    let results = json["results"].as_array().unwrap();
    let tests: Vec<_> = results.iter().map(|result| &result["test"]).collect();
    assert_eq!(tests, ["pp8", "pp33", "tg2@d5"]);
    let keys = [
        "test",
        "tok_s",
        "tok_s_min",
        "tok_s_max",
        "gb_s",
        "gop_s",
        "limit",
        "share_of_limit",
    ];
    assert_keys(&results[0], &keys);
}

/// Where ggml is built in, `conformance_llama` runs it.
#[cfg(not(feature = "ggml"))]
#[test]
fn bench_against_ggml_says_how_to_build_it() {
    let model = model();
    let mut command = command("bench", Some(&model.path), &["--against", "ggml"]);
    let output = command.output().unwrap();
    assert!(output.stdout.is_empty());
    let line = failure(&output);
    assert!(line.contains("--features ggml"), "{line}");
}

#[test]
fn inspect_checks_on_the_threads_asked_for() {
    let model = model();
    let mut inspect = command("inspect", None, &["--check", "--threads", "1"]);
    let output = inspect.arg(&model.path).output().unwrap();
    assert!(success(&output).contains("every weight is finite"));
}
