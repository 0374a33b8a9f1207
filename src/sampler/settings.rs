//! What can be set, under llama.cpp's names, from the command line and in a request alike.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// How to choose among the likely tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The steps, in their order; one that is not named is not taken.
    #[serde(with = "names")]
    pub samplers: Vec<Step>,
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the `k` most likely tokens are drawn from; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this likely relative to the best one; 0 for all.
    pub min_p: f32,
    /// Only the tokens whose surprise is nearest to the expected one and that together reach this probability; 1
    /// for all (locally typical sampling, arXiv:2202.00666).
    pub typical_p: f32,
    /// Only tokens whose logits are within so many standard deviations of the best; 0 or less for all (top-nσ,
    /// arXiv:2411.07641).
    pub top_n_sigma: f32,
    /// How often the likely tokens are left out but the least likely of them; 0 for never (XTC).
    pub xtc_probability: f32,
    /// What counts as likely there; above 0.5 nothing is ever left out.
    pub xtc_threshold: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 for none.
    pub repeat_penalty: f32,
    /// Taken from the logit of a recent token for each time it stands there; 0 for none.
    pub frequency_penalty: f32,
    /// Taken from the logit of a recent token once; 0 for none.
    pub presence_penalty: f32,
    /// How many recent tokens the three penalties look at; all where that is [`usize::MAX`] (-1 in JSON).
    #[serde(rename = "repeat_last_n", with = "window")]
    pub repeat_last: usize,
    /// Strength of the penalty on tokens that would continue a repetition; 0 for none (DRY).
    pub dry_multiplier: f32,
    /// By how much that grows with each token that the repetition is longer.
    pub dry_base: f32,
    /// Tokens that may be repeated free of charge.
    pub dry_allowed_length: usize,
    /// How many recent tokens are searched for repetitions; all where that is [`usize::MAX`] (-1 in JSON).
    #[serde(rename = "dry_penalty_last_n", with = "window")]
    pub dry_last: usize,
    /// No repetition goes across a token that holds one of these.
    pub dry_sequence_breakers: Vec<String>,
    /// 2 aims at a surprise of `mirostat_tau` bits a token in place of the steps that cut (Mirostat 2,
    /// arXiv:2007.14966); 0 does not.
    pub mirostat: u8,
    /// The surprise aimed at.
    pub mirostat_tau: f32,
    /// How fast the cut follows the surprise.
    pub mirostat_eta: f32,
    /// What is added to the logits of tokens; negative infinity bans one. In JSON an object from tokens to
    /// numbers, or a list of pairs; `false` bans.
    #[serde(with = "bias")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draws.
    #[serde(skip)]
    pub seed: u64,
}

/// A step from all tokens to those that are drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Repetition, frequency and presence penalties.
    Penalties,
    /// The penalty on continued repetitions.
    Dry,
    /// Top-nσ.
    TopNSigma,
    /// Top-k.
    TopK,
    /// Locally typical tokens.
    #[serde(rename = "typ_p", alias = "typical_p", alias = "typical")]
    Typical,
    /// Top-p.
    TopP,
    /// Min-p.
    MinP,
    /// Leaving likely tokens out.
    Xtc,
    /// The division by the temperature.
    Temperature,
}

impl Step {
    /// All of them, in llama.cpp's order.
    pub const ALL: [Self; 9] = [
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::Typical,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
    ];

    /// The steps that `names` lists, separated by semicolons.
    ///
    /// # Errors
    /// Where one is not known; says which there are.
    pub fn list(names: &str) -> Result<Vec<Self>, String> {
        let names = names
            .split(';')
            .map(str::trim)
            .filter(|name| !name.is_empty());
        let step = |name: &str| {
            let step = serde_json::from_value(name.into());
            step.map_err(|_| {
                format!(
                    "there is no step {name}; there are: {}",
                    Self::names(&Self::ALL)
                )
            })
        };
        names.map(step).collect()
    }

    /// The names of `steps`, separated by semicolons.
    pub fn names(steps: &[Self]) -> String {
        let name = |step: &Self| {
            let name = serde_json::to_value(step).expect("a step has a name");
            name.as_str().unwrap_or_default().to_owned()
        };
        steps.iter().map(name).collect::<Vec<_>>().join(";")
    }
}

impl Default for Settings {
    /// llama.cpp's defaults.
    fn default() -> Self {
        Self {
            samplers: Step::ALL.to_vec(),
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last: 64,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_last: usize::MAX,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_owned).to_vec(),
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A setting that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Error {
    /// Its name.
    pub field: String,
    /// What is wrong.
    pub problem: String,
}

/// What a number must be: whether it is, and in words.
type Rule = (fn(f32) -> bool, &'static str);

/// What the number called `name` must be, beside finite.
pub fn rule(name: &str) -> Rule {
    let share: Rule = (|x| (0.0..=1.0).contains(&x), "within 0 and 1");
    match name {
        "temperature" | "dry_multiplier" | "mirostat_tau" | "mirostat_eta" => {
            (|x| x >= 0.0, "0 or more")
        }
        "top_p" | "min_p" | "typical_p" | "xtc_probability" | "xtc_threshold" => share,
        "repeat_penalty" => (|x| x > 0.0, "above 0"),
        "dry_base" => (|x| x >= 1.0, "1 or more"),
        "mirostat" => (|x| x == 0.0 || x == 2.0, "0 or 2"),
        _ => (|_| true, "finite"),
    }
}

impl Settings {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// These settings with those of `fields` instead that have the name of one; null changes nothing. The seed is no
    /// field.
    ///
    /// # Errors
    /// Where one of them makes no sense.
    pub fn with(&self, fields: &Map<String, Value>) -> Result<Self, Error> {
        let Ok(Value::Object(mut all)) = serde_json::to_value(self) else {
            unreachable!("settings are an object")
        };
        let mut settings = self.clone();
        for (name, value) in fields {
            let Some(slot) = all.get_mut(name).filter(|_| !value.is_null()) else {
                continue;
            };
            *slot = value.clone();
            // One by one, so that the wrong one is named.
            let wrong = |problem| Error {
                field: name.clone(),
                problem,
            };
            settings = Self::deserialize(&Value::Object(all.clone()))
                .map_err(|error| wrong(error.to_string()))?;
            let (allows, what) = rule(name);
            if let Some(number) = value.as_f64()
                && !(number.abs() <= f64::from(f32::MAX) && allows(number as f32))
            {
                return Err(wrong(format!("must be a number, {what}")));
            }
        }
        settings.seed = self.seed;
        Ok(settings)
    }
}

/// [`Settings::samplers`]: a list of names, or one string with semicolons.
mod names {
    use super::*;

    pub fn serialize<S: Serializer>(steps: &[Step], serializer: S) -> Result<S::Ok, S::Error> {
        steps.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Step>, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Names {
            One(String),
            Many(Vec<String>),
        }
        let names = match Names::deserialize(deserializer)? {
            Names::One(names) => names,
            Names::Many(names) => names.join(";"),
        };
        Step::list(&names).map_err(serde::de::Error::custom)
    }
}

/// A number of recent tokens; -1 for all.
mod window {
    use super::*;

    pub fn serialize<S: Serializer>(tokens: &usize, serializer: S) -> Result<S::Ok, S::Error> {
        match i64::try_from(*tokens) {
            Ok(tokens) => serializer.serialize_i64(tokens),
            Err(_) => serializer.serialize_i64(-1),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
        match i64::deserialize(deserializer)? {
            -1 => Ok(usize::MAX),
            tokens => usize::try_from(tokens)
                .map_err(|_| serde::de::Error::custom("must be a whole number, -1 or more")),
        }
    }
}

/// [`Settings::logit_bias`].
mod bias {
    use super::*;

    pub fn serialize<S: Serializer>(
        pairs: &[(u32, f32)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let pairs = pairs.iter().map(|&(token, bias)| match bias.is_finite() {
            true => (token, Value::from(bias)),
            false => (token, Value::from(false)),
        });
        serializer.collect_map(pairs)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(u32, f32)>, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Pairs {
            Object(Map<String, Value>),
            List(Vec<(u32, Value)>),
        }
        let wrong = || {
            serde::de::Error::custom("must be an object from tokens' numbers to numbers or false")
        };
        let bias = |value: &Value| match value {
            Value::Bool(false) => Some(f32::NEG_INFINITY),
            value => value.as_f64().map(|bias| bias as f32),
        };
        match Pairs::deserialize(deserializer).map_err(|_| wrong())? {
            Pairs::List(pairs) => (pairs.iter())
                .map(|(token, value)| Some((*token, bias(value)?)))
                .collect::<Option<_>>(),
            Pairs::Object(pairs) => (pairs.iter())
                .map(|(token, value)| Some((token.parse().ok()?, bias(value)?)))
                .collect(),
        }
        .ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(fields: Value) -> Result<Settings, Error> {
        Settings::default().with(fields.as_object().unwrap())
    }

    #[test]
    fn fields_of_a_request_replace_settings() {
        let settings = with(json!({
            "temperature": 0, "top_k": 3, "repeat_last_n": -1, "samplers": "top_k;temperature", "min_p": null,
            "logit_bias": {"7": -1.5, "8": false}, "model": "other",
        }));
        let expected = Settings {
            temperature: 0.0,
            top_k: 3,
            repeat_last: usize::MAX,
            samplers: vec![Step::TopK, Step::Temperature],
            logit_bias: vec![(7, -1.5), (8, f32::NEG_INFINITY)],
            ..Settings::default()
        };
        assert_eq!(settings, Ok(expected.clone()));
        // What is told can be sent back.
        let told = serde_json::to_value(&expected).unwrap();
        assert_eq!(with(told), Ok(expected));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (fields, field) in [
            (json!({"top_k": 1, "temperature": -0.1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_p": 1.01}), "top_p"),
            (json!({"top_k": -1}), "top_k"),
            (json!({"mirostat": 1}), "mirostat"),
            (json!({"samplers": ["top_k", "top_q"]}), "samplers"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"presence_penalty": 1e300}), "presence_penalty"),
            (json!({"repeat_last_n": -2}), "repeat_last_n"),
        ] {
            let error = with(fields).unwrap_err();
            assert_eq!(error.field, field, "{error}");
        }
    }
}
