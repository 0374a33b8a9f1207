//! The thread pool: permanent workers that spin, then park.
//!
//! A decode step of Mixtral has about 200 points at which all threads meet, so a meeting must
//! cost about a microsecond: workers wait for the next job in a spin loop, and only park after
//! `SPIN` without one. Each thread begins with a run of tasks of its own, since tasks that follow
//! each other are rows that follow each other in memory, and a thread streams one long run of
//! them much faster than pieces of a run that it shares. A run is claimed task by task from
//! an atomic counter, and whoever is done goes on with the runs of the others: a slow core takes
//! fewer tasks and never holds up the rest, and a worker that wakes too late for a job simply
//! misses it. There is one job at a time, and the caller works on it too.

mod cpus;

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use cpus::{CpuSet, default_count};

/// How long a worker spins for the next job before it parks: longer than the gaps within a
/// forward pass, shorter than anything a person or a power meter would notice.
const SPIN: Duration = Duration::from_micros(200);

/// More threads than this are refused: it is no machine's number of cores, and each costs memory.
pub const MAX_THREADS: usize = 1024;

/// A fixed number of threads that work on one job at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Serializes callers: there is one job at a time.
    caller: Mutex<()>,
}

/// What the caller and the workers share.
struct Shared {
    /// Generation of the job in the upper bits, then [`OPEN`], then the workers that entered.
    ticket: AtomicU64,
    /// The next task to claim of each thread's run, the caller's first.
    next: Vec<Cursor>,
    /// Workers that have left the job.
    left: AtomicUsize,
    /// The job; written while no worker is inside, read only by workers inside.
    job: std::cell::UnsafeCell<Job>,
    /// A task has panicked: its payload.
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    /// Which workers are parked (or about to be).
    parked: Vec<AtomicBool>,
    stop: AtomicBool,
}

/// A counter in a cache line (or two: they are fetched in pairs) of its own.
#[derive(Default)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

/// The closure of the running job, its lifetime erased, and the number of its tasks.
#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// Bits of [`Shared::ticket`]: the low 16 count workers.
const OPEN: u64 = 1 << 16;
const GENERATION: u64 = 1 << 17;

// SAFETY: `job` is the only field that is not `Sync` by itself. It is written by the caller
// while no worker is inside (the ticket is closed and all who entered have left) and read by
// workers between entering and leaving; entering acquires what the caller released by opening.
unsafe impl Sync for Shared {}
// SAFETY: the closure pointer inside `job` is only used while the caller keeps the closure alive.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    ///
    /// # Errors
    /// When there are more than [`MAX_THREADS`], or the system starts no more.
    pub fn new(threads: usize) -> io::Result<Self> {
        Self::start(threads, &[])
    }

    /// A pool of a thread for each of `cpus`, kept there, and the calling thread on the first.
    ///
    /// # Errors
    /// As [`new`](Self::new); when the process may not use a CPU; where the system is not Linux.
    /// The calling thread may then be left on one of the CPUs.
    pub fn pinned(cpus: &[usize]) -> io::Result<Self> {
        let pool = Self::start(cpus.len(), cpus.get(1..).unwrap_or_default())?;
        cpus.first().map_or(Ok(()), |&cpu| cpus::pin(cpu))?;
        Ok(pool)
    }

    /// Starts the workers, each on its CPU where there is one for it.
    fn start(threads: usize, cpus: &[usize]) -> io::Result<Self> {
        if threads > MAX_THREADS {
            let problem = format!("at most {MAX_THREADS} make sense");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            next: (0..=workers).map(|_| Cursor::default()).collect(),
            left: AtomicUsize::new(0),
            job: std::cell::UnsafeCell::new(Job {
                run: &|_| {},
                tasks: 0,
            }),
            panic: Mutex::new(None),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(workers),
            caller: Mutex::new(()),
        };
        for index in 0..workers {
            let shared = Arc::clone(&pool.shared);
            let name = format!("fewbit-{}", index + 1);
            let worker = thread::Builder::new().name(name);
            // A thread begins on the CPUs of the one that starts it.
            cpus.get(index).map_or(Ok(()), |&cpu| cpus::pin(cpu))?;
            // Where one fails, dropping the pool ends those before it.
            pool.workers.push(worker.spawn(move || shared.work(index))?);
        }
        Ok(pool)
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `run(task)` once for every task in `0..tasks`, on all threads, and returns when
    /// all are done.
    ///
    /// A task must not call `run` itself: there is one job at a time.
    ///
    /// # Panics
    /// If a task panics, with its payload, once all other threads have left the job.
    pub fn run(&self, tasks: usize, run: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(run);
            return;
        }
        let _one_job = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: the last job is closed and everybody has left it, so nobody else looks at
        // `job`. The closure's lifetime is erased: `run` outlives this call, and this call does
        // not return (or unwind) before all who entered have left.
        unsafe {
            *shared.job.get() = Job {
                run: std::mem::transmute::<
                    *const (dyn Fn(usize) + Sync),
                    *const (dyn Fn(usize) + Sync + 'static),
                >(run),
                tasks,
            };
        }
        for (thread, next) in shared.next.iter().enumerate() {
            next.0
                .store(shared.run_of(thread, tasks).start, Ordering::Relaxed);
        }
        shared.left.store(0, Ordering::Relaxed);
        let generation = shared.ticket.load(Ordering::Relaxed) & !(GENERATION - 1);
        shared
            .ticket
            .store(generation.wrapping_add(GENERATION) | OPEN, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers) {
            if parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.claim(0, run, tasks)));
        if mine.is_err() {
            shared.give_up(tasks);
        }
        // Closing the ticket keeps latecomers out; whoever is in finishes its task.
        let entered = (shared.ticket.fetch_and(!OPEN, Ordering::AcqRel) & (OPEN - 1)) as usize;
        let mut spins = 0u32;
        while shared.left.load(Ordering::Acquire) < entered {
            wait(&mut spins);
        }
        let theirs = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match (mine, theirs) {
            (Err(payload), _) | (Ok(()), Some(payload)) => resume_unwind(payload),
            (Ok(()), None) => {}
        }
    }

    /// Cuts `items` into chunks of `chunk` and calls `run(index, chunk)` for each, in parallel.
    pub fn chunks<T: Send>(
        &self,
        items: &mut [T],
        chunk: usize,
        run: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (len, base) = (items.len(), Items(items.as_mut_ptr()));
        self.run(len.div_ceil(chunk), &|index| {
            let start = index * chunk;
            // SAFETY: chunks do not overlap, lie inside `items`, and each is visited once;
            // `items` is borrowed for the whole call.
            let part =
                unsafe { std::slice::from_raw_parts_mut(base.at(start), chunk.min(len - start)) };
            run(index, part);
        });
    }
}

/// The start of a slice that tasks take disjoint parts of.
struct Items<T>(*mut T);

// SAFETY: see `Pool::chunks`: parts are disjoint and `T: Send`.
unsafe impl<T: Send> Sync for Items<T> {}

impl<T> Items<T> {
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker cannot panic: tasks are caught.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            let ticket = self.next_ticket(index, seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if self
                .ticket
                .compare_exchange(ticket, ticket + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            seen = ticket & !(GENERATION - 1);
            // SAFETY: this worker has entered an open job: `job` is stable, and the closure is
            // alive, until it leaves.
            let Job { run, tasks } = unsafe { *self.job.get() };
            // SAFETY: as above.
            let run = unsafe { &*run };
            if let Err(payload) =
                catch_unwind(AssertUnwindSafe(|| self.claim(index + 1, run, tasks)))
            {
                self.give_up(tasks);
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
            self.left.fetch_add(1, Ordering::Release);
        }
    }

    /// Waits for an open job of another generation than `seen` (or for the end).
    fn next_ticket(&self, index: usize, seen: u64) -> u64 {
        let news = || {
            let ticket = self.ticket.load(Ordering::SeqCst);
            let fresh = ticket & OPEN != 0 && ticket & !(GENERATION - 1) != seen;
            (fresh || self.stop.load(Ordering::SeqCst)).then_some(ticket)
        };
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if let Some(ticket) = news() {
                    return ticket;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                // The caller opens, then looks at `parked`; we set `parked`, then look at the
                // ticket: one of the two sees the other.
                self.parked[index].store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                if let Some(ticket) = news() {
                    self.parked[index].store(false, Ordering::SeqCst);
                    return ticket;
                }
                thread::park();
            }
        }
    }

    /// The run of tasks that `thread` begins with.
    fn run_of(&self, thread: usize, tasks: usize) -> Range<usize> {
        let threads = self.next.len();
        let start = |thread: usize| (thread as u128 * tasks as u128 / threads as u128) as usize;
        start(thread)..start(thread + 1)
    }

    /// Claims and runs tasks until none is left, those of `thread`'s own run first.
    fn claim(&self, thread: usize, run: &(dyn Fn(usize) + Sync), tasks: usize) {
        let threads = self.next.len();
        for owner in (thread..threads).chain(0..thread) {
            let end = self.run_of(owner, tasks).end;
            loop {
                let task = self.next[owner].0.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                run(task);
            }
        }
    }

    /// Leaves nothing to claim.
    fn give_up(&self, tasks: usize) {
        for next in &self.next {
            next.0.store(tasks, Ordering::Relaxed);
        }
    }
}

/// Spins, and gives the core away now and then: on a busy machine the thread that we wait for
/// may need it.
fn wait(spins: &mut u32) {
    *spins += 1;
    if (*spins).is_multiple_of(1 << 12) {
        thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// Runs `tasks` tasks and checks that each ran once.
    fn check(pool: &Pool, tasks: usize) {
        let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
        pool.run(tasks, &|task| {
            counts[task].fetch_add(1, Ordering::Relaxed);
        });
        let ran: Vec<u32> = counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        assert!(ran.iter().all(|&count| count == 1), "{ran:?}");
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 3, 7, 1000] {
                check(&pool, tasks);
            }
        }
    }

    #[test]
    fn thousands_of_jobs_follow_each_other() {
        let pool = Pool::new(4).unwrap();
        for _ in 0..20_000 {
            check(&pool, 5);
        }
    }

    #[test]
    fn parked_workers_wake_for_the_next_job() {
        let pool = Pool::new(3).unwrap();
        for round in 0..300 {
            // Around the moment at which workers stop spinning and park.
            thread::sleep(SPIN + Duration::from_micros(round % 20));
            // With a task each that waits for the others, the job needs every thread.
            let here = AtomicUsize::new(0);
            let start = Instant::now();
            pool.run(3, &|_| {
                here.fetch_add(1, Ordering::SeqCst);
                while here.load(Ordering::SeqCst) < 3 && start.elapsed() < Duration::from_secs(20) {
                    thread::yield_now();
                }
            });
            assert_eq!(here.load(Ordering::SeqCst), 3);
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "a worker slept on"
            );
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_works_on() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..50 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|task| assert!(task != 40, "task forty"));
            }));
            let payload = result.unwrap_err();
            assert!(
                payload
                    .downcast_ref::<&str>()
                    .is_some_and(|text| text.contains("forty"))
            );
            check(&pool, 64);
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| check(&pool, 16)));
            }
        });
    }

    #[test]
    fn a_pool_ends_while_its_workers_are_parked_or_spin() {
        for pause in [0, 1000] {
            let pool = Pool::new(4).unwrap();
            check(&pool, 10);
            thread::sleep(Duration::from_micros(pause));
            drop(pool);
        }
    }

    #[test]
    fn chunks_cover_a_slice_once() {
        let pool = Pool::new(3).unwrap();
        for (len, chunk) in [(0, 4), (1, 4), (8, 4), (103, 10), (5, 100)] {
            let mut items = vec![0usize; len];
            pool.chunks(&mut items, chunk, |index, part| {
                assert!(part.len() == chunk || (index + 1) * chunk > len);
                part.iter_mut().for_each(|item| *item += index + 1);
            });
            assert!(
                items
                    .iter()
                    .enumerate()
                    .all(|(at, &item)| item == at / chunk + 1)
            );
        }
    }

    #[test]
    fn absurd_numbers_of_threads_are_refused() {
        assert!(Pool::new(MAX_THREADS + 1).is_err());
    }

    /// Nanoseconds that a thread (`pid/task/tid`) has run.
    #[cfg(target_os = "linux")]
    fn time_of(thread: &std::path::Path) -> Duration {
        let path = std::path::Path::new("/proc").join(thread).join("schedstat");
        let stat = std::fs::read_to_string(path).unwrap();
        Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
    }

    /// Runs a job that needs every thread and returns what each says.
    #[cfg(target_os = "linux")]
    fn ask<T: Send>(pool: &Pool, what: impl Fn() -> T + Sync) -> Vec<T> {
        let here = AtomicUsize::new(0);
        let answers = Mutex::new(Vec::new());
        pool.run(pool.threads(), &|_| {
            here.fetch_add(1, Ordering::SeqCst);
            while here.load(Ordering::SeqCst) < pool.threads() {
                thread::yield_now();
            }
            answers.lock().unwrap().push(what());
        });
        answers.into_inner().unwrap()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn an_idle_pool_takes_no_time() {
        let pool = Pool::new(3).unwrap();
        let threads = ask(&pool, || std::fs::read_link("/proc/thread-self").unwrap());
        thread::sleep(Duration::from_millis(100));
        let before: Vec<_> = threads.iter().map(|thread| time_of(thread)).collect();
        thread::sleep(Duration::from_millis(300));
        for (thread, before) in threads.iter().zip(before) {
            let taken = time_of(thread) - before;
            assert!(taken < Duration::from_millis(3), "{thread:?}: {taken:?}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pinned_threads_stay_on_their_cpus() {
        // A thread of its own: the caller is pinned too.
        let pinned = thread::spawn(|| {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let allowed = |status: &str| -> Vec<usize> {
                let line = status
                    .lines()
                    .find(|line| line.starts_with("Cpus_allowed_list"));
                let list = line.unwrap().split_whitespace().nth(1).unwrap();
                list.parse::<CpuSet>().unwrap().cpus().to_vec()
            };
            let cpus = allowed(&status);
            let pool = Pool::pinned(&cpus).unwrap();
            assert_eq!(pool.threads(), cpus.len());
            let mut found = ask(&pool, || {
                allowed(&std::fs::read_to_string("/proc/thread-self/status").unwrap())
            });
            found.sort();
            let each: Vec<_> = cpus.iter().map(|&cpu| vec![cpu]).collect();
            assert_eq!(found, each);
            assert!(Pool::pinned(&[cpus[0], (1 << 10) - 1]).is_err());
        });
        pinned.join().unwrap();
    }
}
