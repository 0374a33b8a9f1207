//! A cache of fixed slots, filled from disk by a few reader threads.
//!
//! A slot holds one expert: its gate, up and down matrices. A visit of a layer first asks for all the
//! experts that it needs, pins those that are there, and queues the reads of the others, gate and up
//! before down, in pieces that several readers have in flight together. It then gives out what has
//! arrived. Where a layer needs more experts than there are slots, they come in rounds.
//!
//! What is likely to be needed next ([`Cache::expect`]) is read when nothing else is to be read.

use std::collections::VecDeque;
use std::io;
use std::ops::{Range, Sub};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::policy::{Kind, Policy};
use super::{Expert, Portion};
use crate::plan::fit::Slots;
use crate::tensor::Extent;
use crate::tensor::direct::{Error, Files, Piece, READ, READERS};

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

impl Sub for Counters {
    type Output = Self;

    /// What was done since `before`.
    fn sub(self, before: Self) -> Self {
        Self {
            needed: self.needed - before.needed,
            hits: self.hits - before.hits,
            read_bytes: self.read_bytes - before.read_bytes,
            waited: self.waited - before.waited,
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
    memory: Memory,
    table: Mutex<Table>,
    /// There is something to read, or nothing any more.
    to_read: Condvar,
    /// Something has been read, or cannot be.
    arrived: Condvar,
}

/// The slots' memory. Which thread may touch which part of it, [`Table`] says.
struct Memory {
    map: MmapMut,
    start: *mut u8,
}

// SAFETY: `start` points into `map`, which lives as long. Its bytes are handed out by `read` and
// `write` alone, whose callers keep them apart.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> io::Result<Self> {
        let mut map = MmapMut::map_anon(bytes.max(1))?;
        // Reads into large pages need fewer of them pinned, and rows in them fewer translations.
        // Where the system has none, all works as well.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr();
        Ok(Self { map, start })
    }

    /// # Safety
    /// Nobody writes the range while the result is alive.
    unsafe fn read(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.map.len());
        // SAFETY: inside the mapping; not written, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    /// # Safety
    /// Nobody else has the range while the result is alive.
    #[allow(clippy::mut_from_ref)] // disjointness is the caller's contract
    unsafe fn write(&self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.map.len());
        // SAFETY: inside the mapping; exclusive, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
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
    /// What the next visit is expected to need.
    expected: Expected,
    /// Readers at work on what is likely.
    suspicions: usize,
    policy: Policy,
    counters: Counters,
    failure: Option<Error>,
    stop: bool,
}

/// What a visit is expected to need.
#[derive(Default)]
struct Expected {
    layer: usize,
    experts: Vec<usize>,
    /// How many of them have been seen to.
    done: usize,
    /// Whether it is certain.
    certain: bool,
}

impl Expected {
    fn has(&self, (layer, expert): (usize, usize)) -> bool {
        self.layer == layer && self.experts.contains(&expert)
    }
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
                expected: Expected::default(),
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

    /// The layer will need `experts`: for certain, or probably. They are read when nothing else is,
    /// and take no slot from what the present visit needs.
    pub fn expect(&self, layer: usize, experts: &[usize], certain: bool) {
        let mut table = self.shared.lock();
        table.expected = Expected {
            layer,
            experts: experts.to_vec(),
            done: 0,
            certain,
        };
        if !certain {
            table.counters.expected += experts.len() as u64;
        }
    }

    /// The experts `active` (ascending) of a layer, which the caller has to itself: there is one visit
    /// at a time.
    pub(super) fn visit<'a>(&'a self, layer: usize, active: &'a [usize]) -> Visit<'a> {
        let mut table = self.shared.lock();
        table.policy.visit(layer, active.iter().copied());
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
        let mut table = self.lock();
        loop {
            if table.stop {
                return;
            }
            let limit = if table.expected.certain {
                READERS
            } else {
                SUSPICIONS
            };
            let (read, is_likely) = match table.needed.pop_front() {
                Some(read) => (read, false),
                None if table.suspicions < limit && !table.likely.is_empty() => {
                    (table.likely.pop_front().expect("there is one"), true)
                }
                None => {
                    let woken = self.to_read.wait(table);
                    table = woken.unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            table.suspicions += usize::from(is_likely);
            drop(table);
            let range = read.start..read.start + read.piece.len;
            // SAFETY: the range is this read's until `missing` no longer counts it.
            let buffer = unsafe { self.memory.write(range) };
            let result = self.files.read(read.piece, buffer);

            table = self.lock();
            table.suspicions -= usize::from(is_likely);
            table.counters.read_bytes += read.piece.len as u64;
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

    fn experts(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    /// Gives an expert a slot, if one can be had, and queues its reads.
    fn admit(
        &self,
        table: &mut Table,
        expert: (usize, usize),
        visited: usize,
        likely: bool,
    ) -> Option<usize> {
        let class = self.class_of[expert.0];
        let slots = table.slots.iter().enumerate();
        let idle = slots.filter(|(_, slot)| slot.class == class && slot.is_idle());
        // What is expected goes last, and not for something else that is.
        let is_expected = |slot: &Slot| slot.holds.is_some_and(|held| table.expected.has(held));
        let idle = idle.filter(|(_, slot)| !likely || !is_expected(slot));
        let worth = |slot: &Slot| match slot.holds {
            None => f64::NEG_INFINITY,
            Some(_) if is_expected(slot) => f64::INFINITY,
            Some((layer, expert)) => table.policy.worth(layer, expert, visited),
        };
        let (index, _) = idle.min_by(|(_, a), (_, b)| worth(a).total_cmp(&worth(b)))?;
        let experts = self.experts();
        let slot = &mut table.slots[index];
        if let Some((layer, expert)) = slot.holds.replace(expert) {
            table.place[layer * experts + expert] = None;
        }
        table.place[expert.0 * experts + expert.1] = Some(index);
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
        // What is expected of another layer stays so.
        if table.expected.layer == layer {
            let expected = std::mem::take(&mut table.expected);
            if !expected.certain {
                let right = expected.experts.iter().filter(|e| active.contains(e));
                table.counters.expected_right += right.count() as u64;
            }
        }
        let slots = &mut table.slots;
        let mut gone = Vec::new();
        table.likely.retain(|read| {
            let wrong = slots[read.slot]
                .holds
                .is_some_and(|(of, expert)| of == layer && !active.contains(&expert));
            if wrong {
                gone.push((read.slot, read.part));
            }
            !wrong
        });
        for (slot, part) in gone {
            table.slots[slot].broken = true;
            table.arrive(slot, part, self.experts());
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

    /// Pins what is there, and queues what is not, as far as there are slots; then what is expected.
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
        for index in self.given..end {
            if self.stages[index] != Stage::Outside {
                continue;
            }
            let expert = self.active[index];
            let found = table.place[self.layer * experts + expert];
            let slot = match found {
                // It was given up, and the last of its reads is not over.
                Some(slot) if table.slots[slot].broken => return,
                Some(slot) => {
                    let whole = table.slots[slot].missing == [0; 3];
                    table.counters.hits += u64::from(whole);
                    // What was read on suspicion is now needed.
                    let (own, others) = std::mem::take(&mut table.likely)
                        .into_iter()
                        .partition(|read| read.slot == slot);
                    table.likely = others;
                    let own: VecDeque<_> = own;
                    if !own.is_empty() {
                        table.needed.extend(own);
                        self.shared.to_read.notify_all();
                    }
                    slot
                }
                None => {
                    let id = (self.layer, expert);
                    match self.shared.admit(table, id, self.layer, false) {
                        Some(slot) => slot,
                        None => return,
                    }
                }
            };
            table.counters.needed += 1;
            table.slots[slot].pinned = true;
            self.stages[index] = Stage::Inside(slot);
        }
        if end < self.active.len() {
            return;
        }
        // What is only probable waits until the disk has nothing else to do.
        if !table.expected.certain && !table.needed.is_empty() {
            return;
        }
        while let Some(&expert) = table.expected.experts.get(table.expected.done) {
            let id = (table.expected.layer, expert);
            let there = table.place[id.0 * experts + expert].is_some();
            if !there && self.shared.admit(table, id, self.layer, true).is_none() {
                return;
            }
            table.expected.done += 1;
        }
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
