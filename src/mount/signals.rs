//! SIGTERM, SIGINT and SIGHUP unmount.
//!
//! The signals are blocked in every thread, and one thread waits for them: no handler runs, so
//! nothing is limited to what a handler may do.

use super::mountinfo::MountEntry;
use super::unmount::{Unmount, UnmountError, unmount};
use super::{mountinfo, mountpoint};
use nix::sys::signal::{SigSet, Signal};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long a mount that was in use at SIGTERM is still served once it is detached.
///
/// Readers that hold a file open have this long to finish; then the process ends, and what they
/// read next is an error.
pub(crate) const LINGER: Duration = Duration::from_secs(10);

/// Where the life of the process stands.
#[derive(Debug)]
enum Stage {
    /// Nothing is mounted: a signal ends the process.
    Starting,
    /// The mount is coming up: a signal is kept until it is.
    Mounting { stop: bool },
    /// The mount is up: a signal unmounts.
    Mounted(MountPlace),
    /// A signal was heeded: another one ends the process at once.
    Stopping,
}

/// A mount, told apart from another one at the same place.
#[derive(Clone, Debug)]
struct MountPlace {
    at: PathBuf,
    dev: String,
}

/// The thread that waits for signals, and what it has to do when one comes.
#[derive(Clone, Debug)]
pub(crate) struct Signals {
    stage: Arc<Mutex<Stage>>,
}

impl Signals {
    /// Blocks the signals in this thread, and so in all that it starts from here on, and starts the
    /// one that waits for them.
    ///
    /// In the background SIGHUP does nothing: the terminal whose end it tells of is not ours.
    ///
    /// # Errors
    /// Where the system has no room for a thread.
    pub(crate) fn listen(background: bool) -> std::io::Result<Signals> {
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGTERM);
        blocked.add(Signal::SIGINT);
        let mut awaited = blocked;
        blocked.add(Signal::SIGHUP);
        if !background && !hangup_is_ignored() {
            awaited.add(Signal::SIGHUP);
        }
        blocked.thread_block()?;
        let signals = Signals { stage: Arc::new(Mutex::new(Stage::Starting)) };
        let listener = signals.clone();
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            while let Ok(signal) = awaited.wait() {
                listener.heed(signal);
            }
        })?;
        Ok(signals)
    }

    /// The mount comes up from here on: a signal has to wait.
    pub(crate) fn mounting(&self) {
        *self.stage() = Stage::Mounting { stop: false };
    }

    /// The mount at `at` is up: a signal unmounts it, one that came meanwhile does so now.
    pub(crate) fn mounted(&self, at: &Path) {
        let dev = entry_at(at).map(|entry| entry.dev).unwrap_or_default();
        let place = MountPlace { at: at.to_owned(), dev };
        let mut stage = self.stage();
        let stop = matches!(*stage, Stage::Mounting { stop: true });
        *stage = if stop { Stage::Stopping } else { Stage::Mounted(place.clone()) };
        drop(stage);
        if stop {
            take_down(&place);
        }
    }

    fn heed(&self, signal: Signal) {
        let mut stage = self.stage();
        match &mut *stage {
            Stage::Starting => std::process::exit(0),
            Stage::Mounting { stop } => *stop = true,
            Stage::Mounted(place) => {
                tracing::info!("{signal}: unmounting `{}`", place.at.display());
                let place = place.clone();
                *stage = Stage::Stopping;
                drop(stage);
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
                take_down(&place);
            }
            Stage::Stopping => {
                tracing::warn!("{signal} again: ending at once");
                std::process::exit(0);
            }
        }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Unmounts; where the mount is in use, detaches it and bounds how long it is still served. The end
/// of the session is seen by the thread that waits for it.
fn take_down(place: &MountPlace) {
    let at = place.at.display();
    // Somebody else may have unmounted ours and put another one there.
    if entry_at(&place.at).is_none_or(|entry| entry.dev != place.dev) {
        return linger();
    }
    match unmount(&place.at, Unmount::Now) {
        Ok(()) | Err(UnmountError::NotMounted(_)) => {}
        Err(UnmountError::Busy(_)) => {
            let seconds = LINGER.as_secs();
            tracing::warn!("`{at}` is in use: detached, and served for {seconds} s more");
            if let Err(error) = unmount(&place.at, Unmount::Lazy) {
                tracing::error!("{error}");
            }
            linger();
        }
        Err(error) => {
            tracing::error!("{error}");
            linger();
        }
    }
}

/// Ends the process after [`LINGER`], unless the end of the session does so before.
fn linger() {
    let end = || {
        thread::sleep(LINGER);
        tracing::warn!("still in use: ending, what is read from here on is an error");
        std::process::exit(0);
    };
    if thread::Builder::new().name("linger".to_owned()).spawn(end).is_err() {
        std::process::exit(0);
    }
}

fn entry_at(at: &Path) -> Option<MountEntry> {
    let at = mountpoint::place(at);
    mountinfo::topmost(&mountinfo::read().ok()?, &at).cloned()
}

/// Whether the process was started to outlive its terminal, as nohup(1) does.
///
/// A blocked signal is kept even where its disposition is to be ignored, so it has to be asked.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1, SIGHUP.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}
