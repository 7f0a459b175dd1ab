//! Checks before a mount: the mount point, the FUSE device, the helper `fusermount3`.
//!
//! The kernel's own errors for these cases are hard to act on (EPERM, ENOENT). Each error here says
//! what is wrong and what to do about it.

use super::MountOptions;
use super::mountinfo::{self, MountEntry};
use fuser::{MountOption, SessionACL};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Why a mount is refused before it is tried.
#[derive(Debug, thiserror::Error)]
pub enum MountPointError {
    /// The path does not exist.
    #[error("mount point `{0}` does not exist: create it with `mkdir -p {0}`")]
    Absent(String),
    /// The path is a file or a device.
    #[error("mount point `{0}` is not a directory: give an empty directory")]
    NotADirectory(String),
    /// The directory has entries, which the mount would hide.
    #[error(
        "mount point `{0}` is not empty, and a mount would hide what is in it: give an empty directory"
    )]
    NotEmpty(String),
    /// One of our mounts is there and answers.
    #[error(
        "`{at}` already shows `{shows}`: give another mount point, or run `mount-ckpt umount {at}` first"
    )]
    AlreadyMounted {
        /// The mount point.
        at: String,
        /// The source of the mount that is there.
        shows: String,
    },
    /// Another process of ours holds the lock of the mount point ([`lock`]).
    #[error(
        "another `mount-ckpt` is mounting at `{0}` just now: wait for it, or give another mount point"
    )]
    Locked(String),
    /// One of our mounts is there, but its process is gone.
    #[error(
        "`{0}` is left over from a mount whose process died: run `mount-ckpt umount {0}`, then mount again"
    )]
    Stale(String),
    /// The mount point is inside the checkpoint.
    #[error("mount point `{at}` is inside the checkpoint `{source_dir}`: give one outside")]
    Inside {
        /// The mount point.
        at: String,
        /// The checkpoint.
        source_dir: String,
    },
    /// The checkpoint is inside the mount point, so the mount would hide it.
    #[error("a mount at `{at}` would hide the checkpoint `{source_dir}`: give another mount point")]
    Hides {
        /// The mount point.
        at: String,
        /// The checkpoint.
        source_dir: String,
    },
    /// The kernel module is not loaded, or the container has no FUSE device.
    #[error(
        "`{0}` is missing: load the module with `modprobe fuse`, or give the container \
         `--device /dev/fuse --cap-add SYS_ADMIN`"
    )]
    NoDevice(String),
    /// This process may not open the FUSE device.
    #[error(
        "`{device}` may not be opened ({why}): in a container, give it `--device /dev/fuse --cap-add \
         SYS_ADMIN`; elsewhere, mount as root, or ask root to run `chmod 0666 {device}`"
    )]
    DeviceRefused {
        /// Path of the device.
        device: String,
        /// The error of the system.
        why: io::Error,
    },
    /// The set-user-id helper is not installed. It mounts for users other than root, and unmounts after
    /// a process that died.
    #[error(
        "`fusermount3` is missing, which users other than root need to mount: install the package \
         `fuse3`, or mount as root"
    )]
    NoFusermount,
    /// The options let other users access the mount, which root has not allowed to this user.
    #[error(
        "a mount that other users can access needs the line `user_allow_other` in `{0}`: ask root to \
         add it"
    )]
    AllowOther(String),
    /// The mount point or the mount table cannot be examined.
    #[error("cannot examine mount point `{at}`: {why}")]
    Io {
        /// The mount point.
        at: String,
        /// The error of the system.
        why: io::Error,
    },
}

/// Checks that a view of the checkpoint directory `source` can be mounted at `at`, and returns the
/// absolute path of `at`.
///
/// `source` is absolute and contains no symlinks. `nonempty` permits a directory with entries. A mount
/// point on which another kind of file system is mounted is fine: volumes of containers are.
///
/// # Errors
/// One [`MountPointError`] for each thing that can be wrong with a mount point.
pub(crate) fn check(at: &Path, source: &Path, nonempty: bool) -> Result<PathBuf, MountPointError> {
    let path = path_in_table(at);
    let shown = path.display().to_string();
    let io = |why: io::Error| match why.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => MountPointError::Absent(shown.clone()),
        Some(Errno::ENOTCONN) => MountPointError::Stale(shown.clone()),
        _ => MountPointError::Io { at: shown.clone(), why },
    };
    let table = mountinfo::read().map_err(io)?;
    if let Some(entry) = mountinfo::topmost(&table, &path).filter(|entry| entry.is_ours()) {
        if !is_alive(entry) {
            return Err(MountPointError::Stale(shown));
        }
        let shows = entry.source.to_string_lossy().into_owned();
        return Err(MountPointError::AlreadyMounted { at: shown, shows });
    }
    if !path.metadata().map_err(io)?.is_dir() {
        return Err(MountPointError::NotADirectory(shown));
    }
    let source_dir = source.display().to_string();
    if path.starts_with(source) {
        return Err(MountPointError::Inside { at: shown, source_dir });
    }
    if source.starts_with(&path) {
        return Err(MountPointError::Hides { at: shown, source_dir });
    }
    if !nonempty && path.read_dir().map_err(io)?.next().is_some() {
        return Err(MountPointError::NotEmpty(shown));
    }
    Ok(path)
}

/// An exclusive lock on a mount point: while it is held, no other process of ours mounts there.
#[derive(Debug)]
pub(crate) struct MountPointLock(Option<Flock<File>>);

/// Locks a mount point with `flock`, so that two processes cannot both pass [`check`] before either
/// has mounted. A directory that cannot be locked, as on some network file systems, is used without
/// a lock.
///
/// # Errors
/// [`MountPointError::Locked`]: another process holds the lock.
pub(crate) fn lock(at: &Path) -> Result<MountPointLock, MountPointError> {
    let Ok(directory) = File::open(at) else { return Ok(MountPointLock(None)) };
    match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(MountPointLock(Some(lock))),
        Err((_, Errno::EWOULDBLOCK)) => {
            Err(MountPointError::Locked(path_in_table(at).display().to_string()))
        }
        Err(_) => Ok(MountPointLock(None)),
    }
}

impl MountPointLock {
    /// Releases the lock once the mount is up: from then on [`check`] finds it in the mount table.
    pub(crate) fn release(self) {
        drop(self.0);
    }
}

/// The path that a mount at `at` has in the mount table: absolute, without symlinks. It is also found
/// if the mount's process is gone, in which case the path itself can no longer be resolved.
pub(crate) fn path_in_table(at: &Path) -> PathBuf {
    at.canonicalize().unwrap_or_else(|_| {
        let at = std::path::absolute(at).unwrap_or_else(|_| at.to_owned());
        match (at.parent().and_then(|parent| parent.canonicalize().ok()), at.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => at,
        }
    })
}

/// Whether a process still serves the mount. Asks with `statvfs`, which the kernel never answers from
/// its caches. Waits if the process hangs.
pub(crate) fn is_alive(entry: &MountEntry) -> bool {
    nix::sys::statvfs::statvfs(&entry.at) != Err(Errno::ENOTCONN)
}

/// What mount options require of the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Requirements {
    /// Users other than the mounting one can access the mount.
    pub other_users: bool,
    /// fusermount3 unmounts when the process dies.
    pub auto_unmount: bool,
}

impl Requirements {
    /// The requirements of `options`.
    pub(crate) fn of(options: &MountOptions) -> Requirements {
        Requirements {
            other_users: options.acl != SessionACL::Owner,
            auto_unmount: options.extra.contains(&MountOption::AutoUnmount),
        }
    }
}

/// Checks that this user can mount on this machine.
///
/// # Errors
/// The FUSE device, `fusermount3` or the permission of root is missing.
pub(crate) fn check_machine(requirements: Requirements) -> Result<(), MountPointError> {
    let root = nix::unistd::geteuid().is_root();
    check_device(Path::new("/dev/fuse"))?;
    if (!root || requirements.auto_unmount) && !has_fusermount() {
        return Err(MountPointError::NoFusermount);
    }
    if !root && requirements.other_users {
        check_conf(Path::new("/etc/fuse.conf"))?;
    }
    Ok(())
}

fn check_device(device: &Path) -> Result<(), MountPointError> {
    let shown = || device.display().to_string();
    let opened = OpenOptions::new().read(true).write(true).open(device);
    opened.map(drop::<File>).map_err(|why| match why.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => MountPointError::NoDevice(shown()),
        _ => MountPointError::DeviceRefused { device: shown(), why },
    })
}

fn check_conf(conf: &Path) -> Result<(), MountPointError> {
    let text = std::fs::read_to_string(conf).unwrap_or_default();
    if text.lines().any(|line| line.trim() == "user_allow_other") {
        return Ok(());
    }
    Err(MountPointError::AllowOther(conf.display().to_string()))
}

fn has_fusermount() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"].map(PathBuf::from);
    let named = std::env::var_os("FUSERMOUNT_PATH").map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .flat_map(|dir| [dir.join("fusermount3"), dir.join("fusermount")])
        .chain(named)
        .any(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_directory_is_accepted() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("a/mnt")).unwrap();
        std::os::unix::fs::symlink(root.join("a"), root.join("link")).unwrap();
        let source = root.join("source");
        for at in ["a/mnt", "link/mnt", "a/../a/mnt"] {
            assert_eq!(check(&root.join(at), &source, false).unwrap(), root.join("a/mnt"), "{at}");
        }
        std::fs::write(root.join("a/mnt/file"), "").unwrap();
        assert_eq!(check(&root.join("a/mnt"), &source, true).unwrap(), root.join("a/mnt"));
    }

    #[test]
    fn refusals_say_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("source/inside")).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        let table = [
            ("absent", "does not exist: create it with `mkdir -p"),
            ("absent/deep", "does not exist: create it with `mkdir -p"),
            ("file", "is not a directory"),
            ("source", "is inside the checkpoint"),
            ("source/inside", "is inside the checkpoint"),
            ("", "would hide the checkpoint"),
        ];
        for (at, message) in table {
            let error = check(&root.join(at), &root.join("source"), false).unwrap_err().to_string();
            assert!(error.contains(message), "{at}: {error}");
        }
        let error = check(&root, Path::new("/elsewhere"), false).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
    }

    #[test]
    fn one_process_at_a_time_locks_a_mount_point() {
        let root = tempfile::tempdir().unwrap();
        let held = lock(root.path()).unwrap();
        let error = lock(root.path()).unwrap_err().to_string();
        assert!(error.contains("is mounting at"), "{error}");
        held.release();
        lock(root.path()).unwrap().release();
        lock(&root.path().join("absent")).unwrap().release();
    }

    #[test]
    fn a_missing_device_names_modprobe() {
        let root = tempfile::tempdir().unwrap();
        let error = check_device(&root.path().join("fuse")).unwrap_err().to_string();
        assert!(error.contains("modprobe fuse") && error.contains("--device /dev/fuse"), "{error}");
        let error = check_device(root.path()).unwrap_err().to_string();
        assert!(error.contains("may not be opened"), "{error}");
    }

    #[test]
    fn allow_other_needs_user_allow_other_in_fuse_conf() {
        let root = tempfile::tempdir().unwrap();
        let conf = root.path().join("fuse.conf");
        assert!(check_conf(&conf).is_err());
        for (text, allowed) in [
            ("", false),
            ("#user_allow_other\n", false),
            ("# user_allow_other is below\nmount_max = 1000\n", false),
            ("mount_max = 1000\n user_allow_other \n", true),
        ] {
            std::fs::write(&conf, text).unwrap();
            assert_eq!(check_conf(&conf).is_ok(), allowed, "{text:?}");
        }
    }
}
