//! Guesses of the tokens to come, looked up in the tokens so far.
//!
//! Where the last few tokens stand a second time, further up, what followed them there is
//! likely to follow again: names, quotations, code that is rewritten, a text that is summed up.
//! A guess costs a search of some microseconds; the model then checks all of it in one pass
//! ([`Generation`](crate::generation::Generation)), so that a wrong one costs time and nothing else.

/// The shortest repetition that is believed: two equal tokens follow each other by chance.
const SHORTEST: usize = 3;
/// Repetitions are followed no further back than this.
const LONGEST: usize = 16;

/// What may follow `tokens`: the continuation of the longest repetition of their end, the latest
/// of several. As many tokens as the repetition is long, since a longer one goes on for longer,
/// and at most `limit`; none where there is no repetition.
pub fn draft(tokens: &[u32], limit: usize) -> Vec<u32> {
    let (mut longest, mut from) = (0, 0);
    for end in (1..tokens.len()).rev() {
        let common = (tokens[..end].iter().rev())
            .zip(tokens.iter().rev())
            .take(LONGEST)
            .take_while(|(a, b)| a == b)
            .count();
        if common > longest {
            (longest, from) = (common, end);
        }
        if longest == LONGEST {
            break;
        }
    }
    if longest < SHORTEST {
        return Vec::new();
    }
    // Where the repetition reaches the end, it goes round.
    let round = tokens[from..].iter().copied().cycle();
    round.take(longest.min(limit)).collect()
}

#[cfg(test)]
mod tests {
    use super::draft;

    #[test]
    fn what_followed_the_longest_repetition_is_drafted() {
        let tokens = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 61, 62, 63, 1, 2, 3, 4];
        assert_eq!(draft(&tokens, 8), [50, 9, 2, 3]);
        assert_eq!(draft(&tokens, 2), [50, 9]);
        assert_eq!(draft(&tokens[1..], 8), [60, 61, 62]);
    }

    #[test]
    fn of_equal_repetitions_the_latest_counts() {
        let tokens = [1, 2, 3, 40, 1, 2, 3, 50, 1, 2, 3];
        assert_eq!(draft(&tokens, 1), [50]);
    }

    #[test]
    fn a_repetition_that_reaches_the_end_goes_round() {
        assert_eq!(draft(&[7; 10], 8), [7; 8]);
        assert_eq!(draft(&[1, 2, 1, 2, 1, 2, 1], 8), [2, 1, 2, 1, 2]);
    }

    #[test]
    fn short_repetitions_and_new_texts_give_nothing() {
        assert!(draft(&[1, 2, 3, 4, 5], 8).is_empty());
        assert!(draft(&[1, 2, 9, 8, 1, 2], 8).is_empty());
        assert!(draft(&[1, 2, 3, 9, 1, 2, 3], 0).is_empty());
        assert!(draft(&[1], 8).is_empty() && draft(&[], 8).is_empty());
    }
}
