//! `fewbit serve`: a server for OpenAI's clients.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::common::{ModelArgs, at_least, context_of, file_stem, note, style};
use super::sampling::SamplingArgs;
use crate::chat::{Style, Template};
use crate::engine::Engine;
use crate::serve::{Config, Ended, Share, serve};

/// Options of `fewbit serve`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Address to listen on; 0.0.0.0 for all of this machine's
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 for any that is free
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// Context of each text: tokens of prompt and answer together [default: 4096, or what the model was trained for if that is less]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", allow_negative_numbers = true, value_parser = at_least(2))]
    ctx: Option<usize>,
    /// Texts written at the same time; each has a context of its own
    #[arg(long, visible_alias = "parallel", value_name = "N", allow_negative_numbers = true, default_value_t = 4, value_parser = at_least(1))]
    slots: usize,
    /// Texts that may wait for a slot; what comes beyond is refused with status 429
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 256, value_parser = at_least(1))]
    queue: usize,
    /// Tokens of an answer at most [default: until the context is full]
    #[arg(
        short,
        long = "predict",
        visible_alias = "n-predict",
        value_name = "TOKENS",
        allow_negative_numbers = true,
        value_parser = at_least(1)
    )]
    n: Option<usize>,
    /// Key that clients must send [default: the environment's FEWBIT_API_KEY, if any]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Web origin whose pages may use the server (https://example.org), or * for all; may be given several times
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// Bytes of a request at most
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, default_value_t = 8 << 20, value_parser = at_least(1))]
    body_limit: usize,
    /// Seconds that a client may take to send a request, and to take what it is sent
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    patience: u64,
    /// Seconds that requests may go on for when the server is told to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
    /// The model's name in answers [default: the file's]
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// Chat template by name, instead of the file's own
    #[arg(long, visible_alias = "chat-template", value_name = "NAME", value_parser = style)]
    template: Option<Style>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Connections at most: each is a file, of which the system gives a process 1024.
const CONNECTIONS: usize = 900;

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let key = std::env::var("FEWBIT_API_KEY").ok();
    let config = Config {
        name: args.alias.unwrap_or_else(|| file_stem(args.model.path())),
        settings: args.sampling.settings(),
        limit: args.n,
        queue: args.queue,
        key: args.api_key.or(key).filter(|key| !key.is_empty()),
        origins: args.cors,
        body_limit: args.body_limit,
        connections: CONNECTIONS,
        patience: Duration::from_secs(args.patience),
        grace: Duration::from_secs(args.grace),
    };
    let drafts = args.sampling.drafts();
    let (model, slots, ctx) = (args.model, args.slots, args.ctx);
    let load = move || {
        let engine = model.load(ctx)?;
        let share = Share {
            slots,
            context: context_of(&engine, ctx),
            drafts,
        };
        Ok((engine, share))
    };
    let template = |engine: &Engine| match args.template {
        None => Template::from_metadata(&engine.gguf().metadata, engine.tokenizer()),
        Some(style) => Ok(Template::from_style(style, engine.tokenizer())),
    };
    let ready = |address: SocketAddr| note(format_args!("fewbit: listening on http://{address}"));
    let address = SocketAddr::new(args.host, args.port);
    match serve(address, config, load, template, ready)? {
        Ended::Finished => note("fewbit: ended; all requests were finished"),
        Ended::Cut => note("fewbit: ended; some requests were cut off"),
    }
    Ok(())
}
