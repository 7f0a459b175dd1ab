//! Unmounts on SIGTERM, SIGINT and SIGHUP.
//!
//! The signals are blocked in every thread, and one thread takes them with `sigwait`. So no signal
//! handler runs, and the code that reacts may lock, log and allocate.

use super::mountinfo::MountEntry;
use super::unmount::{Unmount, UnmountError, unmount};
use super::{mountinfo, mountpoint};
use nix::sys::signal::{SigSet, Signal};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long the process keeps serving the open files of a mount that a signal has detached.
///
/// Readers have this long to finish. Then the process exits, and further reads of these files fail
/// with ENOTCONN.
pub(crate) const GRACE_PERIOD: Duration = Duration::from_secs(10);

/// What the process is doing, which decides what a signal does.
#[derive(Debug)]
enum Stage {
    /// Nothing is mounted. A signal exits.
    Starting,
    /// The mount is coming up. A signal is remembered in `stop` until it is up.
    Mounting { stop: bool },
    /// The mount is up. A signal unmounts it.
    Mounted(MountId),
    /// A signal has unmounted or detached the mount. Another one exits at once.
    Stopping,
}

/// Identifies one mount. The device number tells it apart from a later mount at the same path.
#[derive(Clone, Debug)]
struct MountId {
    at: PathBuf,
    /// `major:minor`, as in the mount table.
    device: String,
}

/// The thread that waits for signals, and the state that it acts on.
#[derive(Clone, Debug)]
pub(crate) struct Signals {
    stage: Arc<Mutex<Stage>>,
}

impl Signals {
    /// Blocks the signals in this thread, and thereby in all threads that it starts later, and starts
    /// the thread that waits for them.
    ///
    /// SIGHUP is ignored in the background, and in a process that was started to ignore it.
    ///
    /// # Errors
    /// The signals cannot be blocked, or the thread cannot be started.
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
                listener.on_signal(signal);
            }
        })?;
        Ok(signals)
    }

    /// Says that the mount is about to come up. A signal now waits for [`Signals::mounted`].
    pub(crate) fn mounting(&self) {
        *self.stage() = Stage::Mounting { stop: false };
    }

    /// Says that the mount at `at` is up. A signal now unmounts it; one that arrived since
    /// [`Signals::mounting`] does so at once.
    pub(crate) fn mounted(&self, at: &Path) {
        let device = entry_at(at).map(|entry| entry.device).unwrap_or_default();
        let mount = MountId { at: at.to_owned(), device };
        let mut stage = self.stage();
        let stop = matches!(*stage, Stage::Mounting { stop: true });
        *stage = if stop { Stage::Stopping } else { Stage::Mounted(mount.clone()) };
        drop(stage);
        if stop {
            unmount_or_detach(&mount);
        }
    }

    fn on_signal(&self, signal: Signal) {
        let mut stage = self.stage();
        match &mut *stage {
            Stage::Starting => std::process::exit(0),
            Stage::Mounting { stop } => *stop = true,
            Stage::Mounted(mount) => {
                tracing::info!("{signal}: unmounting `{}`", mount.at.display());
                let mount = mount.clone();
                *stage = Stage::Stopping;
                drop(stage);
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
                unmount_or_detach(&mount);
            }
            Stage::Stopping => {
                tracing::warn!("{signal} again: exiting at once");
                std::process::exit(0);
            }
        }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Unmounts. A mount that is in use is detached instead and served for [`GRACE_PERIOD`]. The thread that
/// waits for the end of the session then ends the process.
fn unmount_or_detach(mount: &MountId) {
    let at = mount.at.display();
    // Another process may have unmounted ours and mounted another one at the same path.
    if entry_at(&mount.at).is_none_or(|entry| entry.device != mount.device) {
        return exit_after_grace_period();
    }
    match unmount(&mount.at, Unmount::Now) {
        Ok(()) | Err(UnmountError::NotMounted(_)) => {}
        Err(UnmountError::Busy(_)) => {
            let seconds = GRACE_PERIOD.as_secs();
            tracing::warn!(
                "`{at}` is in use: detached; open files are served for {seconds} s more"
            );
            if let Err(error) = unmount(&mount.at, Unmount::Lazy) {
                tracing::error!("{error}");
            }
            exit_after_grace_period();
        }
        Err(error) => {
            tracing::error!("{error}");
            exit_after_grace_period();
        }
    }
}

/// Exits after [`GRACE_PERIOD`], unless the session ends and the process with it before.
fn exit_after_grace_period() {
    let exit = || {
        thread::sleep(GRACE_PERIOD);
        tracing::warn!("files are still open: exiting, and further reads of them fail");
        std::process::exit(0);
    };
    if thread::Builder::new().name("grace-period".to_owned()).spawn(exit).is_err() {
        std::process::exit(0);
    }
}

fn entry_at(at: &Path) -> Option<MountEntry> {
    let at = mountpoint::path_in_table(at);
    mountinfo::topmost(&mountinfo::read().ok()?, &at).cloned()
}

/// Whether the process was started with SIGHUP ignored, as nohup(1) does.
///
/// `sigwait` returns a blocked signal even if the signal is ignored, so this has to be looked up.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1, SIGHUP.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}
