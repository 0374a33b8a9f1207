//! Which candidate of each item, so that the costs' sum is least and the bytes' sum within a budget.
//!
//! Of an item's candidates those on the lower convex hull of (bytes, cost) can be the answer to "cost +
//! λ · bytes is least" for some price λ of a byte. As λ falls from infinity, items step along their
//! hulls, the step that saves most cost a byte first. Such steps are taken while they fit, which gives
//! the best choice of its own size. What is then left of the budget is smaller than one step, and spent
//! on whatever saves most a byte and fits, hulls or not.

use fewbit::quant::BlockType;

/// A type that a matrix may get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The type.
    pub kind: BlockType,
    /// What it takes.
    pub bytes: u64,
    /// What it loses.
    pub cost: f64,
}

/// A matrix and the types that it may get.
#[derive(Clone, Debug)]
pub struct Item {
    /// At least one.
    pub candidates: Vec<Candidate>,
}

impl Item {
    /// Indices of the lower convex hull, from few bytes to many.
    fn hull(&self) -> Vec<usize> {
        let at = |i: usize| &self.candidates[i];
        let mut order: Vec<usize> = (0..self.candidates.len()).collect();
        order.sort_by(|&a, &b| {
            let by_cost = || at(a).cost.total_cmp(&at(b).cost);
            at(a).bytes.cmp(&at(b).bytes).then_with(by_cost)
        });
        let mut hull: Vec<usize> = Vec::new();
        for next in order {
            if hull
                .last()
                .is_some_and(|&last| at(last).cost <= at(next).cost)
            {
                continue; // more bytes, and nothing saved
            }
            while let [.., before, last] = hull[..] {
                if saving(at(before), at(last)) > saving(at(last), at(next)) {
                    break;
                }
                hull.pop();
            }
            hull.push(next);
        }
        hull
    }
}

/// Cost that is saved a byte by going from one candidate to a larger one.
fn saving(from: &Candidate, to: &Candidate) -> f64 {
    (from.cost - to.cost) / (to.bytes - from.bytes) as f64
}

/// The index of each item's candidate; `None` where the smallest do not fit.
pub fn choose(items: &[Item], budget: u64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = items.iter().map(Item::hull).collect();
    let at = |item: usize, index: usize| &items[item].candidates[index];
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull[0]).collect();
    let sizes = chosen
        .iter()
        .enumerate()
        .map(|(item, &index)| at(item, index).bytes);
    let mut left = budget.checked_sub(sizes.sum())?;

    // Along a hull savings fall, so that an item's steps stay in order.
    let mut steps: Vec<(f64, usize, usize, usize)> = Vec::new();
    for (item, hull) in hulls.iter().enumerate() {
        for pair in hull.windows(2) {
            let saving = saving(at(item, pair[0]), at(item, pair[1]));
            steps.push((saving, item, pair[0], pair[1]));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    for &(_, item, from, to) in &steps {
        let more = at(item, to).bytes - at(item, from).bytes;
        if more > left {
            break;
        }
        chosen[item] = to;
        left -= more;
    }
    loop {
        let best = (0..items.len())
            .flat_map(|item| (0..items[item].candidates.len()).map(move |index| (item, index)))
            .filter(|&(item, index)| {
                let (now, then) = (at(item, chosen[item]), at(item, index));
                then.cost < now.cost && then.bytes <= now.bytes + left
            })
            .max_by(|&a, &b| {
                let worth = |(item, index): (usize, usize)| {
                    let (now, then) = (at(item, chosen[item]), at(item, index));
                    let more = then.bytes.saturating_sub(now.bytes).max(1);
                    (now.cost - then.cost) / more as f64
                };
                worth(a).total_cmp(&worth(b)).then(b.cmp(&a))
            });
        let Some((item, index)) = best else {
            return Some(chosen);
        };
        left = left + at(item, chosen[item]).bytes - at(item, index).bytes;
        chosen[item] = index;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(candidates: &[(u64, f64)]) -> Item {
        let candidate = |&(bytes, cost): &(u64, f64)| Candidate {
            kind: BlockType::Q4_K,
            bytes,
            cost,
        };
        Item {
            candidates: candidates.iter().map(candidate).collect(),
        }
    }

    /// Items with candidates that follow no curve.
    fn items(seed: u64) -> Vec<Item> {
        let mut state = seed;
        let mut next = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state >> 40
        };
        let mut one = || {
            let scale = 1.0 + (next() % 50) as f64;
            let candidates = (0..5).map(|_| {
                let bytes = 10 + next() % 60;
                let noise = 0.5 + (next() % 100) as f64 / 100.0;
                (bytes, noise * scale * (-(bytes as f64) / 20.0).exp())
            });
            item(&candidates.collect::<Vec<_>>())
        };
        (0..6).map(|_| one()).collect()
    }

    /// By trying everything.
    fn best(items: &[Item], budget: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else {
            return Some(0.0);
        };
        let with = |c: &Candidate| Some(c.cost + best(rest, budget.checked_sub(c.bytes)?)?);
        first
            .candidates
            .iter()
            .filter_map(with)
            .min_by(f64::total_cmp)
    }

    #[test]
    fn the_choice_fits_and_is_near_the_best_there_is() {
        let (mut worst, mut exact) = (1.0_f64, 0);
        for seed in 0..40 {
            let items = items(seed);
            let budget = 130 + 6 * seed;
            let chosen = choose(&items, budget);
            let Some(best) = best(&items, budget) else {
                assert_eq!(chosen, None);
                continue;
            };
            let chosen = chosen.unwrap();
            let picks = items
                .iter()
                .zip(&chosen)
                .map(|(item, &c)| item.candidates[c]);
            let (bytes, cost) =
                picks.fold((0, 0.0), |(b, c), pick| (b + pick.bytes, c + pick.cost));
            assert!(bytes <= budget);
            worst = worst.max(cost / best);
            exact += i32::from(cost / best < 1.0 + 1e-12);
        }
        assert!(worst < 1.5 && exact >= 10, "{worst} {exact}");
    }

    #[test]
    fn leftovers_are_spent_off_the_hull_too() {
        // The hull's step to 30 does not fit; 20, above the line, does.
        let items = [item(&[(10, 9.0), (20, 8.0), (30, 1.0)])];
        assert_eq!(choose(&items, 25), Some(vec![1]));
        assert_eq!(choose(&items, 30), Some(vec![2]));
        assert_eq!(choose(&items, 9), None);
    }
}
