//! `fewbit bench`: prompt and decode speed, with the machine's limits beside them, and those of
//! another engine on the same file.

mod first_token;
mod streamed;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use first_token::FirstToken;
use streamed::{Streamed, disk_speed};

use super::common::{
    ModelArgs, file_type, own_rss_bytes, peak_rss_bytes, print_json, reset_peak_rss, share,
};
use crate::bench::{Test, Times};
use crate::engine::Engine;
use crate::experts::Cache;
use crate::kernels::limits::{self, Limits};
use crate::plan::fit::Fit;
use crate::plan::{Group, Sizes};

/// Options of `fewbit bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Tokens of the prompt tests, separated by commas; 0 for none
    #[arg(short = 'p', long, value_name = "N", value_delimiter = ',', default_value = "512", value_parser = tokens)]
    prompt: Vec<usize>,
    /// Tokens of the decode tests, separated by commas; 0 for none
    #[arg(short = 'n', long, value_name = "N", value_delimiter = ',', default_value = "64", value_parser = tokens)]
    generate: Vec<usize>,
    /// Tokens in the context before a decode test
    #[arg(short, long, value_name = "N", default_value_t = 0, value_parser = tokens)]
    depth: usize,
    /// Share of the decode tests' tokens that are the one before once more, from 0 to 1: routing repeats as well
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    repeats: f64,
    /// Repetitions; the median counts
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Run another engine on the same file, in turns with this one
    #[arg(long, value_name = "ENGINE", value_enum)]
    against: Option<Against>,
    /// Time from nothing to the first token, step by step, with the file in memory
    #[arg(long)]
    first_token: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Engines to run against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Against {
    /// llama.cpp, in programs built with the feature `ggml`
    Ggml,
}

/// A number of tokens that a test may have.
fn tokens(text: &str) -> Result<usize, String> {
    const MAX: usize = 1 << 24;
    let tokens = text.parse().map_err(|error| format!("{error}"))?;
    (tokens <= MAX)
        .then_some(tokens)
        .ok_or_else(|| format!("at most {MAX} tokens"))
}

impl Args {
    fn tests(&self) -> Vec<Test> {
        let prompts = self.prompt.iter().map(|&tokens| Test::Prompt(tokens));
        let generate = self.generate.iter().map(|&tokens| Test::Generate {
            tokens,
            depth: self.depth,
            repeats: self.repeats,
        });
        let tests = prompts.chain(generate);
        tests.filter(|test| test.tokens() > 0).collect()
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let rival = match args.against {
        None => None,
        Some(Against::Ggml) => Some(Rival::load(&args)?),
    };
    let first_token = match args.first_token {
        true => Some(FirstToken::measure(
            &args.model,
            usize::from(args.repetitions),
        )?),
        false => None,
    };
    let context = args.tests().into_iter().map(Test::context).max();
    let engine = args.model.load(context)?;
    let shape = engine.shape();
    let sizes = Sizes::of(shape.experts, shape.experts_used, &engine.gguf().tensors);
    let before = Limits::measure(engine.pool());
    let disk_before = disk_speed(&engine)?;
    // The measurement's own buffer is not the model's.
    reset_peak_rss();
    let (mut runs, mut memory) = (Vec::new(), Memory::default());
    for test in args.tests() {
        runs.push(measure(
            &engine,
            rival.as_ref(),
            test,
            args.repetitions,
            &mut memory,
        )?);
    }
    // What the rival takes cannot be told apart from ours.
    let memory = if rival.is_some() {
        Memory::default()
    } else {
        memory
    };
    let limits = runs
        .iter()
        .fold(before, |best, run| best.best(run.best_limit()));
    let disk = disk_speed(&engine)?;
    let disk = disk.zip(disk_before).map(|(a, b)| a.max(b));

    let rows: Vec<Row> = runs
        .iter()
        .map(|run| Row::new(run, &sizes, engine.fit(), disk))
        .collect();
    if args.json {
        let results: Vec<_> = rows.iter().map(Row::to_json).collect();
        let mut object = json!({
            "model": args.model.model,
            "type": file_type(engine.gguf()),
            "threads": engine.pool().threads(),
            "kernels": engine.kernels(),
            "limits": {"read_gb_s": limits.read_gb_s, "int8_gop_s": limits.int8_gop_s},
            "results": results,
            "peak_rss_bytes": memory.peak,
            "own_rss_bytes": memory.own,
        });
        if let Some(disk) = disk {
            object["limits"]["disk_gb_s"] = json!(disk / 1e9);
        }
        if let Some(first_token) = first_token {
            object["first_token"] = first_token.to_json();
        }
        if let Some(rival) = &rival {
            let results: Vec<_> = rows.iter().filter_map(Row::against_json).collect();
            object["against"] = json!({
                "engine": "ggml",
                "build": rival.build(),
                "results": results,
            });
        }
        return print_json(&object);
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{} ({}, {:.2} GB), {} kernels, {} threads",
        args.model.model.display(),
        file_type(engine.gguf()),
        sizes.bytes_total() as f64 / 1e9,
        engine.kernels(),
        engine.pool().threads()
    )?;
    if let Some(rival) = &rival {
        writeln!(out, "against llama.cpp, built for {}", rival.build())?;
    }
    write!(
        out,
        "{:<12} {:>10} {:>19} {:>9} {:>9} {:>9} {:>16}",
        "test", "tok/s", "range", "GB/s", "GOP/s", "limit", "share of limit"
    )?;
    if rival.is_some() {
        write!(
            out,
            " {:>11} {:>19} {:>9} {:>7}",
            "llama.cpp", "range", "rows", "ratio"
        )?;
    }
    writeln!(out)?;
    for row in &rows {
        row.print(&mut out)?;
    }
    let disk = disk.map_or(String::new(), |disk| {
        format!(", {:.2} GB/s from disk", disk / 1e9)
    });
    writeln!(
        out,
        "limits of the machine at its best: {:.1} GB/s read, {:.0} GOP/s int8{disk}",
        limits.read_gb_s, limits.int8_gop_s
    )?;
    if let Some(own) = memory.own {
        writeln!(
            out,
            "memory beside the mapped file: {:.0} MB",
            own as f64 / 1e6
        )?;
    }
    if let Some(first_token) = first_token {
        writeln!(out, "{first_token}")?;
    }
    Ok(())
}

/// The times of a test, here and in the rival.
struct Run {
    ours: Times,
    /// With rows in place, and repacked.
    theirs: Option<[Times; 2]>,
    streamed: Streamed,
    /// What each repetition took, and the machine's limit around it: the better of before and after, in GB/s of
    /// a stream for generation, in GOP/s of int8 for a prompt.
    around: Vec<(Duration, f64)>,
}

impl Run {
    /// The best limit that was seen.
    fn best_limit(&self) -> Limits {
        let best = self
            .around
            .iter()
            .fold(0.0, |best: f64, (_, limit)| best.max(*limit));
        match self.ours.test {
            Test::Prompt(_) => Limits {
                read_gb_s: 0.0,
                int8_gop_s: best,
            },
            Test::Generate { .. } => Limits {
                read_gb_s: best,
                int8_gop_s: 0.0,
            },
        }
    }
}

/// The median; of an even number, that of the two in the middle which is lower.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 2]
}

/// The most memory that was seen in use, without what measuring limits takes.
#[derive(Default)]
struct Memory {
    peak: Option<u64>,
    own: Option<u64>,
}

impl Memory {
    /// The machine's limit for `test`.
    fn apart(&mut self, measure: impl FnOnce() -> f64) -> f64 {
        self.peak = peak_rss_bytes().max(self.peak);
        let limit = measure();
        reset_peak_rss();
        limit
    }
}

/// Runs `test` here and, in turns, in the rival. The limit is measured around every repetition: on a machine that is
/// shared, or whose cores move from one die to another, it is not the same for long.
fn measure(
    engine: &Arc<Engine>,
    rival: Option<&Rival>,
    test: Test,
    repetitions: u16,
    memory: &mut Memory,
) -> anyhow::Result<Run> {
    let limit = || match test {
        Test::Prompt(_) => limits::int8_peak(engine.pool()),
        Test::Generate { .. } => limits::read_bandwidth(engine.pool()),
    };
    let mut around = Vec::new();
    let mut session = engine.session(test.context())?;
    let counters = || engine.expert_cache().map(Cache::counters);
    let mut streamed = Streamed::default();
    let mut ours = |seed| {
        let mut before = None;
        // The warm-up is not counted.
        let limit_before = if seed > 0 { memory.apart(limit) } else { 0.0 };
        let time = test.run_from(&mut session, seed, || before = counters())?;
        memory.own = own_rss_bytes().max(memory.own);
        if seed > 0 {
            streamed.add(time, before, counters());
            around.push((time, limit_before.max(memory.apart(limit))));
        }
        Ok(time)
    };
    let mut runners = rival
        .map(|rival| rival.runners(test, engine.pool().threads()))
        .transpose()?;
    let mut engines: Vec<&mut dyn FnMut(u64) -> anyhow::Result<Duration>> = vec![&mut ours];
    if let Some(runners) = &mut runners {
        engines.extend(
            runners
                .iter_mut()
                .map(|run| run as &mut dyn FnMut(u64) -> anyhow::Result<Duration>),
        );
    }
    let mut times = Times::alternate(test, usize::from(repetitions), &mut engines)?.into_iter();
    let ours = times.next().expect("the first engine's");
    Ok(Run {
        ours,
        theirs: times.next().zip(times.next()).map(|(a, b)| [a, b]),
        streamed,
        around,
    })
}

/// A rival's two ways to run a test: rows in place, rows repacked.
type Runners<'a> = [Box<dyn FnMut(u64) -> anyhow::Result<Duration> + 'a>; 2];

#[cfg(feature = "ggml")]
struct Rival(crate::bench::ggml::Rival);

#[cfg(feature = "ggml")]
impl Rival {
    fn load(args: &Args) -> anyhow::Result<Self> {
        use crate::bench::ggml;
        let rival = ggml::Rival::load(&args.model.model)?;
        if ggml::lacks_avx512() {
            super::common::note(
                "warning: llama.cpp was built without the AVX-512 that this CPU has, so the race is unfair; \
                 build with RUSTFLAGS=-Ctarget-cpu=native (`make bench-against` does)",
            );
        }
        Ok(Self(rival))
    }

    fn build(&self) -> String {
        crate::bench::ggml::system_info()
    }

    fn runners(&self, test: Test, threads: usize) -> anyhow::Result<Runners<'_>> {
        let runners = self.0.runners(test.context(), threads)?;
        Ok(runners.map(|mut runner| -> Box<dyn FnMut(u64) -> _> {
            Box::new(move |seed| Ok(runner.run(test, seed)?))
        }))
    }
}

/// None can be had in this build.
#[cfg(not(feature = "ggml"))]
enum Rival {}

#[cfg(not(feature = "ggml"))]
impl Rival {
    fn load(_: &Args) -> anyhow::Result<Self> {
        anyhow::bail!(
            "this fewbit was built without llama.cpp; build it with \
             RUSTFLAGS=-Ctarget-cpu=native cargo build --release --features ggml (`make bench-against` does)"
        )
    }

    fn build(&self) -> String {
        match *self {}
    }

    fn runners(&self, _: Test, _: usize) -> anyhow::Result<Runners<'_>> {
        match *self {}
    }
}

/// A line of the table.
struct Row {
    test: String,
    tok_s: f64,
    range: (f64, f64),
    gb_s: Option<f64>,
    gop_s: Option<f64>,
    /// Medians of the limit around a repetition and of the share of it that was reached.
    limit: f64,
    share: f64,
    against: Option<Beside>,
    streamed: Option<streamed::Row>,
}

/// What the rival reaches.
struct Beside {
    /// Whether it was faster with rows repacked.
    repacked: bool,
    tok_s: f64,
    range: (f64, f64),
    /// Tokens a second in the way that was slower.
    other: f64,
}

impl Row {
    fn new(run: &Run, sizes: &Sizes, fit: Option<&Fit>, disk: Option<f64>) -> Self {
        let times = &run.ours;
        let (tok_s, range, test) = (times.tok_s(), times.tok_s_range(), times.test.to_string());
        // What a token costs, in 10⁹ bytes or operations.
        let cost = match times.test {
            Test::Prompt(tokens) => {
                let params = |group| sizes.group(group).params as f64;
                let head = head_params(sizes) as f64;
                let body =
                    sizes.params_active() as f64 - params(Group::Embedding) - params(Group::Output);
                2.0 * (body + head / tokens as f64) / 1e9
            }
            Test::Generate { .. } => sizes.active_bytes_per_token() as f64 / 1e9,
        };
        let (gb_s, gop_s) = match times.test {
            Test::Prompt(_) => (None, Some(cost * tok_s)),
            Test::Generate { .. } => (Some(cost * tok_s), None),
        };
        let around = run.around.iter();
        let share = |(time, limit): &(Duration, f64)| cost * times.test.rate(*time) / limit;
        let share = median(around.clone().map(share).collect());
        let limit = median(around.map(|(_, limit)| *limit).collect());
        let against = run.theirs.as_ref().map(|theirs| {
            let repacked = theirs[1].tok_s() > theirs[0].tok_s();
            let (best, other) = (
                &theirs[usize::from(repacked)],
                &theirs[usize::from(!repacked)],
            );
            Beside {
                repacked,
                tok_s: best.tok_s(),
                range: best.tok_s_range(),
                other: other.tok_s(),
            }
        });
        Self {
            test,
            tok_s,
            range,
            gb_s,
            gop_s,
            limit,
            share,
            against,
            streamed: run.streamed.row(times.test, fit, disk),
        }
    }

    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        let figure =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        let range = |(min, max): (f64, f64)| format!("{min:.2} – {max:.2}");
        write!(
            out,
            "{:<12} {:>10.2} {:>19} {:>9} {:>9} {:>9.1} {:>15.1}%",
            self.test,
            self.tok_s,
            range(self.range),
            figure(self.gb_s),
            figure(self.gop_s),
            self.limit,
            100.0 * self.share
        )?;
        if let Some(against) = &self.against {
            write!(
                out,
                " {:>11.2} {:>19} {:>9} {:>7.2}",
                against.tok_s,
                range(against.range),
                if against.repacked {
                    "repacked"
                } else {
                    "in place"
                },
                self.tok_s / against.tok_s
            )?;
        }
        writeln!(out)?;
        match &self.streamed {
            Some(streamed) => writeln!(out, "{streamed}"),
            None => Ok(()),
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let mut object = json!({
            "test": self.test,
            "tok_s": self.tok_s,
            "tok_s_min": self.range.0,
            "tok_s_max": self.range.1,
            "gb_s": self.gb_s,
            "gop_s": self.gop_s,
            "limit": self.limit,
            "share_of_limit": self.share,
        });
        if let Some(streamed) = &self.streamed {
            object["expert_cache"] = streamed.to_json();
        }
        object
    }

    fn against_json(&self) -> Option<serde_json::Value> {
        let against = self.against.as_ref()?;
        Some(json!({
            "test": self.test,
            "ratio": self.tok_s / against.tok_s,
            "tok_s": against.tok_s,
            "tok_s_min": against.range.0,
            "tok_s_max": against.range.1,
            "repacked": against.repacked,
            "other_tok_s": against.other,
        }))
    }
}

/// Parameters of the output head; those of the embedding where the two are tied.
fn head_params(sizes: &Sizes) -> u64 {
    match sizes.group(Group::Output).params {
        0 => sizes.group(Group::Embedding).params,
        params => params,
    }
}
