//! Unmounts one of our mounts by its path, from the process that serves it or from another.

use super::mountinfo::{self, MountEntry};
use super::mountpoint::path_in_table;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What happens to a mount that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// It stays, and unmounting fails with [`UnmountError::Busy`].
    Now,
    /// It is detached: its path is free at once, and the mount ends when its last file is closed.
    Lazy,
}

/// Why a mount was not unmounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnmountError {
    /// Nothing is mounted at the path.
    #[error("`{}` is not mounted: `mount-ckpt status` lists the mounts", .0.display())]
    NotMounted(PathBuf),
    /// Another program made the mount.
    #[error(
        "`{}` is not our mount: expected type `fuse.mount-ckpt`, got `{fs_type}`; unmount it with umount(8)",
        .at.display()
    )]
    Foreign {
        /// The mount point.
        at: PathBuf,
        /// Type of the mount.
        fs_type: String,
    },
    /// A file in it is open, or a process has its working directory there.
    #[error("`{0}` is in use: end the processes that use it (`fuser -vm {0}` lists them)")]
    Busy(String),
    /// The system or fusermount3 refuses.
    #[error("cannot unmount `{}`: {why}", .at.display())]
    Refused {
        /// The mount point.
        at: PathBuf,
        /// The error of the system, or the message of fusermount3.
        why: String,
    },
    /// The mount table cannot be read.
    #[error("cannot read the mount table: {0}")]
    Table(#[from] io::Error),
}

/// Unmounts the topmost mount at `at`, if it is ours.
///
/// # Errors
/// Nothing is mounted there, the mount is not ours or in use, or this user may not unmount it.
pub(crate) fn unmount(at: &Path, how: Unmount) -> Result<(), UnmountError> {
    let at = path_in_table(at);
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

/// Unmounts through the set-user-id helper, as users other than root have to.
fn by_fusermount(at: &Path, how: Unmount) -> Result<(), UnmountError> {
    let run = |program: &str| {
        let lazy = (how == Unmount::Lazy).then_some("-z");
        // Only the message tells busy from other failures, so it has to be the English one.
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
        refused(format!("only root can unmount without `fusermount3`, which does not run: {error}"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    if message.contains("busy") {
        return Err(UnmountError::Busy(at.display().to_string()));
    }
    Err(refused(message.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_other_file_systems_are_refused() {
        let error = unmount(Path::new("/proc"), Unmount::Now).unwrap_err();
        assert!(matches!(&error, UnmountError::Foreign { fs_type, .. } if fs_type == "proc"));
        let dir = tempfile::tempdir().unwrap();
        let error = unmount(dir.path(), Unmount::Lazy).unwrap_err();
        assert!(matches!(error, UnmountError::NotMounted(_)));
    }
}
