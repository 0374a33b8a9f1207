//! `fewbit run`: complete a prompt.

use std::io::{IsTerminal, Read, Write};
use std::time::Instant;

use serde_json::json;

use super::common::{ModelArgs, print_json};
use crate::sampler::{Sampler, Settings};

/// Options of `fewbit run`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens to generate at most [default: until the context is full]
    #[arg(short, long, value_name = "TOKENS")]
    n: Option<usize>,
    /// Context: tokens of prompt and answer together
    #[arg(short, long, value_name = "N", default_value_t = 4096)]
    ctx: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
    /// The text to continue; standard input if absent or `-`
    prompt: Option<String>,
}

/// How tokens are chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, visible_alias = "temperature", value_name = "T", default_value_t = Settings::default().temperature)]
    temp: f32,
    /// Draw from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = Settings::default().top_k)]
    top_k: usize,
    /// Draw from the most likely tokens that reach this probability
    #[arg(long, value_name = "P", default_value_t = Settings::default().top_p)]
    top_p: f32,
    /// Draw from tokens at least this likely relative to the best
    #[arg(long, value_name = "P", default_value_t = Settings::default().min_p)]
    min_p: f32,
    /// Penalty on recent tokens; 1 for none
    #[arg(long, value_name = "X", default_value_t = Settings::default().repeat_penalty)]
    repeat_penalty: f32,
    /// Recent tokens that the penalty looks at
    #[arg(long, value_name = "N", default_value_t = Settings::default().repeat_last)]
    repeat_last_n: usize,
    /// Seed of the draws [default: from the clock]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The sampler's settings.
    pub fn settings(&self) -> Settings {
        let clock = || {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |time| time.as_nanos() as u64)
        };
        Settings {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last: self.repeat_last_n,
            seed: self.seed.unwrap_or_else(clock),
        }
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let prompt = match args.prompt.as_deref() {
        Some(prompt) if prompt != "-" => prompt.to_owned(),
        other => {
            anyhow::ensure!(
                other.is_some() || !std::io::stdin().is_terminal(),
                "no prompt: give one as the last argument or on standard input"
            );
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        }
    };
    let engine = args.model.load()?;
    let tokenizer = engine.tokenizer();
    let tokens = tokenizer.encode_with_bos(&prompt, true)?;
    let room = args.ctx.saturating_sub(tokens.len());
    let limit = args.n.unwrap_or(room).min(room);

    let mut session = engine.session(args.ctx);
    let mut sampler = Sampler::new(args.sampling.settings());
    let start = Instant::now();
    session.feed(&tokens)?;
    let prompt_time = start.elapsed();

    let mut out = std::io::stdout().lock();
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    let mut generated = 0;
    let start = Instant::now();
    while generated < limit {
        let token = sampler.sample(session.logits(), session.tokens());
        if tokenizer.is_end(token) {
            break;
        }
        generated += 1;
        let piece = stream.push(token);
        if args.json {
            text.push_str(&piece);
        } else {
            out.write_all(piece.as_bytes())?;
            out.flush()?;
        }
        if generated < limit {
            session.feed(&[token])?;
        }
    }
    let time = start.elapsed();
    let tail = stream.finish();
    let speed =
        |tokens: usize, time: std::time::Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    // The first token comes from the prompt's logits.
    let (pp, tg) = (
        speed(tokens.len(), prompt_time),
        speed(generated.saturating_sub(1), time),
    );
    if args.json {
        text.push_str(&tail);
        return print_json(&json!({
            "prompt_tokens": tokens.len(),
            "tokens": generated,
            "text": text,
            "pp_tok_s": pp,
            "tg_tok_s": tg,
        }));
    }
    writeln!(out, "{tail}")?;
    eprintln!(
        "prompt {} tokens, {pp:.1} tok/s; generated {generated} tokens, {tg:.1} tok/s ({} kernels, {} threads)",
        tokens.len(),
        engine.kernels(),
        engine.pool().threads()
    );
    Ok(())
}
