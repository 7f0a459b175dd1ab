//! Runs a mount in this process, from the mount to its end, and reports its state to systemd.
//!
//! ```text
//! Signals::listen ─> (open and plan) ─> mount_and_wait:
//!     mount ─> look at it until it answers ─> READY=1, `ready` ─> wait for the end ─> STOPPING=1
//! ```
//! The session ends when the mount is unmounted: after a signal to the process, by `mount-ckpt umount`,
//! by umount(8) or by `fusermount3 -u`. The process then exits with 0, whichever it was.

use super::mountpoint::MountPointError;
use super::{Filesystem, MountOptions, mount_filesystem, signals, unmount};
use crate::view::{STATUS_DIRECTORY, View};
use nix::errno::Errno;
use sd_notify::NotifyState;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// How long a new mount may take to answer the first look at it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a mount did not come up, or ended otherwise than by an unmount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// This machine or this user cannot mount, or not at this directory.
    #[error(transparent)]
    Point(#[from] MountPointError),
    /// The kernel or fusermount3 refuses the mount.
    #[error("cannot mount at `{}`: {}{}", .at.display(), one_line(.why), advice(.why))]
    Refused {
        /// The mount point.
        at: PathBuf,
        /// The error of the system, or the message of fusermount3.
        why: io::Error,
    },
    /// The mount is in place, but reading from it fails or hangs.
    #[error("the mount at `{}` does not answer: {why}", .at.display())]
    NoAnswer {
        /// The mount point.
        at: PathBuf,
        /// The error of the first look at the mount.
        why: io::Error,
    },
    /// The mount is up, but the caller's `ready` failed: most likely the command that waits for a
    /// background mount was stopped.
    #[error("unmounted `{}` again, since the command that started it is gone: {why}", .at.display())]
    NotReported {
        /// The mount point.
        at: PathBuf,
        /// The error of `ready`.
        why: io::Error,
    },
    /// The session ended with an error and not by an unmount.
    #[error("the mount at `{}` ended with an error: {why}", .at.display())]
    Session {
        /// The mount point.
        at: PathBuf,
        /// The error of the session.
        why: io::Error,
    },
}

/// Mounts a view, calls `ready` once the mount answers, and returns when it has been unmounted.
///
/// `at` is a path that `mountpoint::check` returned; `line` describes the mount in the log and to
/// systemd.
///
/// # Errors
/// The mount does not come up, `ready` fails, or the session breaks. After [`MountError::NoAnswer`] and
/// [`MountError::NotReported`] the mount has been detached; if that failed too, the log says so. After
/// [`MountError::Session`] the mount point may still be in the mount table, without a process behind
/// it: `mount-ckpt umount` removes it. The same holds after an `Ok` that follows an abort of the
/// connection through sysfs.
pub(crate) fn mount_and_wait(
    view: Arc<View>,
    at: &Path,
    options: &MountOptions,
    signals: &signals::Signals,
    line: &str,
    ready: impl FnOnce() -> io::Result<()>,
) -> Result<(), MountError> {
    let at = at.to_owned();
    signals.mounting();
    let filesystem = Filesystem::new(view, options.direct_io);
    let mounted = match mount_filesystem(filesystem, &at, options) {
        Ok(mounted) => mounted,
        Err(why) => return Err(MountError::Refused { at, why }),
    };
    if let Err(why) = wait_for_answer(&at) {
        unmount_after_failure(&at);
        return Err(MountError::NoAnswer { at, why });
    }
    tracing::info!("{line}");
    // A service manager that cannot be reached is no reason to unmount.
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(line)]);
    if let Err(why) = ready() {
        unmount_after_failure(&at);
        return Err(MountError::NotReported { at, why });
    }
    signals.mounted(&at);
    let ended = mounted.wait();
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    ended.map_err(|why| MountError::Session { at: at.clone(), why })?;
    tracing::info!("unmounted `{}`", at.display());
    Ok(())
}

/// Reads from the mount as any program would. Returns once it answers.
fn wait_for_answer(at: &Path) -> io::Result<()> {
    let (root, stats) = (at.to_owned(), at.join(STATUS_DIRECTORY).join("stats.json"));
    let (send, answer) = mpsc::channel();
    // In a thread of its own, since reading from a mount that hangs never returns.
    std::thread::Builder::new().name("answers".to_owned()).spawn(move || {
        let result = root.metadata().and_then(|_| std::fs::read(stats)).map(drop);
        // The files may have modes that lock this user out; a mount that refuses so does answer.
        let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        let _ = send.send(result.or_else(|error| if denied(&error) { Ok(()) } else { Err(error) }));
    })?;
    let late =
        |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {ANSWER_TIMEOUT:?}"));
    answer.recv_timeout(ANSWER_TIMEOUT).map_err(late)?
}

/// Detaches a mount that cannot be used. A failure is logged, since the caller returns the first error.
fn unmount_after_failure(at: &Path) {
    if let Err(error) = unmount::unmount(at, unmount::Unmount::Lazy) {
        tracing::error!("{error}");
    }
}

/// The message of an error on one line; that of fusermount3 contains line ends.
fn one_line(why: &io::Error) -> String {
    why.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What to do about a mount that was refused.
fn advice(why: &io::Error) -> &'static str {
    let message = why.to_string();
    let not_permitted = why.kind() == io::ErrorKind::PermissionDenied
        || message.contains(Errno::EPERM.desc())
        || message.contains(Errno::EACCES.desc())
        || message.contains("no write access");
    if not_permitted && nix::unistd::geteuid().is_root() {
        ": in a container, give it `--device /dev/fuse --cap-add SYS_ADMIN`, and with Docker \
         `--security-opt apparmor=unconfined`"
    } else if not_permitted {
        ": you must own the mount point and be able to write to it, and `fusermount3` must be \
         set-user-id root"
    } else {
        ""
    }
}
