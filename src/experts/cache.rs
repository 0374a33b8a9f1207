//! A cache of fixed slots, filled from disk by a few reader threads.
//!
//! A slot holds one expert: its gate, up and down matrices. A visit of a layer first asks for all the
//! experts that it needs, pins those that are there, and queues the reads of the others, gate and up
//! before down, in pieces that several readers have in flight together. It then gives out what has
//! arrived. Where a layer needs more experts than there are slots, they come in rounds.
//!
//! What is likely to be needed next ([`Cache::expect`]) is read when nothing else is to be read: readers
//! that run dry look for it themselves, the layer that comes first before the others.

use std::collections::VecDeque;
use std::io;
use std::ops::{Add, Range, Sub};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::memory::Memory;
use super::policy::{Kind, Policy};
use super::{Expert, Portion};
use crate::plan::fit::Slots;
use crate::tensor::Extent;
use crate::tensor::direct::{self, Error, Files, Piece, READ, READERS};

/// Readers that may be busy with what is only likely.
const SUSPICIONS: usize = 2;

/// What a cache has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Experts that layers needed.
    pub needed: u64,
    /// Of those, the ones that were there.
    pub hits: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Time that computation waited for the disk.
    pub waited: Duration,
    /// Time that something was being read.
    pub busy: Duration,
    /// Bytes read for experts that were not used before they went, or have not been yet.
    pub unused_bytes: u64,
    /// Experts that were expected of a layer before it was visited.
    pub expected: u64,
    /// Of those, the ones that were then needed.
    pub expected_right: u64,
}

impl Counters {
    /// The share of needed experts that were there; `None` where none was needed.
    pub fn hit_rate(&self) -> Option<f64> {
        (self.needed > 0).then(|| self.hits as f64 / self.needed as f64)
    }

    /// The share of expected experts that were needed; `None` where none was expected.
    pub fn accuracy(&self) -> Option<f64> {
        (self.expected > 0).then(|| self.expected_right as f64 / self.expected as f64)
    }
}

impl Add for Counters {
    type Output = Self;

    /// What was done here and there.
    fn add(self, other: Self) -> Self {
        Self {
            needed: self.needed + other.needed,
            hits: self.hits + other.hits,
            read_bytes: self.read_bytes + other.read_bytes,
            waited: self.waited + other.waited,
            busy: self.busy + other.busy,
            unused_bytes: self.unused_bytes + other.unused_bytes,
            expected: self.expected + other.expected,
            expected_right: self.expected_right + other.expected_right,
        }
    }
}

impl Sub for Counters {
    type Output = Self;

    /// What was done since `before`.
    fn sub(self, before: Self) -> Self {
        Self {
            needed: self.needed - before.needed,
            hits: self.hits - before.hits,
            read_bytes: self.read_bytes - before.read_bytes,
            waited: self.waited - before.waited,
            busy: self.busy - before.busy,
            unused_bytes: self.unused_bytes.saturating_sub(before.unused_bytes),
            expected: self.expected - before.expected,
            expected_right: self.expected_right - before.expected_right,
        }
    }
}

/// Experts in slots.
pub struct Cache {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

struct Shared {
    files: Files,
    layers: Vec<Vec<Expert<Extent>>>,
    /// Class of the slots that take a layer's experts.
    class_of: Vec<usize>,
    /// Which thread may touch which part of it, the table says.
    memory: Memory,
    table: Mutex<Table>,
    /// There is something to read, or nothing any more.
    to_read: Condvar,
    /// Something has been read, or cannot be.
    arrived: Condvar,
}

/// Who has which slot, and what is to be read. A slot's memory is written by the reader of a piece
/// while `missing` counts that piece, and read by a visit that has pinned it, part by part, after
/// `missing` of the part has come to 0. It gets another expert only when it is not pinned and
/// nothing of it is missing. All of this changes under the one lock.
struct Table {
    slots: Vec<Slot>,
    /// The slot of each expert, `[layers][experts]`.
    place: Vec<Option<usize>>,
    /// Reads that a visit waits for, in their order.
    needed: VecDeque<Read>,
    /// Reads for later.
    likely: VecDeque<Read>,
    /// What visits to come are expected to need, the next one first.
    expected: VecDeque<Expected>,
    /// The layer that is visited, or was last.
    visited: usize,
    /// Whether every expert of the visit has a slot, so that what is expected may take others.
    settled: bool,
    /// Readers at work, and since when there is one.
    reading: usize,
    reading_since: Instant,
    /// Of those, the ones at work on what is likely.
    suspicions: usize,
    policy: Policy,
    counters: Counters,
    failure: Option<Error>,
    stop: bool,
}

/// What a visit is expected to need.
struct Expected {
    layer: usize,
    experts: Vec<usize>,
    /// How many of them have been seen to.
    done: usize,
    /// Whether it is certain.
    certain: bool,
}

struct Slot {
    class: usize,
    /// Where it lies in the memory.
    range: Range<usize>,
    /// Layer and expert.
    holds: Option<(usize, usize)>,
    /// Reads of each part that have not arrived.
    missing: [usize; 3],
    pinned: bool,
    /// Bytes read since it got what it holds, until a visit uses that.
    unused: u64,
    /// What it holds is not whole and will not be.
    broken: bool,
}

impl Slot {
    fn is_idle(&self) -> bool {
        !self.pinned && self.missing == [0; 3]
    }
}

/// A piece of a part of an expert on its way to a slot.
#[derive(Clone)]
struct Read {
    slot: usize,
    part: usize,
    piece: Piece,
    /// Where in the memory it goes.
    start: usize,
}

impl Cache {
    /// An empty cache of `slots` for experts that lie at `layers` in `files`.
    ///
    /// # Errors
    /// When there is no memory for the slots, or the readers cannot be started.
    pub fn new(
        files: Files,
        layers: Vec<Vec<Expert<Extent>>>,
        slots: &Slots,
        policy: Kind,
    ) -> io::Result<Self> {
        let experts = layers.first().map_or(0, Vec::len);
        let mut table = Vec::new();
        let mut start = 0;
        for (class, of_class) in slots.classes.iter().enumerate() {
            for _ in 0..of_class.slots {
                let range = start..start + of_class.slot_bytes as usize;
                start = range.end;
                table.push(Slot {
                    class,
                    range,
                    holds: None,
                    missing: [0; 3],
                    pinned: false,
                    unused: 0,
                    broken: false,
                });
            }
        }
        let shared = Arc::new(Shared {
            files,
            memory: Memory::new(start)?,
            class_of: slots.class_of.clone(),
            table: Mutex::new(Table {
                slots: table,
                place: vec![None; layers.len() * experts],
                needed: VecDeque::new(),
                likely: VecDeque::new(),
                expected: VecDeque::new(),
                visited: 0,
                settled: false,
                reading: 0,
                reading_since: Instant::now(),
                suspicions: 0,
                policy: Policy::new(policy, layers.len(), experts),
                counters: Counters::default(),
                failure: None,
                stop: false,
            }),
            layers,
            to_read: Condvar::new(),
            arrived: Condvar::new(),
        });
        let mut cache = Self {
            shared,
            readers: Vec::new(),
        };
        for index in 0..READERS {
            let shared = Arc::clone(&cache.shared);
            let reader = thread::Builder::new().name(format!("fewbit-read-{index}"));
            // Where one fails, dropping the cache ends those before it.
            cache.readers.push(reader.spawn(move || shared.read())?);
        }
        Ok(cache)
    }

    /// Where each layer's experts lie.
    pub fn layers(&self) -> &[Vec<Expert<Extent>>] {
        &self.shared.layers
    }

    /// What the cache has done so far.
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters
    }

    /// Why reads go through the page cache; `None` where they do not.
    pub fn buffered_because(&self) -> Option<&str> {
        self.shared.files.buffered_because()
    }

    /// The experts of a layer that have a slot, those on their way to one included.
    pub fn present(&self, layer: usize) -> Vec<bool> {
        let table = self.shared.lock();
        let experts = self.shared.layers[layer].len();
        let sound = |slot: usize| !table.slots[slot].broken;
        let places = &table.place[layer * experts..][..experts];
        places
            .iter()
            .map(|place| place.is_some_and(sound))
            .collect()
    }

    /// Layers to come will need such experts, the next one first: for certain, or probably. What was
    /// expected before is forgotten. They are read when nothing else is, and take no slot from what the
    /// present visit needs.
    pub fn expect(&self, layers: impl IntoIterator<Item = (usize, Vec<usize>)>, certain: bool) {
        let mut table = self.shared.lock();
        let expected = layers.into_iter().map(|(layer, experts)| Expected {
            layer,
            experts,
            done: 0,
            certain,
        });
        table.expected = expected.collect();
        // What the visit that has begun needs of what is on its way, it has not claimed yet.
        let visited = table.visited;
        self.shared
            .give_up(&mut table, |(layer, _)| layer == visited);
        // Readers that are idle begin at once.
        self.shared.to_read.notify_all();
    }

    /// The experts `active` (ascending) of a layer, which the caller has to itself: there is one visit
    /// at a time.
    pub(super) fn visit<'a>(&'a self, layer: usize, active: &'a [usize]) -> Visit<'a> {
        let mut table = self.shared.lock();
        table.policy.visit(layer, active);
        table.visited = layer;
        table.settled = false;
        self.shared.compare(&mut table, layer, active);
        Visit {
            shared: &self.shared,
            layer,
            active,
            stages: vec![Stage::Outside; active.len()],
            given: 0,
            next: 0,
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.to_read.notify_all();
        for reader in self.readers.drain(..) {
            // A reader that panicked has said so; there is nothing to add.
            let _ = reader.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a reader does until the cache is gone.
    fn read(&self) {
        let mut buffer = direct::memory(READ).ok();
        let mut table = self.lock();
        loop {
            if table.stop {
                return;
            }
            let Some((read, is_likely)) = self.next_read(&mut table) else {
                let woken = self.to_read.wait(table);
                table = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            table.suspicions += usize::from(is_likely);
            if table.reading == 0 {
                table.reading_since = Instant::now();
            }
            table.reading += 1;
            drop(table);
            let range = read.start..read.start + read.piece.len;
            let is_large = self.memory.is_large(&range);
            // SAFETY: the range is this read's until `missing` no longer counts it.
            let place = unsafe { self.memory.write(range) };
            let result = match &mut buffer {
                Some(buffer) if !is_large => {
                    let result = self.files.read(read.piece, buffer);
                    place.copy_from_slice(&buffer[..place.len()]);
                    result
                }
                _ => self.files.read(read.piece, place),
            };

            table = self.lock();
            table.suspicions -= usize::from(is_likely);
            table.reading -= 1;
            if table.reading == 0 {
                let busy = table.reading_since.elapsed();
                table.counters.busy += busy;
            }
            table.counters.read_bytes += read.piece.len as u64;
            table.counters.unused_bytes += read.piece.len as u64;
            table.slots[read.slot].unused += read.piece.len as u64;
            if let Err(error) = result {
                table.failure.get_or_insert(error);
                table.slots[read.slot].broken = true;
            }
            table.arrive(read.slot, read.part, self.experts());
            self.arrived.notify_all();
            if is_likely {
                // Another one may now begin.
                self.to_read.notify_one();
            }
        }
    }

    /// What a reader is to read now, and whether it is only likely to be needed.
    fn next_read(&self, table: &mut Table) -> Option<(Read, bool)> {
        if let Some(read) = table.needed.pop_front() {
            return Some((read, false));
        }
        let certain = table.expected.front().is_some_and(|next| next.certain);
        let limit = if certain { READERS } else { SUSPICIONS };
        if table.suspicions >= limit {
            return None;
        }
        if table.likely.is_empty() {
            self.admit_expected(table);
        }
        table.likely.pop_front().map(|read| (read, true))
    }

    /// Gives the first expected expert that has no slot one, if one can be had.
    fn admit_expected(&self, table: &mut Table) {
        if !table.settled {
            return;
        }
        for index in 0..table.expected.len() {
            let next = &mut table.expected[index];
            while let Some(&expert) = next.experts.get(next.done) {
                let id = (next.layer, expert);
                if table.place[self.index(id)].is_some() {
                    next.done += 1;
                } else if self.admit(table, id, true).is_some() {
                    table.expected[index].done += 1;
                    return;
                } else {
                    return;
                }
            }
        }
    }

    fn experts(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    /// Where an expert stands in tables of all of them.
    fn index(&self, (layer, expert): (usize, usize)) -> usize {
        layer * self.experts() + expert
    }

    /// Gives an expert a slot, if one can be had, and queues its reads.
    fn admit(&self, table: &mut Table, expert: (usize, usize), likely: bool) -> Option<usize> {
        let class = self.class_of[expert.0];
        let slots = table.slots.iter().enumerate();
        let idle = slots.filter(|(_, slot)| slot.class == class && slot.is_idle());
        // What is expected goes last, and not for something else that is.
        let is_expected = |slot: &Slot| slot.holds.is_some_and(|held| table.expects(held));
        let idle = idle.filter(|(_, slot)| !likely || !is_expected(slot));
        let worth = |slot: &Slot| match slot.holds {
            None => f64::NEG_INFINITY,
            Some(_) if is_expected(slot) => f64::INFINITY,
            Some((layer, expert)) => table.policy.worth(layer, expert, table.visited),
        };
        let (index, _) = idle.min_by(|(_, a), (_, b)| worth(a).total_cmp(&worth(b)))?;
        let slot = &mut table.slots[index];
        if let Some(held) = slot.holds.replace(expert) {
            table.place[self.index(held)] = None;
        }
        slot.unused = 0;
        table.place[self.index(expert)] = Some(index);
        let mut start = slot.range.start;
        for (part, extent) in self.layers[expert.0][expert.1]
            .parts()
            .into_iter()
            .enumerate()
        {
            let whole = piece(extent);
            debug_assert!(start + whole.len <= slot.range.end, "the slot is too small");
            for piece in whole.cut(READ) {
                let start = start + (piece.offset - whole.offset) as usize;
                slot.missing[part] += 1;
                let read = Read {
                    slot: index,
                    part,
                    piece,
                    start,
                };
                match likely {
                    true => table.likely.push_back(read),
                    false => table.needed.push_back(read),
                }
            }
            start += whole.len;
        }
        self.to_read.notify_all();
        Some(index)
    }

    /// A layer is visited: what was expected is compared with what is needed, and what is not needed is
    /// not read any further.
    fn compare(&self, table: &mut Table, layer: usize, active: &[usize]) {
        // What is expected of other layers stays so.
        while let Some(index) = table.expected.iter().position(|next| next.layer == layer) {
            let expected = table.expected.remove(index).expect("it is there");
            if !expected.certain {
                let right = expected.experts.iter().filter(|e| active.contains(e));
                table.counters.expected_right += right.count() as u64;
                table.counters.expected += expected.experts.len() as u64;
            }
        }
        self.give_up(table, |(of, expert)| {
            of == layer && active.contains(&expert)
        });
    }

    /// What is neither `needed` nor expected any more is not read any further.
    fn give_up(&self, table: &mut Table, needed: impl Fn((usize, usize)) -> bool) {
        let reads = std::mem::take(&mut table.likely).into_iter();
        let (likely, gone): (VecDeque<_>, VecDeque<_>) = reads.partition(|read| {
            let held = table.slots[read.slot].holds;
            held.is_some_and(|held| needed(held) || table.expects(held))
        });
        table.likely = likely;
        for read in gone {
            table.slots[read.slot].broken = true;
            table.arrive(read.slot, read.part, self.experts());
        }
    }

    /// The rows of a part of the expert in a slot.
    ///
    /// # Safety
    /// The slot is pinned while the result is alive, and the part has arrived.
    unsafe fn rows(&self, slot: &Slot, part: usize) -> crate::tensor::Rows<'_> {
        let (layer, expert) = slot.holds.expect("a pinned slot holds an expert");
        let parts = self.layers[layer][expert].parts();
        let before: usize = parts[..part].iter().map(|part| piece(part).len).sum();
        let inside = (parts[part].offset - piece(parts[part]).offset) as usize;
        let start = slot.range.start + before + inside;
        // SAFETY: as the caller promises, nobody writes it.
        parts[part].rows_in(unsafe { self.memory.read(start..start + parts[part].bytes()) })
    }
}

/// What must be read for a matrix.
fn piece(extent: &Extent) -> Piece {
    Piece::around(extent.file, extent.offset, extent.bytes() as u64)
}

impl Table {
    fn expects(&self, (layer, expert): (usize, usize)) -> bool {
        let mut expected = self.expected.iter();
        expected.any(|next| next.layer == layer && next.experts.contains(&expert))
    }

    /// A read of a part of a slot is over, or will not be made.
    fn arrive(&mut self, slot: usize, part: usize, experts: usize) {
        let slot = &mut self.slots[slot];
        slot.missing[part] -= 1;
        if slot.broken && slot.missing == [0; 3] {
            slot.broken = false;
            if let Some((layer, expert)) = slot.holds.take() {
                self.place[layer * experts + expert] = None;
            }
        }
    }
}

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

/// A layer's active experts on their way: see [`super::Visit`].
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

impl Visit<'_> {
    /// See [`super::Visit::portion`].
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::plan::fit::Class;
    use crate::quant::BlockType;

    /// Experts of three parts of 8 KiB, one after the other, and two slots for them.
    fn experts(layers: u64, experts: u64) -> (Vec<Vec<Expert<Extent>>>, Slots) {
        let extent = |index: u64| Extent {
            kind: BlockType::F32,
            rows: 8,
            cols: 256,
            stride: 1024,
            file: 0,
            offset: index * 8192,
        };
        let expert = |index: u64| Expert {
            gate: extent(3 * index),
            up: extent(3 * index + 1),
            down: extent(3 * index + 2),
        };
        let layer = |layer: u64| (0..experts).map(|e| expert(layer * experts + e)).collect();
        let slots = Slots {
            classes: vec![Class {
                slot_bytes: 3 * (8192 + 4096),
                expert_bytes: 3 * 8192,
                experts: (layers * experts) as usize,
                slots: 2,
            }],
            class_of: vec![0; layers as usize],
        };
        ((0..layers).map(layer).collect(), slots)
    }

    /// What was read ahead for a visit is not given up to what else the visit needs, however little it is worth.
    #[test]
    fn what_is_there_stays_while_the_rest_is_fetched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, vec![1; 64 * 8192]).unwrap();
        let (layers, mut slots) = experts(2, 4);
        slots.classes[0].slots = 3;
        let files = Files::buffered(path);
        let cache = Cache::new(files, layers, &slots, Kind::default()).unwrap();
        let visit = |layer: usize, active: &[usize]| {
            let mut visit = cache.visit(layer, active);
            while visit.portion().unwrap().is_some() {}
        };
        for _ in 0..8 {
            visit(0, &[0]);
            visit(1, &[0]);
        }
        visit(0, &[2]);
        let before = cache.counters();
        // There is one slot for expert 1, and expert 2 of the same layer would be the first to go.
        visit(0, &[1, 2]);
        let done = cache.counters() - before;
        assert_eq!((done.needed, done.hits), (2, 1));
    }

    /// Readers that fail end a visit with an error, again and again, and the cache can be dropped.
    #[test]
    fn a_disk_that_fails_ends_the_visit_with_an_error() {
        let (layers, slots) = experts(2, 2);
        let cache = Cache::new(Files::failing(), layers, &slots, Kind::default()).unwrap();
        for layer in [0, 1, 0] {
            cache.expect([((layer + 1) % 2, vec![0, 1])], false);
            let mut visit = cache.visit(layer, &[0, 1]);
            let error = loop {
                match visit.portion() {
                    Ok(portion) => assert!(portion.is_some(), "nothing can have been read"),
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, Error::Read { .. }), "{error}");
        }
        assert_eq!(cache.counters().hits, 0);
    }
}
