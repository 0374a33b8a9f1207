//! A layer's active experts on their way: pinned, waited for, given out.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::Instant;

use super::{Shared, Table};
use crate::experts::Portion;
use crate::tensor::direct::Error;

/// How far a visit has come with an expert.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It has no slot yet.
    Outside,
    /// It has a slot, pinned.
    Inside(usize),
    /// Gate and up were given out.
    Gated(usize),
}

/// A layer's active experts on their way: see [`crate::experts::Visit`].
pub struct Visit<'a> {
    shared: &'a Shared,
    layer: usize,
    active: &'a [usize],
    stages: Vec<Stage>,
    /// The first expert whose slot is still pinned.
    given: usize,
    /// The first expert whose down rows were not given out.
    next: usize,
}

impl<'a> Visit<'a> {
    /// A visit that has begun.
    pub(super) fn new(shared: &'a Shared, layer: usize, active: &'a [usize]) -> Self {
        Self {
            shared,
            layer,
            active,
            stages: vec![Stage::Outside; active.len()],
            given: 0,
            next: 0,
        }
    }
}

impl Visit<'_> {
    /// See [`crate::experts::Visit::portion`].
    ///
    /// # Errors
    /// When an expert cannot be read.
    pub fn portion(&mut self) -> Result<Option<Portion<'_>>, Error> {
        let mut table = self.shared.lock();
        for stage in &self.stages[self.given..self.next] {
            if let Stage::Gated(slot) = *stage {
                table.slots[slot].pinned = false;
                let used = std::mem::take(&mut table.slots[slot].unused);
                table.counters.unused_bytes -= used;
            }
        }
        self.given = self.next;
        loop {
            if let Some(error) = table.failure.take() {
                return Err(error);
            }
            if self.given == self.active.len() {
                return Ok(None);
            }
            self.admit(&mut table);
            if self.can_go_on(&table) {
                return Ok(Some(self.gather(&table)));
            }
            let start = Instant::now();
            let woken = self.shared.arrived.wait(table);
            table = woken.unwrap_or_else(PoisonError::into_inner);
            table.counters.waited += start.elapsed();
        }
    }

    /// Pins what is there, and queues what is not, as far as there are slots.
    fn admit(&mut self, table: &mut Table) {
        let experts = self.shared.experts();
        // Those in the window are pinned, so that it must not be larger than the slots: an expert that
        // comes first could not get one.
        let class = self.shared.class_of[self.layer];
        let window = table
            .slots
            .iter()
            .filter(|slot| slot.class == class)
            .count();
        let end = self.active.len().min(self.given + window);
        // First those that are there: what the others take must not be theirs.
        for index in self.given..end {
            let place = table.place[self.layer * experts + self.active[index]];
            let sound = place.filter(|&slot| !table.slots[slot].broken);
            let (Stage::Outside, Some(slot)) = (self.stages[index], sound) else {
                continue;
            };
            table.counters.hits += u64::from(table.slots[slot].missing == [0; 3]);
            // What was read on suspicion is now needed.
            let (own, others): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut table.likely)
                .into_iter()
                .partition(|read| read.slot == slot);
            table.likely = others;
            if !own.is_empty() {
                table.needed.extend(own);
                self.shared.to_read.notify_all();
            }
            self.pin(table, index, slot);
        }
        for index in self.given..end {
            if self.stages[index] != Stage::Outside {
                continue;
            }
            let id = (self.layer, self.active[index]);
            // It was given up, and the last of its reads is not over; or no slot is idle.
            let is_broken = table.place[self.layer * experts + id.1].is_some();
            let slot = match is_broken {
                true => None,
                false => self.shared.admit(table, id, false),
            };
            let Some(slot) = slot else { return };
            self.pin(table, index, slot);
        }
        if end == self.active.len() && !table.settled {
            table.settled = true;
            self.shared.to_read.notify_all();
        }
    }

    fn pin(&mut self, table: &mut Table, index: usize, slot: usize) {
        table.counters.needed += 1;
        table.slots[slot].pinned = true;
        self.stages[index] = Stage::Inside(slot);
    }

    /// Whether anything can be computed.
    fn can_go_on(&self, table: &Table) -> bool {
        let missing = |slot: usize| table.slots[slot].missing;
        let gated = self
            .stages
            .iter()
            .any(|stage| matches!(*stage, Stage::Inside(slot) if missing(slot)[..2] == [0; 2]));
        gated || matches!(self.stages[self.next], Stage::Gated(slot) if missing(slot)[2] == 0)
    }

    /// What can be computed.
    fn gather(&mut self, table: &Table) -> Portion<'_> {
        let mut portion = Portion::default();
        for (&expert, stage) in self.active.iter().zip(&mut self.stages).skip(self.next) {
            let Stage::Inside(index) = *stage else {
                continue;
            };
            let slot = &table.slots[index];
            if slot.missing[0] + slot.missing[1] > 0 {
                continue;
            }
            // SAFETY: pinned until `portion` is called again at least, which ends the borrow; arrived.
            let (gate, up) = unsafe { (self.shared.rows(slot, 0), self.shared.rows(slot, 1)) };
            portion.gates.push((expert, gate, up));
            *stage = Stage::Gated(index);
        }
        while let Some(&Stage::Gated(index)) = self.stages.get(self.next) {
            let slot = &table.slots[index];
            if slot.missing[2] > 0 {
                break;
            }
            // SAFETY: as above; it stays pinned while `given` is behind `next`.
            let down = unsafe { self.shared.rows(slot, 2) };
            portion.downs.push((self.active[self.next], down));
            self.next += 1;
        }
        portion
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let mut table = self.shared.lock();
        for stage in &self.stages[self.given..] {
            if let Stage::Inside(slot) | Stage::Gated(slot) = *stage {
                table.slots[slot].pinned = false;
            }
        }
    }
}
