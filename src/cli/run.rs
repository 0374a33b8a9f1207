//! `fewbit run`: complete a prompt.

use std::io::{IsTerminal, Read, Write};
use std::time::Instant;

use serde_json::json;

use super::common::{ModelArgs, SamplingArgs, print_json};
use crate::sampler::{Generation, Sampler};

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

    let mut session = engine.session(args.ctx)?;
    let mut sampler = Sampler::new(args.sampling.settings());
    let start = Instant::now();
    session.feed(&tokens)?;
    let prompt_time = start.elapsed();

    let mut out = std::io::stdout().lock();
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    let mut generated = 0usize;
    let start = Instant::now();
    for token in Generation::new(&mut session, &mut sampler, limit) {
        let piece = stream.push(token?);
        generated += 1;
        if args.json {
            text.push_str(&piece);
        } else {
            out.write_all(piece.as_bytes())?;
            out.flush()?;
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
