//! Which experts worked, pass by pass; and what a cache would have made of it.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::policy::{Kind, Policy};

/// A record of routing. As a file: one JSON object a line, the head first, then the passes.
#[derive(Debug)]
pub struct Trace {
    /// What does not change.
    pub head: Head,
    /// The passes in their order.
    pub passes: Vec<Pass>,
}

/// What a trace is of.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Head {
    /// Experts a layer.
    pub experts: usize,
    /// Bytes of an expert, by layer.
    pub expert_bytes: Vec<u64>,
}

/// A pass through the layers.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Pass {
    /// Tokens that went through together.
    pub tokens: usize,
    /// Whether they were a prompt's.
    pub prompt: bool,
    /// The experts that they needed, ascending, by layer.
    pub active: Vec<Vec<usize>>,
}

/// Why a file is no trace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A line is not what it should be.
    #[error("line {line}: {problem}; record it again with fewbit run --trace-experts")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// Nothing was generated.
    #[error("no token was generated: there is nothing to replay; record more with fewbit run -n")]
    Empty,
}

impl Trace {
    /// An empty trace of a model with experts of so many bytes.
    pub fn new(head: Head) -> Self {
        let passes = Vec::new();
        Self { head, passes }
    }

    /// A pass begins.
    pub(crate) fn begin(&mut self, tokens: usize, prompt: bool) {
        self.passes.push(Pass {
            tokens,
            prompt,
            active: Vec::new(),
        });
    }

    /// The next layer of the pass needs these experts.
    pub(crate) fn layer(&mut self, active: &[usize]) {
        if let Some(pass) = self.passes.last_mut() {
            pass.active.push(active.to_vec());
        }
    }

    /// The trace as text.
    ///
    /// # Errors
    /// None that is known: numbers are always JSON.
    pub fn to_text(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string(&self.head)?;
        for pass in &self.passes {
            text.push('\n');
            text += &serde_json::to_string(pass)?;
        }
        text.push('\n');
        Ok(text)
    }

    /// Reads a trace.
    ///
    /// # Errors
    /// [`Error::Line`].
    pub fn from_text(text: &str) -> Result<Self, Error> {
        let wrong = |line: usize, problem: String| Error::Line {
            line: line + 1,
            problem,
        };
        let mut lines = text.lines().enumerate();
        let (_, first) = lines.next().ok_or_else(|| wrong(0, "is missing".into()))?;
        let head: Head = serde_json::from_str(first).map_err(|e| wrong(0, e.to_string()))?;
        let mut passes = Vec::new();
        for (number, line) in lines {
            let pass: Pass =
                serde_json::from_str(line).map_err(|e| wrong(number, e.to_string()))?;
            if pass.active.len() != head.expert_bytes.len() {
                let (found, wanted) = (pass.active.len(), head.expert_bytes.len());
                return Err(wrong(
                    number,
                    format!("{found} layers where there are {wanted}"),
                ));
            }
            if let Some(expert) = pass.active.iter().flatten().find(|&&e| e >= head.experts) {
                return Err(wrong(number, format!("there is no expert {expert}")));
            }
            passes.push(pass);
        }
        Ok(Self { head, passes })
    }

    /// What each way of choosing whom to give up makes of the trace with so many slots, all alike: the
    /// policies, then a fixed set of those used most (known beforehand), then the best that is possible
    /// (knowing what comes).
    ///
    /// # Errors
    /// [`Error::Empty`].
    pub fn replay(&self, slots: usize) -> Result<Vec<Outcome>, Error> {
        let tokens: usize = self.generated().map(|pass| pass.tokens).sum();
        if tokens == 0 {
            return Err(Error::Empty);
        }
        let layers = self.head.expert_bytes.len();
        let mut outcomes = Vec::new();
        for kind in Kind::ALL {
            let mut policy = Policy::new(kind, layers, self.head.experts);
            let keep =
                |_: usize, layer: usize, active: &[usize], held: &mut HashSet<(usize, usize)>| {
                    policy.visit(layer, active);
                    let worth = |&(of, expert): &(usize, usize)| policy.worth(of, expert, layer);
                    evict(slots, layer, active, held, worth);
                };
            outcomes.push(self.run(kind.name(), tokens, keep));
        }
        outcomes.push(self.fixed(slots, tokens));
        outcomes.push(self.best(slots, tokens));
        Ok(outcomes)
    }

    /// How evenly experts were used while tokens were generated, and how often again.
    pub fn habits(&self) -> Habits {
        let experts = self.head.experts;
        let mut uses = vec![vec![0usize; experts]; self.head.expert_bytes.len()];
        let (mut seen, mut again) = (0, 0);
        let mut before: Option<&Pass> = None;
        for pass in self.generated() {
            for (layer, active) in pass.active.iter().enumerate() {
                active.iter().for_each(|&expert| uses[layer][expert] += 1);
                if let Some(before) = before {
                    let kept = before.active[layer].iter().filter(|e| active.contains(e));
                    seen += before.active[layer].len();
                    again += kept.count();
                }
            }
            before = Some(pass);
        }
        let mut by_rank = vec![0.0; experts];
        let total: usize = uses.iter().flatten().sum();
        for layer in &mut uses {
            layer.sort_unstable_by_key(|&uses| std::cmp::Reverse(uses));
            for (share, &uses) in by_rank.iter_mut().zip(&*layer) {
                *share += uses as f64 / total.max(1) as f64;
            }
        }
        Habits {
            by_rank,
            repeats: again as f64 / seen.max(1) as f64,
        }
    }

    fn generated(&self) -> impl Iterator<Item = &Pass> {
        self.passes.iter().filter(|pass| !pass.prompt)
    }

    /// Counts hits while `keep(visit, layer, active, held)` puts what a layer used into what is held, and takes
    /// out what is then too much. Prompts fill the cache and are not counted.
    fn run(
        &self,
        name: &'static str,
        tokens: usize,
        mut keep: impl FnMut(usize, usize, &[usize], &mut HashSet<(usize, usize)>),
    ) -> Outcome {
        let mut held = HashSet::new();
        let (mut needed, mut hits, mut bytes, mut visit) = (0, 0, 0, 0);
        for pass in &self.passes {
            for (layer, active) in pass.active.iter().enumerate() {
                if !pass.prompt {
                    let there = active
                        .iter()
                        .filter(|&&e| held.contains(&(layer, e)))
                        .count();
                    needed += active.len();
                    hits += there;
                    bytes += (active.len() - there) as u64 * self.head.expert_bytes[layer];
                }
                keep(visit, layer, active, &mut held);
                visit += 1;
            }
        }
        Outcome {
            name,
            hit_rate: hits as f64 / needed.max(1) as f64,
            read_bytes_per_token: bytes as f64 / tokens as f64,
        }
    }

    /// A fixed set: those that were used most.
    fn fixed(&self, slots: usize, tokens: usize) -> Outcome {
        let mut uses = std::collections::BTreeMap::new();
        for pass in self.generated() {
            for (layer, active) in pass.active.iter().enumerate() {
                for &expert in active {
                    *uses.entry((layer, expert)).or_insert(0usize) += 1;
                }
            }
        }
        let mut most: Vec<_> = uses.into_iter().collect();
        most.sort_by_key(|&(_, uses)| std::cmp::Reverse(uses));
        let set: HashSet<_> = most.into_iter().take(slots).map(|(id, _)| id).collect();
        self.run("static", tokens, |_, _, _, held| held.clone_from(&set))
    }

    /// Belady's: the one goes that is needed again last.
    fn best(&self, slots: usize, tokens: usize) -> Outcome {
        let layers = self.head.expert_bytes.len();
        // The visits that use each expert, the last first.
        let mut uses = vec![Vec::new(); layers * self.head.experts];
        for (number, pass) in self.passes.iter().enumerate().rev() {
            for (layer, active) in pass.active.iter().enumerate() {
                for &expert in active {
                    uses[layer * self.head.experts + expert].push(number * layers + layer);
                }
            }
        }
        let experts = self.head.experts;
        self.run("belady", tokens, |visit, layer, active, held| {
            for &expert in active {
                uses[layer * experts + expert].pop();
            }
            let again = |&(of, expert): &(usize, usize)| {
                let next = uses[of * experts + expert].last();
                next.map_or(f64::NEG_INFINITY, |&next| -((next - visit) as f64))
            };
            // Knowing the future, it also lets go at once what is not needed again soon.
            held.extend(active.iter().map(|&expert| (layer, expert)));
            shrink(slots, held, again);
        })
    }
}

/// Puts what a layer used into what is held, and takes out what is worth least, but nothing of that.
fn evict(
    slots: usize,
    layer: usize,
    active: &[usize],
    held: &mut HashSet<(usize, usize)>,
    worth: impl Fn(&(usize, usize)) -> f64,
) {
    let pinned = |id: &(usize, usize)| id.0 == layer && active.contains(&id.1);
    held.extend(active.iter().map(|&expert| (layer, expert)));
    shrink(slots, held, |id| match pinned(id) {
        true => f64::INFINITY,
        false => worth(id),
    });
}

fn shrink(
    slots: usize,
    held: &mut HashSet<(usize, usize)>,
    worth: impl Fn(&(usize, usize)) -> f64,
) {
    while held.len() > slots {
        // Ties in a fixed order, whatever the set's.
        let order =
            |a: &(usize, usize), b: &(usize, usize)| worth(a).total_cmp(&worth(b)).then(a.cmp(b));
        let least = held.iter().copied().min_by(order);
        held.remove(&least.expect("more than no slots are held"));
    }
}

/// What can be said of routing.
#[derive(Clone, Debug, Serialize)]
pub struct Habits {
    /// The share of uses that go to the most used expert of a layer, to the second, and so on.
    pub by_rank: Vec<f64>,
    /// The share of experts that the next pass used again.
    pub repeats: f64,
}

/// What came of a trace.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// How the expert that goes was chosen.
    pub name: &'static str,
    /// The share of needed experts that were there.
    pub hit_rate: f64,
    /// Bytes read for a token on average.
    pub read_bytes_per_token: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(passes: &[&[&[usize]]]) -> Trace {
        let layers = passes[0].len();
        let mut trace = Trace::new(Head {
            experts: 4,
            expert_bytes: vec![10; layers],
        });
        for pass in passes {
            trace.begin(1, false);
            pass.iter().for_each(|active| trace.layer(active));
        }
        trace
    }

    fn rate(trace: &Trace, slots: usize, name: &str) -> f64 {
        let outcomes = trace.replay(slots).unwrap();
        let outcome = outcomes.iter().find(|outcome| outcome.name == name);
        outcome.unwrap().hit_rate
    }

    /// Three experts in turn and two slots: LRU always gives up the one that comes next.
    #[test]
    fn a_cycle_defeats_lru_and_not_the_best() {
        let pass: &[&[usize]] = &[&[0], &[0], &[0]];
        let trace = trace(&[pass; 10]);
        assert_eq!(rate(&trace, 2, "lru"), 0.0);
        // 27 needs after the first three; with two slots one of two is there at best, one more at the end.
        let best = rate(&trace, 2, "belady");
        assert!(best > 0.4 && best < 0.7, "{best}");
        assert!(rate(&trace, 2, "next-use") > 0.25);
        assert_eq!(rate(&trace, 3, "lru"), 0.9);
    }

    #[test]
    fn nothing_beats_the_best() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 16) as usize
        };
        let mut random = Trace::new(Head {
            experts: 4,
            expert_bytes: vec![10, 20],
        });
        for _ in 0..200 {
            random.begin(1, false);
            random.layer(&[next() % 4]);
            random.layer(&[next() % 4]);
        }
        for slots in 1..8 {
            let outcomes = random.replay(slots).unwrap();
            let best = outcomes.last().unwrap().hit_rate;
            assert!(
                outcomes.iter().all(|outcome| outcome.hit_rate <= best),
                "{outcomes:?}"
            );
        }
    }

    #[test]
    fn as_text_and_back() {
        let before = trace(&[&[&[0, 3], &[1, 2]]]);
        let after = Trace::from_text(&before.to_text().unwrap()).unwrap();
        assert_eq!((after.head, after.passes), (before.head, before.passes));
    }

    #[test]
    fn what_is_no_trace_is_refused_by_line() {
        let head = r#"{"experts":4,"expert_bytes":[10]}"#;
        for (text, problem) in [
            (String::new(), "line 1: is missing"),
            ("nonsense".into(), "line 1: expected"),
            (format!("{head}\n[]"), "line 2: invalid"),
            (
                format!("{head}\n{{\"tokens\":1,\"prompt\":false,\"active\":[]}}"),
                "line 2: 0 layers",
            ),
            (
                format!("{head}\n{{\"tokens\":1,\"prompt\":false,\"active\":[[9]]}}"),
                "line 2: there is no expert 9",
            ),
        ] {
            let error = Trace::from_text(&text).unwrap_err().to_string();
            assert!(error.starts_with(problem), "{error}");
        }
    }
}
