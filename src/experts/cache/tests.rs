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
    let cache = Cache::new(files, layers, &slots, Kind::default(), None).unwrap();
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
    let cache = Cache::new(Files::failing(), layers, &slots, Kind::default(), None).unwrap();
    for layer in [0, 1, 0] {
        let guess = |expert| Guess { expert, rank: 0 };
        cache.guess((layer + 1) % 2, vec![vec![guess(0), guess(1)]]);
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

/// Experts that have reads which nobody has begun, with how many there are.
fn on_their_way(table: &Table) -> Vec<(usize, usize)> {
    let reads = table.likely.iter().chain(&table.needed);
    let held = reads.map(|read| table.slots[read.slot].holds.expect("it is being read"));
    let mut held: Vec<_> = held.collect();
    held.dedup();
    held
}

/// A layer is visited while what was guessed of it is on its way: what it needs of that stays so when later layers
/// are guessed, before the visit claims it; what it does not need is not read any further.
#[test]
fn what_is_on_its_way_for_the_visit_is_not_given_up_for_later_layers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    std::fs::write(&path, vec![1; 64 * 8192]).unwrap();
    let (layers, mut slots) = experts(2, 4);
    slots.classes[0].slots = 5;
    let cache = Cache::new(Files::buffered(path), layers, &slots, Kind::default(), None).unwrap();
    let guess = |expert| Guess { expert, rank: 0 };
    let shared = &cache.shared;
    {
        // No reader gets to work while the table is held.
        let mut table = shared.lock();
        table.ahead.guess(0, vec![vec![guess(1), guess(2)]]);
        for expert in [1, 2] {
            shared.admit(&mut table, (0, expert), true).unwrap();
        }
        assert_eq!(on_their_way(&table), [(0, 1), (0, 2)]);
        shared.begin(&mut table, 0, &[1, 3]);
        assert_eq!(on_their_way(&table), [(0, 1)]);
        table.ahead.guess(1, vec![vec![guess(0)]]);
        shared.expect(&mut table);
        assert_eq!(on_their_way(&table), [(0, 1)]);
        assert!(table.place[1].is_some() && table.place[2].is_none());
    }
    let mut visit = Visit::new(shared, 0, &[1, 3]);
    while visit.portion().unwrap().is_some() {}
    drop(visit);
    let read = |counters: Counters| counters.read_bytes - counters.unused_bytes;
    // Each of the two was read once, 8 KiB a part.
    assert_eq!(read(cache.counters()), 2 * 3 * 8192);
    assert_eq!(cache.counters().expected_right, 1);
}

/// Where memory has become short since the plan was made, slots that were never used stay so, as far as a visit can do
/// without them.
#[test]
fn no_more_memory_is_taken_than_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    std::fs::write(&path, vec![1; 64 * 8192]).unwrap();
    // Two are what a visit needs. Two more are taken if guesses are on their way to the first ones just then.
    let short = Some((|| true) as fn() -> bool);
    for (is_short, guesses, expected) in [
        (None, true, 5..=6),
        (short, true, 2..=4),
        (short, false, 2..=2),
    ] {
        let (layers, mut slots) = experts(2, 4);
        slots.classes[0].slots = 6;
        let files = Files::buffered(path.clone());
        let cache = Cache::new(files, layers, &slots, Kind::default(), is_short).unwrap();
        for pass in 0..4 {
            for layer in 0..2 {
                let active = [pass % 3, pass % 3 + 1];
                let guess = |expert| Guess { expert, rank: 0 };
                if guesses {
                    cache.guess(1 - layer, vec![active.map(guess).to_vec()]);
                }
                let mut visit = cache.visit(layer, &active);
                while visit.portion().unwrap().is_some() {}
            }
        }
        let table = cache.shared.lock();
        let touched = table.slots.iter().filter(|slot| slot.touched).count();
        assert!(expected.contains(&touched), "{touched}");
    }
}
