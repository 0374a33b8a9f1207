//! A cache of fixed slots, filled from disk by a few reader threads.
//!
//! A slot holds one expert: its gate, up and down matrices. A visit of a layer first asks for all the
//! experts that it needs, pins those that are there, and queues the reads of the others, gate and up
//! before down, in pieces that several readers have in flight together. It then gives out what has
//! arrived. Where a layer needs more experts than there are slots, they come in rounds.
//!
//! What is likely to be needed next ([`Cache::guess`]) is read when nothing else is to be read: readers
//! that run dry look for it themselves, the layer that comes first before the others.

mod ahead;
mod counters;
mod visit;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use ahead::Ahead;
pub use ahead::Guess;
pub use counters::Counters;
pub use visit::Visit;

use super::Expert;
use super::memory::Memory;
use super::policy::{Kind, Policy};
use crate::plan::fit::Slots;
use crate::tensor::Extent;
use crate::tensor::direct::{self, Error, Files, Piece, READ, READERS};

/// Readers that may be busy with what is only likely.
const SUSPICIONS: usize = 2;

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
    /// Whether no more slots should be touched for the first time, where that is to be asked.
    is_short: Option<fn() -> bool>,
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
    /// What visits to come are expected to need.
    ahead: Ahead,
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

struct Slot {
    class: usize,
    /// Where it lies in the memory.
    range: Range<usize>,
    /// Whether anything was ever read into it.
    touched: bool,
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
    /// An empty cache of `slots` for experts that lie at `layers` in `files`. While `is_short` says so, it does with
    /// the slots that were used before, as far as it can.
    ///
    /// # Errors
    /// When there is no memory for the slots, or the readers cannot be started.
    pub fn new(
        files: Files,
        layers: Vec<Vec<Expert<Extent>>>,
        slots: &Slots,
        policy: Kind,
        is_short: Option<fn() -> bool>,
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
                    touched: false,
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
            is_short,
            class_of: slots.class_of.clone(),
            table: Mutex::new(Table {
                slots: table,
                place: vec![None; layers.len() * experts],
                needed: VecDeque::new(),
                likely: VecDeque::new(),
                ahead: Ahead::new(),
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

    /// The next `layer` will need all of these experts. They are read when nothing else is, and take no slot from what
    /// the present visit needs. What was expected before is forgotten, here and by the other two.
    pub fn expect(&self, layer: usize, experts: Vec<usize>) {
        let mut table = self.shared.lock();
        table.ahead.set(layer, experts);
        self.shared.expect(&mut table);
    }

    /// The layers from `first` on will probably need such experts, of each layer the most certain ones first; as
    /// many layers as [`sight`](Self::sight) says. What is not certain enough is not read, but compared.
    pub fn guess(&self, first: usize, layers: Vec<Vec<Guess>>) {
        let mut table = self.shared.lock();
        table.ahead.guess(first, layers);
        self.shared.expect(&mut table);
    }

    /// Nothing is known of what comes.
    pub fn expect_nothing(&self) {
        let mut table = self.shared.lock();
        table.ahead.clear();
        self.shared.expect(&mut table);
    }

    /// For how many layers guesses are wanted.
    pub fn sight(&self) -> usize {
        self.shared.lock().ahead.sight()
    }

    /// The experts `active` (ascending) of a layer, which the caller has to itself: there is one visit
    /// at a time.
    pub(super) fn visit<'a>(&'a self, layer: usize, active: &'a [usize]) -> Visit<'a> {
        self.shared.begin(&mut self.shared.lock(), layer, active);
        Visit::new(&self.shared, layer, active)
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
        let limit = match table.ahead.is_certain() {
            true => READERS,
            false => SUSPICIONS,
        };
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
        let there = |id: (usize, usize)| table.place[self.index(id)].is_some();
        if let Some(id) = table.ahead.next(there) {
            self.admit(table, id, true);
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
        let untouched = |slot: &Slot| slot.class == class && !slot.touched;
        let is_short = self
            .is_short
            .is_some_and(|is_short| table.slots.iter().any(untouched) && is_short());
        let idle = idle.filter(|(_, slot)| slot.touched || !likely || !is_short);
        // What is expected goes last, and not for something else that is.
        let is_expected = |slot: &Slot| slot.holds.is_some_and(|held| table.ahead.expects(held));
        let idle = idle.filter(|(_, slot)| !likely || !is_expected(slot));
        let worth = |slot: &Slot| match slot.holds {
            None if is_short && !slot.touched => f64::INFINITY,
            None => f64::NEG_INFINITY,
            Some(_) if is_expected(slot) => f64::MAX,
            Some((layer, expert)) => table.policy.worth(layer, expert, table.visited),
        };
        let (index, _) = idle.min_by(|(_, a), (_, b)| worth(a).total_cmp(&worth(b)))?;
        let slot = &mut table.slots[index];
        if let Some(held) = slot.holds.replace(expert) {
            table.place[self.index(held)] = None;
        }
        slot.unused = 0;
        slot.touched = true;
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

    /// Something else is expected now.
    fn expect(&self, table: &mut Table) {
        // What the visit that has begun needs of what is on its way, it has not claimed yet.
        let visited = table.visited;
        self.give_up(table, |(layer, _)| layer == visited);
        // Readers that are idle begin at once.
        self.to_read.notify_all();
    }

    /// A visit begins: what was expected is compared with what is needed, and what is not needed is not read any
    /// further.
    fn begin(&self, table: &mut Table, layer: usize, active: &[usize]) {
        table.policy.visit(layer, active);
        table.visited = layer;
        table.settled = false;
        let (guessed, right) = table.ahead.compare(layer, active);
        table.counters.expected += guessed as u64;
        table.counters.expected_right += right as u64;
        self.give_up(table, |(of, expert)| {
            of == layer && active.contains(&expert)
        });
    }

    /// What is neither `needed` nor expected any more is not read any further.
    fn give_up(&self, table: &mut Table, needed: impl Fn((usize, usize)) -> bool) {
        let reads = std::mem::take(&mut table.likely).into_iter();
        let (likely, gone): (VecDeque<_>, VecDeque<_>) = reads.partition(|read| {
            let held = table.slots[read.slot].holds;
            held.is_some_and(|held| needed(held) || table.ahead.expects(held))
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

#[cfg(all(test, target_os = "linux"))]
mod tests;
