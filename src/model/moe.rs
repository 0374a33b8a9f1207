//! The router: which experts a token takes, and with which weights.

/// Turns a token's router logits into its experts: softmax over all of them, the best
/// `chosen.len()` taken, their weights renormalised to sum to 1. Of equal scores the lower
/// expert wins. `scores` is used up.
pub(super) fn choose(scores: &mut [f32], chosen: &mut [(usize, f32)]) {
    let max = scores
        .iter()
        .fold(f32::NEG_INFINITY, |max, &score| max.max(score));
    let mut sum = 0.0;
    for chosen in chosen.iter_mut() {
        let mut best = 0;
        for expert in 1..scores.len() {
            // A NaN loses against everything.
            if scores[expert] > scores[best] || scores[best].is_nan() {
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
}
