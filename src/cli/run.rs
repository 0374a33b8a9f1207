//! `fewbit run`: complete a prompt.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use serde_json::json;

use super::common::{
    CacheUse, ModelArgs, STDOUT, Usage, at_least, context_of, note, print_json, speed, utf8,
    write_trace,
};
use super::sampling::SamplingArgs;
use crate::answer::Answer;
use crate::experts::Cache;
use crate::generation::Generation;
use crate::sampler::Sampler;

/// Options of `fewbit run`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Tokens to generate at most [default: until the context is full]
    #[arg(
        short,
        long = "predict",
        visible_alias = "n-predict",
        value_name = "TOKENS",
        allow_negative_numbers = true,
        value_parser = at_least(0)
    )]
    n: Option<usize>,
    /// Context: tokens of prompt and answer together [default: 4096, or what the model was trained for if that is less]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", allow_negative_numbers = true, value_parser = at_least(1))]
    ctx: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[cfg(feature = "grammar")]
    #[command(flatten)]
    shape: super::shape::ShapeArgs,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Record which experts work, for `fewbit experts replay`
    #[arg(long, value_name = "FILE")]
    trace_experts: Option<PathBuf>,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
    /// The text to continue; standard input, without its last newline, if absent or `-`
    prompt: Option<String>,
}

/// Why the text ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The model ended it.
    End,
    /// A stop string came.
    Text,
    /// As many tokens as were asked for.
    Limit,
    /// The context is full.
    Context,
}

impl Stop {
    /// As JSON names it.
    fn name(self) -> &'static str {
        match self {
            Self::End => "end",
            Self::Text => "stop",
            Self::Limit => "limit",
            Self::Context => "context",
        }
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let prompt = match args.prompt {
        Some(prompt) if prompt != "-" => prompt,
        _ => read_prompt()?,
    };
    let engine = args.model.load(args.ctx)?;
    let tokenizer = engine.tokenizer();
    let prompt = tokenizer.encode_with_bos(&prompt, true)?;
    let context = context_of(&engine, args.ctx);
    let room = context.saturating_sub(prompt.len());
    let limit = args.n.unwrap_or(usize::MAX);

    let mut session = engine.session(context)?;
    if args.trace_experts.is_some() {
        engine.start_trace();
    }
    let sampler = Sampler::new(args.sampling.settings()).with_vocabulary(tokenizer);
    #[cfg(feature = "grammar")]
    let mut sampler = sampler.with_constraint(args.shape.constraint(tokenizer)?);
    #[cfg(not(feature = "grammar"))]
    let mut sampler = sampler;
    let start = Instant::now();
    session.feed(&prompt)?;
    let pp_tok_s = speed(prompt.len(), start.elapsed());

    let before = engine.expert_cache().map(Cache::counters);
    let mut out = std::io::stdout().lock();
    let mut answer = Answer::continuing(tokenizer).with_stops(args.stop);
    let mut text = String::new();
    let mut tokens = 0;
    let start = Instant::now();
    let mut generation = Generation::new(&mut session, &mut sampler, limit.min(room))
        .with_drafts(args.sampling.drafts());
    for token in &mut generation {
        let piece = answer.push(token?);
        tokens += 1;
        if args.json {
            text.push_str(&piece);
        } else {
            out.write_all(piece.as_bytes())
                .and_then(|()| out.flush())
                .context(STDOUT)?;
        }
        if answer.stop().is_some() {
            break;
        }
    }
    let (drafted, accepted) = (generation.drafted(), generation.accepted());
    drop(generation);
    // The first token comes from the prompt's logits, and the last one may not have been fed.
    let fed = session.tokens().len() - prompt.len();
    let tg_tok_s = speed(fed, start.elapsed());
    let tail = answer.finish();
    let cache = CacheUse::since(&engine, before, fed);
    if let (Some(path), Some(trace)) = (&args.trace_experts, engine.take_trace()) {
        write_trace(path, &trace)?;
    }
    let stop = if answer.stop().is_some() {
        Stop::Text
    } else if tokens < limit.min(room) {
        Stop::End
    } else if tokens == limit {
        Stop::Limit
    } else {
        Stop::Context
    };

    if args.json {
        text.push_str(&tail);
        return print_json(&json!({
            "prompt_tokens": prompt.len(),
            "tokens": tokens,
            "text": text,
            "stop": stop.name(),
            "pp_tok_s": pp_tok_s,
            "tg_tok_s": tg_tok_s,
            "drafted": drafted,
            "accepted": accepted,
            "expert_cache": cache.as_ref().map(CacheUse::json),
        }));
    }
    writeln!(out, "{tail}").context(STDOUT)?;
    match stop {
        Stop::End | Stop::Text => {}
        Stop::Limit => note(format_args!("ended after {tokens} tokens, as -n asks")),
        Stop::Context => note(format_args!(
            "ended because the context of {context} tokens is full; raise --ctx for more"
        )),
    }
    let figure = |speed: Option<f64>| speed.map_or("-".to_owned(), |speed| format!("{speed:.1}"));
    let drafts = match drafted {
        0 => String::new(),
        drafted => format!(", {accepted} of {drafted} drafts accepted"),
    };
    let cache = cache.map_or(String::new(), |cache| format!("; {cache}"));
    note(format_args!(
        "prompt {} tokens, {} tok/s; generated {tokens} tokens, {} tok/s{drafts}{cache} ({} kernels, {} threads)",
        prompt.len(),
        figure(pp_tok_s),
        figure(tg_tok_s),
        engine.kernels(),
        engine.pool().threads()
    ));
    Ok(())
}

/// The prompt on standard input. A line's end belongs to the shell, not to the prompt.
fn read_prompt() -> anyhow::Result<String> {
    let mut stdin = std::io::stdin().lock();
    let mut bytes = Vec::new();
    if !stdin.is_terminal() {
        stdin
            .read_to_end(&mut bytes)
            .context("standard input: cannot read the prompt")?;
    }
    let mut prompt = utf8(bytes, "standard input")?;
    if prompt.is_empty() {
        anyhow::bail!(Usage(
            "no prompt: give one as the last argument or on standard input"
        ));
    }
    if prompt.ends_with('\n') {
        prompt.pop();
    }
    Ok(prompt)
}
