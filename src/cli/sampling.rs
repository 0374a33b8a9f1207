//! Options of every command that chooses tokens.

use std::fmt::Display;

use serde_json::{Map, Value};

use crate::sampler::{Settings, Step, rule};

/// How tokens are chosen.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, visible_alias = "temperature", value_name = "T", default_value_t = Settings::default().temperature, allow_negative_numbers = true, value_parser = number("temperature"))]
    temp: f32,
    /// Draw from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = Settings::default().top_k, allow_negative_numbers = true)]
    top_k: usize,
    /// Draw from the most likely tokens that reach this probability
    #[arg(long, value_name = "P", default_value_t = Settings::default().top_p, allow_negative_numbers = true, value_parser = number("top_p"))]
    top_p: f32,
    /// Draw from tokens at least this likely relative to the best
    #[arg(long, value_name = "P", default_value_t = Settings::default().min_p, allow_negative_numbers = true, value_parser = number("min_p"))]
    min_p: f32,
    /// Draw from the tokens nearest to the expected surprise that reach this probability
    #[arg(long, visible_alias = "typical-p", value_name = "P", default_value_t = Settings::default().typical_p, allow_negative_numbers = true, value_parser = number("typical_p"))]
    typical: f32,
    /// Draw from tokens whose logits are within N standard deviations of the best; 0 or less for all
    #[arg(long, value_name = "N", default_value_t = Settings::default().top_n_sigma, allow_negative_numbers = true, value_parser = number("top_n_sigma"))]
    top_n_sigma: f32,
    /// How often the likely tokens are left out but the least likely of them
    #[arg(long, value_name = "P", default_value_t = Settings::default().xtc_probability, allow_negative_numbers = true, value_parser = number("xtc_probability"))]
    xtc_probability: f32,
    /// What counts as likely there
    #[arg(long, value_name = "P", default_value_t = Settings::default().xtc_threshold, allow_negative_numbers = true, value_parser = number("xtc_threshold"))]
    xtc_threshold: f32,
    /// Penalty on recent tokens; 1 for none
    #[arg(long, value_name = "X", default_value_t = Settings::default().repeat_penalty, allow_negative_numbers = true, value_parser = number("repeat_penalty"))]
    repeat_penalty: f32,
    /// Penalty on recent tokens for each time they occur; 0 for none
    #[arg(long, value_name = "X", default_value_t = Settings::default().frequency_penalty, allow_negative_numbers = true, value_parser = number("frequency_penalty"))]
    frequency_penalty: f32,
    /// Penalty on tokens that occur at all; 0 for none
    #[arg(long, value_name = "X", default_value_t = Settings::default().presence_penalty, allow_negative_numbers = true, value_parser = number("presence_penalty"))]
    presence_penalty: f32,
    /// Recent tokens that these penalties look at; -1 for all
    #[arg(long, value_name = "N", default_value = "64", allow_negative_numbers = true, value_parser = window)]
    repeat_last_n: usize,
    /// Penalty on tokens that go on with a repetition; 0 for none
    #[arg(long, value_name = "X", default_value_t = Settings::default().dry_multiplier, allow_negative_numbers = true, value_parser = number("dry_multiplier"))]
    dry_multiplier: f32,
    /// By how much it grows with each repeated token
    #[arg(long, value_name = "X", default_value_t = Settings::default().dry_base, allow_negative_numbers = true, value_parser = number("dry_base"))]
    dry_base: f32,
    /// Tokens that may be repeated free of charge
    #[arg(long, value_name = "N", default_value_t = Settings::default().dry_allowed_length, allow_negative_numbers = true)]
    dry_allowed_length: usize,
    /// Recent tokens that are searched for repetitions; -1 for all
    #[arg(long, value_name = "N", default_value = "-1", allow_negative_numbers = true, value_parser = window)]
    dry_penalty_last_n: usize,
    /// No repetition goes across a token that holds this; may be given several times [default: line's end : " *]
    #[arg(long = "dry-sequence-breaker", value_name = "TEXT")]
    dry_sequence_breakers: Vec<String>,
    /// 2 aims at a surprise of --mirostat-tau instead of cutting; 0 does not
    #[arg(long, value_name = "VERSION", default_value_t = 0, value_parser = mirostat)]
    mirostat: u8,
    /// The surprise that Mirostat aims at
    #[arg(long, visible_alias = "mirostat-ent", value_name = "BITS", default_value_t = Settings::default().mirostat_tau, allow_negative_numbers = true, value_parser = number("mirostat_tau"))]
    mirostat_tau: f32,
    /// Mirostat's rate of learning
    #[arg(long, visible_alias = "mirostat-lr", value_name = "X", default_value_t = Settings::default().mirostat_eta, allow_negative_numbers = true, value_parser = number("mirostat_eta"))]
    mirostat_eta: f32,
    /// Make a token likelier or less likely: 15043+1, 15043-1.5; -inf bans it; may be given several times
    #[arg(long, value_name = "TOKEN±BIAS", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// The steps, in their order
    #[arg(long, value_name = "A;B;…", default_value_t = Steps(Settings::default().samplers), value_parser = steps)]
    samplers: Steps,
    /// Seed of the draws [default: from the clock]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Guess up to N tokens ahead where the text repeats itself, and check them in one pass: the same text, faster
    /// where many come true and slower where few do; 0 for none
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 0
    )]
    draft: usize,
}

/// The steps of [`Settings::samplers`].
#[derive(Clone, Debug)]
struct Steps(Vec<Step>);

impl Display for Steps {
    fn fmt(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        out.write_str(&Step::names(&self.0))
    }
}

fn steps(names: &str) -> Result<Steps, String> {
    Step::list(names).map(Steps)
}

/// A finite number as the setting called `name` may be.
fn number(name: &'static str) -> impl Fn(&str) -> Result<f32, String> + Clone {
    move |text| {
        let (allows, what) = rule(name);
        let number = text.parse::<f32>().ok();
        number
            .filter(|&number| number.is_finite() && allows(number))
            .ok_or_else(|| format!("must be a number, {what}"))
    }
}

fn mirostat(text: &str) -> Result<u8, String> {
    let (allows, what) = rule("mirostat");
    let version = text.parse::<u8>().ok();
    version
        .filter(|&version| allows(version.into()))
        .ok_or_else(|| format!("must be {what}"))
}

/// A number of tokens; -1 for all.
fn window(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(usize::MAX),
        text => (text.parse()).map_err(|_| "must be a whole number, -1 or more".to_owned()),
    }
}

/// `15043-1.5`.
fn bias(text: &str) -> Result<(u32, f32), String> {
    let at = text.find(['+', '-']).unwrap_or(text.len());
    let (token, bias) = text.split_at(at);
    let bias = bias.parse().ok().filter(|bias: &f32| !bias.is_nan());
    (token.parse().ok().zip(bias))
        .ok_or_else(|| "must be a token's number and a bias, such as 15043-1.5".to_owned())
}

impl SamplingArgs {
    /// Tokens to guess ahead at most.
    pub fn drafts(&self) -> usize {
        self.draft
    }

    /// The seed, if one is asked for.
    pub fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// What is asked for that is not the default.
    pub fn changes(&self) -> Map<String, Value> {
        let fields = |settings: &Settings| match serde_json::to_value(settings) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        let usual = fields(&Settings::default());
        let mut changes = fields(&self.settings());
        changes.retain(|name, value| usual.get(name) != Some(value));
        changes
    }

    /// The sampler's settings.
    pub fn settings(&self) -> Settings {
        let clock = || {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(0, |time| time.as_nanos() as u64)
        };
        let defaults = Settings::default();
        Settings {
            samplers: self.samplers.0.clone(),
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical,
            top_n_sigma: self.top_n_sigma,
            xtc_probability: self.xtc_probability,
            xtc_threshold: self.xtc_threshold,
            repeat_penalty: self.repeat_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            repeat_last: self.repeat_last_n,
            dry_multiplier: self.dry_multiplier,
            dry_base: self.dry_base,
            dry_allowed_length: self.dry_allowed_length,
            dry_last: self.dry_penalty_last_n,
            dry_sequence_breakers: match self.dry_sequence_breakers.is_empty() {
                true => defaults.dry_sequence_breakers,
                false => self.dry_sequence_breakers.clone(),
            },
            mirostat: self.mirostat,
            mirostat_tau: self.mirostat_tau,
            mirostat_eta: self.mirostat_eta,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or_else(clock),
        }
    }
}
