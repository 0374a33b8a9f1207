//! Signals: Ctrl-C stops an answer, not the program; what ends the program leaves the terminal as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::{io, process, thread};

use anyhow::Context;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Nothing is being answered.
const IDLE: u8 = 0;
/// An answer is under way, from the reading of its prompt on.
const ANSWERING: u8 = 1;
/// It is to be stopped.
const STOPPING: u8 = 2;

/// Added to a signal's number: the exit code of a program that it ended, as shells report it.
const ENDED_BY: i32 = 128;

/// What the last Ctrl-C meant.
pub struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// Catches SIGINT from now on. While nothing is being answered it does nothing, or ends the
    /// program if `ends_when_idle`: the line editor sees Ctrl-C as a key, a pipe does not.
    /// SIGTERM and SIGHUP end the program, with the terminal's modes as they are now.
    pub fn install(ends_when_idle: bool) -> anyhow::Result<Self> {
        let state = Arc::new(AtomicU8::new(IDLE));
        let seen = Arc::clone(&state);
        let modes = tcgetattr(io::stdin()).ok();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot catch Ctrl-C")?;
        thread::spawn(move || {
            for signal in signals.forever() {
                let order = Ordering::SeqCst;
                if signal == SIGINT {
                    let before = seen.compare_exchange(ANSWERING, STOPPING, order, order);
                    if !ends_when_idle || before != Err(IDLE) {
                        continue;
                    }
                } else if let Some(modes) = &modes {
                    // There may be no terminal any more.
                    let _ = tcsetattr(io::stdin(), OptionalActions::Now, modes);
                }
                process::exit(ENDED_BY + signal);
            }
        });
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
