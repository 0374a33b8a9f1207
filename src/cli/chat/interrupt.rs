//! Ctrl-C: it stops an answer, not the program.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Context;

/// Nothing is being answered.
const IDLE: u8 = 0;
/// An answer is under way, from the reading of its prompt on.
const ANSWERING: u8 = 1;
/// It is to be stopped.
const STOPPING: u8 = 2;

/// Exit code of a program that SIGINT ended, as shells report it.
const INTERRUPTED: i32 = 130;

/// What the last Ctrl-C meant.
pub struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// Catches SIGINT from now on. While nothing is being answered it does nothing, or ends the
    /// program if `ends_when_idle`: the line editor sees Ctrl-C as a key, a pipe does not.
    pub fn install(ends_when_idle: bool) -> anyhow::Result<Self> {
        let state = Arc::new(AtomicU8::new(IDLE));
        let seen = Arc::clone(&state);
        let handler = move || {
            let order = Ordering::SeqCst;
            let before = seen.compare_exchange(ANSWERING, STOPPING, order, order);
            if ends_when_idle && before == Err(IDLE) {
                process::exit(INTERRUPTED);
            }
        };
        ctrlc::set_handler(handler).context("cannot catch Ctrl-C")?;
        Ok(Self(state))
    }

    /// An answer begins.
    pub fn start(&self) {
        self.0.store(ANSWERING, Ordering::SeqCst);
    }

    /// An answer has ended.
    pub fn end(&self) {
        self.0.store(IDLE, Ordering::SeqCst);
    }

    /// Whether the answer under way is to be stopped.
    pub fn wanted(&self) -> bool {
        self.0.load(Ordering::SeqCst) == STOPPING
    }
}
