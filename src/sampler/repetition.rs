//! Penalties on tokens that stood before.

use std::collections::HashMap;

/// How often each of the last `last` tokens of `history` stands among them.
pub(super) fn counts(history: &[u32], last: usize) -> HashMap<u32, u32> {
    let recent = &history[history.len().saturating_sub(last)..];
    let mut counts = HashMap::new();
    for &token in recent {
        *counts.entry(token).or_insert(0) += 1;
    }
    counts
}

/// The tokens that would continue a repetition of what `history` ends with, each with the length of the longest one,
/// of those that are at least `least` tokens long. None goes across a token for which `breaks` is true.
///
/// DRY as its author describes it (oobabooga/text-generation-webui#5677): if the last `length` tokens stood before,
/// followed by `token`, then `token` now makes the repetition longer.
pub(super) fn continuations(
    history: &[u32],
    least: usize,
    breaks: impl Fn(u32) -> bool,
) -> HashMap<u32, usize> {
    let reversed: Vec<u32> = history.iter().rev().copied().collect();
    let longest = reversed.iter().take_while(|&&token| !breaks(token)).count();
    let mut found = HashMap::new();
    if longest < least.max(1) {
        return found;
    }
    for (at, length) in common_prefixes(&reversed).into_iter().enumerate().skip(1) {
        let length = length.min(longest);
        if length >= least.max(1) {
            let known: &mut usize = found.entry(reversed[at - 1]).or_default();
            *known = length.max(*known);
        }
    }
    found
}

/// For each position, how many tokens from there on are those that the whole begins with (the Z function).
fn common_prefixes(tokens: &[u32]) -> Vec<usize> {
    let mut lengths = vec![0; tokens.len()];
    let (mut start, mut end) = (0, 0);
    for at in 1..tokens.len() {
        // What is known from the match that reaches furthest.
        let mut length = match at < end {
            true => lengths[at - start].min(end - at),
            false => 0,
        };
        while at + length < tokens.len() && tokens[length] == tokens[at + length] {
            length += 1;
        }
        if at + length > end {
            (start, end) = (at, at + length);
        }
        lengths[at] = length;
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition.
    fn by_hand(history: &[u32], least: usize, breaks: impl Fn(u32) -> bool) -> HashMap<u32, usize> {
        let mut found = HashMap::new();
        for next in 1..history.len() {
            let length = (1..=next)
                .take_while(|&length| {
                    let (before, end) = (history[next - length], history[history.len() - length]);
                    before == end && !breaks(end)
                })
                .count();
            if length >= least {
                let known: &mut usize = found.entry(history[next]).or_default();
                *known = length.max(*known);
            }
        }
        found
    }

    #[test]
    fn a_repetition_is_continued_by_what_followed_it() {
        let found = continuations(&[1, 2, 3, 4, 9, 1, 2, 3], 2, |_| false);
        assert_eq!(found, HashMap::from([(4, 3)]));
        assert!(continuations(&[1, 2, 3, 4, 9, 1, 2, 3], 4, |_| false).is_empty());
        let found = continuations(&[1, 2, 3, 4, 9, 1, 2, 3], 1, |token| token == 2);
        assert_eq!(found, HashMap::from([(4, 1)]), "not across the 2");
    }

    #[test]
    fn continuations_are_those_of_the_definition() {
        let mut state = 1u32;
        for round in 0..300 {
            let history: Vec<u32> = (0..round % 40)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) % 3
                })
                .collect();
            for least in [1, 2, 5] {
                for breaker in [0, 9] {
                    let breaks = |token: u32| token == breaker;
                    assert_eq!(
                        continuations(&history, least, breaks),
                        by_hand(&history, least, breaks),
                        "{history:?}, {least}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_window_is_the_last_tokens() {
        assert_eq!(counts(&[5, 6, 7, 6], 3), HashMap::from([(6, 2), (7, 1)]));
        assert_eq!(counts(&[5, 6], usize::MAX).len(), 2);
        assert!(counts(&[5, 6], 0).is_empty());
    }
}
