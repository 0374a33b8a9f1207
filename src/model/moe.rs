//! The router: which experts a token takes, and with which weights.

/// What may speak for an expert besides its score.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Routing {
    /// Nothing: what the model was trained with.
    #[default]
    Exact,
    /// That it need not be read from disk: any but a token's best expert may give way to one that is there
    /// and whose score is not lower by more than this share of the distance between the token's highest and lowest.
    /// Only while tokens are generated, and not the same from run to run, since reads take their time.
    Cached(f32),
}

/// Turns a token's router logits into its experts: softmax over all of them, the best
/// `chosen.len()` taken, their weights renormalised to sum to 1. Of equal scores the lower
/// expert wins. `scores` is used up.
fn choose(scores: &mut [f32], chosen: &mut [(usize, f32)]) {
    choose_by(scores, |_| 0.0, chosen);
}

/// The same where, but for the best one, the experts of `preferred` that are present are preferred by its margin: see
/// [`Routing::Cached`].
pub(super) fn choose_preferred(
    scores: &mut [f32],
    preferred: Option<&(Vec<bool>, f32)>,
    chosen: &mut [(usize, f32)],
) {
    let Some((present, margin)) = preferred else {
        return choose(scores, chosen);
    };
    let (low, high) = scores
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &score| {
            (low.min(score), high.max(score))
        });
    let bonus = margin * (high - low);
    let bonus = if bonus.is_finite() { bonus } else { 0.0 };
    choose_by(
        scores,
        |expert| if present[expert] { bonus } else { 0.0 },
        chosen,
    );
}

/// [`choose`] where `bonus` is added to scores while all but the best expert are chosen. Weights are those
/// of the scores themselves.
fn choose_by(scores: &mut [f32], bonus: impl Fn(usize) -> f32, chosen: &mut [(usize, f32)]) {
    let max = scores
        .iter()
        .fold(f32::NEG_INFINITY, |max, &score| max.max(score));
    let mut sum = 0.0;
    for (index, chosen) in chosen.iter_mut().enumerate() {
        let worth = |expert: usize, scores: &[f32]| match index {
            0 => scores[expert],
            _ => scores[expert] + bonus(expert),
        };
        let mut best = 0;
        for expert in 1..scores.len() {
            // A NaN loses against everything.
            if worth(expert, scores) > worth(best, scores) || scores[best].is_nan() {
                best = expert;
            }
        }
        // The full softmax's denominator cancels when the weights are renormalised.
        *chosen = (best, (scores[best] - max).exp());
        sum += chosen.1;
        scores[best] = f32::NAN;
    }
    chosen.iter_mut().for_each(|(_, weight)| *weight /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose_two(mut scores: Vec<f32>) -> [(usize, f32); 2] {
        let mut chosen = [(0, 0.0); 2];
        choose(&mut scores, &mut chosen);
        chosen
    }

    #[test]
    fn the_best_two_are_renormalised() {
        let chosen = choose_two(vec![1.0, 3.0, 2.0]);
        assert_eq!((chosen[0].0, chosen[1].0), (1, 2));
        let expected = 1.0 / (1.0 + (-1.0f32).exp());
        assert!((chosen[0].1 - expected).abs() < 1e-6, "{chosen:?}");
        assert!((chosen[0].1 + chosen[1].1 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn of_equal_scores_the_lower_expert_wins() {
        assert_eq!(choose_two(vec![0.5, 0.5, 0.5]), [(0, 0.5), (1, 0.5)]);
    }

    #[test]
    fn a_very_unlikely_second_expert_is_still_another_one() {
        let chosen = choose_two(vec![f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]);
        assert_eq!((chosen[0].0, chosen[1].0), (1, 0));
    }

    #[test]
    fn a_nan_score_loses() {
        let chosen = choose_two(vec![f32::NAN, 1.0, f32::NAN, 2.0]);
        assert_eq!((chosen[0].0, chosen[1].0), (3, 1));
    }

    #[test]
    fn an_expert_that_is_there_is_preferred_within_the_margin_but_never_to_the_best() {
        let choose = |margin: f32| {
            let mut chosen = [(0, 0.0); 2];
            let mut scores = vec![0.0, 10.0, 5.0, 4.5];
            let preferred = (vec![true, false, false, true], margin);
            choose_preferred(&mut scores, Some(&preferred), &mut chosen);
            chosen
        };
        assert_eq!(choose(0.0).map(|(expert, _)| expert), [1, 2]);
        let chosen = choose(0.1);
        assert_eq!(chosen.map(|(expert, _)| expert), [1, 3]);
        let expected = 1.0 / (1.0 + (4.5f32 - 10.0).exp());
        assert!((chosen[0].1 - expected).abs() < 1e-6, "{chosen:?}");
        assert_eq!(choose(1e9).map(|(expert, _)| expert)[0], 1);
    }
}
