//! A mapped file that cannot be read any more.
//!
//! Where a file has shrunk under its mapping, or its disk fails, touching its bytes raises a signal that
//! would end the process without a word.

/// What is said then.
#[cfg(unix)]
const MESSAGE: &str = "fewbit: the mapped model file cannot be read any more: it was cut off, or the disk failed; \
    copy or convert it again, or load it with --no-mmap\n";

/// From now on a mapped file that cannot be read ends the process with a line on standard error and exit
/// code 1.
#[cfg(unix)]
pub fn explain() {
    extern "C" fn handler(_: libc::c_int) {
        // SAFETY: both calls may be made in a signal handler; the buffer is a constant.
        unsafe {
            libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(1);
        }
    }
    // SAFETY: the structure is plain data, for which zeros mean no flags and no blocked signals; the handler
    // does nothing that is forbidden in one and never returns. Where it cannot be set, the signal ends the
    // process as it would have.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

#[cfg(not(unix))]
pub fn explain() {}
