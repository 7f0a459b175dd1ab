//! Taking a mount of ours down, from inside or from outside.

use super::mountinfo::{self, MountEntry};
use super::mountpoint::place;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// When a mount that is in use goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// Not while it is in use.
    Now,
    /// From the tree at once, altogether when the last file in it is closed.
    Lazy,
}

/// Why a mount stays.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnmountError {
    /// No mount there.
    #[error("`{}` is not mounted: `mount-ckpt status` lists what is", .0.display())]
    NotMounted(PathBuf),
    /// A mount that this program did not make.
    #[error(
        "`{}` is a mount of type `{fs_type}`, expected `fuse.mount-ckpt`: take it down with umount(8)",
        .at.display()
    )]
    Foreign {
        /// The mount point.
        at: PathBuf,
        /// Type of the mount.
        fs_type: String,
    },
    /// Files in it are open, or it is somebody's working directory.
    #[error(
        "`{0}` is in use: end what uses it (`fuser -vm {0}` lists it), or detach it with \
         `mount-ckpt umount --lazy {0}`"
    )]
    Busy(String),
    /// Neither we nor fusermount3 may.
    #[error("cannot unmount `{}`: {why}", .at.display())]
    Refused {
        /// The mount point.
        at: PathBuf,
        /// What was said.
        why: String,
    },
    /// The mount table cannot be read.
    #[error("cannot read the mount table: {0}")]
    Table(#[from] io::Error),
}

/// Takes down the topmost mount at `at`, if it is ours.
///
/// # Errors
/// Where it is not there, not ours, in use, or may not be taken down by this user.
pub(crate) fn unmount(at: &Path, how: Unmount) -> Result<(), UnmountError> {
    let at = place(at);
    let table = mountinfo::read()?;
    let entry = mountinfo::topmost(&table, &at);
    let entry = entry.ok_or_else(|| UnmountError::NotMounted(at.clone()))?;
    if !entry.is_ours() {
        return Err(UnmountError::Foreign { at, fs_type: entry.fs_type.clone() });
    }
    unmount_entry(entry, how)
}

fn unmount_entry(entry: &MountEntry, how: Unmount) -> Result<(), UnmountError> {
    let at = &entry.at;
    let lazy = match how {
        Unmount::Now => MntFlags::empty(),
        Unmount::Lazy => MntFlags::MNT_DETACH,
    };
    match umount2(at, MntFlags::UMOUNT_NOFOLLOW | lazy) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(UnmountError::Busy(at.display().to_string())),
        Err(Errno::EPERM) => by_fusermount(at, how),
        Err(errno) => Err(UnmountError::Refused { at: at.clone(), why: errno.desc().to_owned() }),
    }
}

/// The helper that takes down a user's own mounts for him.
fn by_fusermount(at: &Path, how: Unmount) -> Result<(), UnmountError> {
    let run = |program: &str| {
        let lazy = (how == Unmount::Lazy).then_some("-z");
        // The helper's message decides between busy and refused: it has to be the English one.
        Command::new(program)
            .env("LC_ALL", "C")
            .arg("-u")
            .args(lazy)
            .arg("--")
            .arg(at)
            .stdin(Stdio::null())
            .output()
    };
    let refused = |why: String| UnmountError::Refused { at: at.to_owned(), why };
    let output = run("fusermount3").or_else(|_| run("fusermount")).map_err(|error| {
        refused(format!("root alone may do it without `fusermount3`, which does not run: {error}"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(UnmountError::Busy(at.display().to_string()));
    }
    Err(refused(said.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_ours_stays() {
        let error = unmount(Path::new("/proc"), Unmount::Now).unwrap_err();
        assert!(matches!(&error, UnmountError::Foreign { fs_type, .. } if fs_type == "proc"));
        let dir = tempfile::tempdir().unwrap();
        let error = unmount(dir.path(), Unmount::Lazy).unwrap_err();
        assert!(matches!(error, UnmountError::NotMounted(_)));
    }
}
