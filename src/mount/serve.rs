//! The life of a mount: checks before it, readiness, signals, systemd, its end.
//!
//! ```text
//! Signals::listen ─ (open and plan) ─ mount_and_wait:
//!     fuse::mount ─ the mount answers ─ READY=1 ─ session … ─ its end ─ exit
//! ```
//! A session ends when the mount is taken down: by a signal to the process, by `mount-ckpt umount`,
//! by umount(8) or by `fusermount3 -u`. All of them end the process with 0.

use super::mountpoint::MountPointError;
use super::{Filesystem, MountOptions, mount_filesystem, signals, unmount};
use crate::view::View;
use nix::errno::Errno;
use sd_notify::NotifyState;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// How long a new mount has to answer its own process.
const ANSWER: Duration = Duration::from_secs(30);

/// Why a mount does not come up or ends otherwise than it should.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// This machine, this user or this directory cannot be mounted on.
    #[error(transparent)]
    Point(#[from] MountPointError),
    /// The kernel or fusermount3 refuses.
    #[error("cannot mount at `{}`: {}{}", .at.display(), one_line(.why), hint(.why))]
    Refused {
        /// The mount point.
        at: PathBuf,
        /// What was said.
        why: io::Error,
    },
    /// Mounted, and a look at it fails.
    #[error("the mount at `{}` came up and does not answer: {why}", .at.display())]
    Silent {
        /// The mount point.
        at: PathBuf,
        /// What was said.
        why: io::Error,
    },
    /// The readiness of the mount cannot be reported, most likely since the waiting command was
    /// stopped.
    #[error("unmounted `{}` again, since nobody waits for it: {why}", .at.display())]
    Unheard {
        /// The mount point.
        at: PathBuf,
        /// What was said.
        why: io::Error,
    },
    /// The session broke.
    #[error("the mount at `{}` broke: {why}", .at.display())]
    Session {
        /// The mount point.
        at: PathBuf,
        /// What was said.
        why: io::Error,
    },
}

/// Mounts a view, tells `ready` once it answers, and serves it until it is unmounted.
///
/// `at` is a path that [`mountpoint::check`] returned; `line` is what the mount is, in words.
///
/// # Errors
/// Where the mount does not come up, `ready` fails, or the session breaks. The mount is down then.
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
    if let Err(why) = answers(&at) {
        take_back(&at);
        return Err(MountError::Silent { at, why });
    }
    tracing::info!("{line}");
    // Without systemd there is nobody to notify, and that is no error.
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(line)]);
    if let Err(why) = ready() {
        take_back(&at);
        return Err(MountError::Unheard { at, why });
    }
    signals.mounted(&at);
    let ended = mounted.wait();
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    ended.map_err(|why| MountError::Session { at: at.clone(), why })?;
    tracing::info!("unmounted `{}`", at.display());
    Ok(())
}

/// Looks at the mount as any reader would, until it answers.
fn answers(at: &Path) -> io::Result<()> {
    let (root, stats) = (at.to_owned(), at.join(".mount-ckpt/stats.json"));
    let (send, answer) = mpsc::channel();
    // In a thread of its own, since a mount that hangs would hang whoever looks at it.
    std::thread::Builder::new().name("answers".to_owned()).spawn(move || {
        let looked = root.metadata().and_then(|_| std::fs::read(stats)).map(drop);
        // Modes may be narrower than we are; a mount that says so answers.
        let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        let _ = send.send(looked.or_else(|error| if denied(&error) { Ok(()) } else { Err(error) }));
    })?;
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {ANSWER:?}"));
    answer.recv_timeout(ANSWER).map_err(late)?
}

/// Takes down a mount that came up in vain.
fn take_back(at: &Path) {
    if let Err(error) = unmount::unmount(at, unmount::Unmount::Lazy) {
        tracing::error!("{error}");
    }
}

/// What fusermount3 said comes with its line ends.
fn one_line(why: &io::Error) -> String {
    why.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What to do about a refusal to mount.
fn hint(why: &io::Error) -> &'static str {
    let said = why.to_string();
    let not_permitted = why.kind() == io::ErrorKind::PermissionDenied
        || said.contains(Errno::EPERM.desc())
        || said.contains(Errno::EACCES.desc())
        || said.contains("no write access");
    if not_permitted && nix::unistd::geteuid().is_root() {
        ": in a container, give it `--device /dev/fuse --cap-add SYS_ADMIN`, and with Docker \
         `--security-opt apparmor=unconfined`"
    } else if not_permitted {
        ": the mount point has to be yours and writable, and `fusermount3` set-user-id root"
    } else {
        ""
    }
}
