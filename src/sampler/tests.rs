//! Each step on distributions that are known.

use super::*;

/// The logits of a distribution.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() + 3.0).collect()
}

/// How often each of the tokens is drawn in 20,000 draws after `history`.
fn shares_after(settings: Settings, probabilities: &[f32], history: &[u32]) -> Vec<f64> {
    let mut sampler = Sampler::new(settings);
    let logits = logits(probabilities);
    let mut counts = vec![0; logits.len()];
    for _ in 0..20_000 {
        counts[sampler.sample(&logits, history) as usize] += 1;
    }
    counts
        .into_iter()
        .map(|count| f64::from(count) / 20_000.0)
        .collect()
}

fn shares(settings: Settings, probabilities: &[f32]) -> Vec<f64> {
    shares_after(settings, probabilities, &[])
}

/// The softmax of the model, untouched.
fn plain() -> Settings {
    Settings {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        ..Settings::default()
    }
}

/// That the shares are those expected: none where nothing may be, and within 4 standard errors else.
#[track_caller]
fn assert_shares(found: &[f64], expected: &[f64]) {
    let total: f64 = expected.iter().sum();
    for (found, expected) in found.iter().zip(expected) {
        let expected = expected / total;
        let error = (expected * (1.0 - expected) / 20_000.0).sqrt();
        assert!(
            (found - expected).abs() <= 4.0 * error,
            "{found} instead of {expected}"
        );
    }
}

const FOUR: [f32; 4] = [0.5, 0.3, 0.15, 0.05];

#[test]
fn greedy_takes_the_best_and_the_lowest_of_equals() {
    let mut sampler = Sampler::new(Settings::greedy());
    assert_eq!(sampler.sample(&[0.0, 2.0, 1.0, 2.0], &[]), 1);
    assert_eq!(sampler.sample(&[f32::NAN, -1.0, -2.0], &[]), 1);
}

#[test]
fn draws_follow_the_softmax() {
    assert_shares(&shares(plain(), &FOUR), &[0.5, 0.3, 0.15, 0.05]);
}

#[test]
fn temperature_sharpens() {
    let settings = Settings {
        temperature: 0.5,
        ..plain()
    };
    assert_shares(&shares(settings, &[0.6, 0.4]), &[0.36, 0.16]);
}

#[test]
fn top_k_top_p_and_min_p_cut_the_tail() {
    for settings in [
        Settings {
            top_k: 2,
            ..plain()
        },
        Settings {
            top_p: 0.75,
            ..plain()
        },
        Settings {
            min_p: 0.4,
            ..plain()
        },
    ] {
        assert_shares(&shares(settings, &FOUR), &[0.5, 0.3, 0.0, 0.0]);
    }
}

#[test]
fn typical_tokens_are_near_the_expected_surprise() {
    // The entropy is 1.142 nats; the surprises are 0.69, 1.20, 1.90, 3.00: nearest are the second, the first, the third.
    let typical = |typical_p| {
        shares(
            Settings {
                typical_p,
                ..plain()
            },
            &FOUR,
        )
    };
    assert_shares(&typical(0.2), &[0.0, 1.0, 0.0, 0.0]);
    assert_shares(&typical(0.7), &[0.5, 0.3, 0.0, 0.0]);
    assert_shares(&typical(0.9), &[0.5, 0.3, 0.15, 0.0]);
}

#[test]
fn top_n_sigma_cuts_by_the_deviation_of_logits() {
    // Logits 4, 2, 0, -6: the mean is 0, the standard deviation √14 = 3.742.
    let probabilities = [4f32, 2.0, 0.0, -6.0].map(f32::exp);
    let weights = probabilities.map(f64::from);
    let within = |top_n_sigma| {
        shares(
            Settings {
                top_n_sigma,
                ..plain()
            },
            &probabilities,
        )
    };
    assert_shares(&within(0.5), &[1.0, 0.0, 0.0, 0.0]);
    assert_shares(&within(0.6), &[weights[0], weights[1], 0.0, 0.0]);
    assert_shares(&within(1.1), &[weights[0], weights[1], weights[2], 0.0]);
    assert_shares(&within(-1.0), &weights);
}

#[test]
fn xtc_leaves_out_the_likely_but_the_last() {
    let xtc = |xtc_probability, xtc_threshold| {
        let settings = Settings {
            xtc_probability,
            xtc_threshold,
            ..plain()
        };
        shares(settings, &FOUR)
    };
    assert_shares(&xtc(1.0, 0.1), &[0.0, 0.0, 0.15, 0.05]);
    assert_shares(&xtc(1.0, 0.2), &[0.0, 0.3, 0.15, 0.05]);
    assert_shares(&xtc(1.0, 0.4), &[0.5, 0.3, 0.15, 0.05]);
    // Half of the draws are without the first two.
    assert_shares(&xtc(0.5, 0.1), &[0.25, 0.15, 0.075 + 0.375, 0.025 + 0.125]);
}

#[test]
fn penalties_lower_recent_tokens() {
    let settings = Settings {
        repeat_penalty: 1.5,
        repeat_last: 2,
        ..Settings::greedy()
    };
    let mut sampler = Sampler::new(settings);
    assert_eq!(sampler.sample(&[1.0, 1.2], &[1]), 0);
    assert_eq!(
        sampler.sample(&[-1.0, -0.8], &[1]),
        0,
        "below 0 they are multiplied"
    );
    assert_eq!(
        sampler.sample(&[1.0, 1.2], &[1, 0, 0]),
        1,
        "the 1 lies too far back"
    );

    // Probabilities fall by the exponential of what is taken from logits.
    let settings = Settings {
        presence_penalty: 2f32.ln(),
        ..plain()
    };
    let history = [0, 0, 0];
    assert_shares(
        &shares_after(settings, &FOUR, &history),
        &[0.25, 0.3, 0.15, 0.05],
    );
    let settings = Settings {
        frequency_penalty: 2f32.ln(),
        ..plain()
    };
    assert_shares(
        &shares_after(settings, &FOUR, &history),
        &[0.0625, 0.3, 0.15, 0.05],
    );
}

#[test]
fn dry_grows_with_the_repetition() {
    // 1 2 3 stood before, followed by 0: a repetition of 3 tokens, 1 more than is free.
    let history = [1, 2, 3, 0, 2, 1, 2, 3];
    let settings = |dry_base| Settings {
        dry_multiplier: 2f32.ln(),
        dry_base,
        ..plain()
    };
    assert_shares(
        &shares_after(settings(1.0), &FOUR, &history),
        &[0.25, 0.3, 0.15, 0.05],
    );
    assert_shares(
        &shares_after(settings(2.0), &FOUR, &history),
        &[0.125, 0.3, 0.15, 0.05],
    );
    let free = Settings {
        dry_allowed_length: 4,
        ..settings(2.0)
    };
    assert_shares(
        &shares_after(free, &FOUR, &history),
        &[0.5, 0.3, 0.15, 0.05],
    );
    let near = Settings {
        dry_last: 5,
        ..settings(2.0)
    };
    assert_shares(
        &shares_after(near, &FOUR, &history),
        &[0.5, 0.3, 0.15, 0.05],
    );
}

#[test]
fn biases_are_added_and_ban() {
    let logit_bias = vec![(0, f32::NEG_INFINITY), (3, 2f32.ln())];
    let settings = Settings {
        logit_bias,
        ..plain()
    };
    assert_shares(&shares(settings, &FOUR), &[0.0, 0.3, 0.15, 0.1]);
}

#[test]
fn mirostat_reaches_the_surprise_it_aims_at() {
    // 1000 tokens whose probabilities fall as 1/rank, and their surprises.
    let sum: f32 = (1..=1000).map(|rank| 1.0 / rank as f32).sum();
    let probabilities: Vec<f32> = (1..=1000).map(|rank| 1.0 / (rank as f32 * sum)).collect();
    let logits = logits(&probabilities);
    for tau in [2.0, 4.0] {
        let settings = Settings {
            mirostat: 2,
            mirostat_tau: tau,
            ..plain()
        };
        let mut sampler = Sampler::new(settings);
        let (mut total, draws) = (0.0, 4000);
        for _ in 0..draws {
            sampler.sample(&logits, &[]);
        }
        for _ in 0..draws {
            let mu = sampler.mu;
            sampler.sample(&logits, &[]);
            // mu fell by eta · (surprise − tau).
            total += (mu - sampler.mu) / 0.1 + tau;
        }
        let mean = total / draws as f32;
        assert!((mean - tau).abs() < 0.1, "{mean} bits instead of {tau}");
        assert!(sampler.pool.list().len() < 900, "nothing was left out");
    }
}

#[test]
fn the_order_of_the_steps_matters() {
    // Cooled first, the best alone reaches top-p.
    let cool = |samplers: &[Step]| Settings {
        samplers: samplers.to_vec(),
        temperature: 0.25,
        top_p: 0.6,
        ..plain()
    };
    let found = shares(cool(&[Step::Temperature, Step::TopP]), &FOUR);
    assert_shares(&found, &[1.0, 0.0, 0.0, 0.0]);
    let found = shares(cool(&[Step::TopP, Step::Temperature]), &FOUR);
    assert_shares(&found, &[0.0625, 0.0081, 0.0, 0.0]);
    // A step that is not named is not taken; a penalty after a cut sees what is left.
    assert_shares(&shares(cool(&[]), &FOUR), &[0.5, 0.3, 0.15, 0.05]);
    let late = Settings {
        samplers: vec![Step::TopK, Step::Penalties, Step::Xtc],
        top_k: 2,
        presence_penalty: 3.0,
        xtc_probability: 1.0,
        xtc_threshold: 0.01,
        ..plain()
    };
    assert_shares(&shares_after(late, &FOUR, &[0]), &[1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn the_same_seed_draws_the_same_tokens() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
    let draw = |seed| {
        let mut sampler = Sampler::new(Settings {
            seed,
            ..Settings::default()
        });
        (0..50)
            .map(|_| sampler.sample(&logits, &[]))
            .collect::<Vec<_>>()
    };
    assert_eq!(draw(7), draw(7));
    assert_ne!(draw(7), draw(8));
}

#[test]
fn nothing_but_nan_still_gives_a_token() {
    for mirostat in [0, 2] {
        let mut sampler = Sampler::new(Settings {
            mirostat,
            ..Settings::default()
        });
        assert_eq!(sampler.sample(&[f32::NAN, f32::NAN], &[]), 0);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 2], &[]), 0);
    }
}

/// Allows a single token.
struct Only(u32, Vec<u32>);

impl Constraint for Only {
    fn rule_out(&mut self, scores: &mut [f32]) {
        for (token, score) in (0..).zip(scores) {
            if token != self.0 {
                *score = f32::NEG_INFINITY;
            }
        }
    }

    fn accept(&mut self, token: u32) {
        assert_eq!(token, self.0);
        self.1.push(token);
    }
}

#[test]
fn a_constraint_rules_out() {
    for temperature in [0.0, 1.0] {
        let settings = Settings {
            temperature,
            ..plain()
        };
        let only = Box::new(Only(3, Vec::new()));
        let mut sampler = Sampler::new(settings).with_constraint(Some(only));
        assert_eq!(sampler.sample(&logits(&FOUR), &[]), 3);
    }
}

#[test]
fn a_sampler_goes_on_where_another_was() {
    let settings = Settings {
        seed: 9,
        mirostat: 2,
        ..plain()
    };
    let logits = logits(&[0.4, 0.3, 0.2, 0.1]);
    let mut sampler = Sampler::new(settings.clone());
    // Through several of the generator's blocks.
    for drawn in 0..100 {
        let mut other = Sampler::new(settings.clone());
        other.go_to(sampler.position());
        let mut ahead = Sampler::new(settings.clone());
        for _ in 0..drawn {
            ahead.sample(&logits, &[]);
        }
        for _ in 0..5 {
            assert_eq!(
                other.sample(&logits, &[]),
                ahead.sample(&logits, &[]),
                "{drawn}"
            );
        }
        sampler.sample(&logits, &[]);
    }
}
