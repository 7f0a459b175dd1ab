//! What has to hold before a mount is tried. Each refusal says what to do about it.

use super::MountOptions;
use super::mountinfo::{self, MountEntry};
use fuser::{MountOption, SessionACL};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Why a mount is not tried.
#[derive(Debug, thiserror::Error)]
pub enum MountPointError {
    /// Nothing there.
    #[error("mount point `{0}` does not exist: create it with `mkdir -p {0}`")]
    Absent(String),
    /// A file or a device.
    #[error("mount point `{0}` is not a directory: give an empty directory")]
    NotADirectory(String),
    /// A directory with something in it, which the mount would hide.
    #[error(
        "mount point `{0}` is not empty: give an empty directory, or `-o nonempty` to hide what is \
         in it while it is mounted"
    )]
    NotEmpty(String),
    /// One of our mounts is there and up.
    #[error(
        "`{at}` already shows `{shows}`: give another mount point, or first `mount-ckpt umount {at}`"
    )]
    Mounted {
        /// The mount point.
        at: String,
        /// The source of the mount that is there.
        shows: String,
    },
    /// Another process has checked the mount point and not mounted yet.
    #[error(
        "another `mount-ckpt` is mounting at `{0}` just now: wait for it, or give another mount point"
    )]
    Taken(String),
    /// A mount whose process is gone.
    #[error(
        "`{0}` is left over from a mount whose process died: `mount-ckpt umount {0}`, then mount again"
    )]
    Stale(String),
    /// The mount would be inside what it reads.
    #[error("mount point `{at}` is inside the checkpoint `{source_dir}`: give one outside")]
    Inside {
        /// The mount point.
        at: String,
        /// The checkpoint.
        source_dir: String,
    },
    /// The mount would hide what it reads.
    #[error("mount point `{at}` would hide the checkpoint `{source_dir}` in it: give another one")]
    Hides {
        /// The mount point.
        at: String,
        /// The checkpoint.
        source_dir: String,
    },
    /// The kernel has no FUSE, or the container does not show it.
    #[error(
        "`{0}` is missing: load the module with `modprobe fuse`, or give the container \
         `--device /dev/fuse --cap-add SYS_ADMIN`"
    )]
    NoDevice(String),
    /// FUSE is there and closed to us.
    #[error(
        "`{device}` may not be opened ({why}): in a container, give it `--device /dev/fuse --cap-add \
         SYS_ADMIN`; elsewhere, mount as root or have the device's mode set to 0666"
    )]
    DeviceRefused {
        /// Path of the device.
        device: String,
        /// What the system said.
        why: io::Error,
    },
    /// The helper that mounts for users other than root.
    #[error(
        "`fusermount3` is missing, which mounts where root does not: install the package `fuse3`, \
         or mount as root"
    )]
    NoFusermount,
    /// `allow_other` by a user, where root has not allowed it.
    #[error(
        "a mount that others than its owner may see needs the line `user_allow_other` in `{0}`: have \
         root add it"
    )]
    AllowOther(String),
    /// Something that cannot be looked at.
    #[error("cannot look at mount point `{at}`: {why}")]
    Io {
        /// The mount point.
        at: String,
        /// What the system said.
        why: io::Error,
    },
}

/// The absolute path of a mount point that a view of `source` may be mounted at.
///
/// `source` is an absolute path without symlinks in it.
///
/// # Errors
/// Where the mount would not do what is wanted. A mount point that holds another kind of mount is
/// fine: what a container has for a volume is one.
pub(crate) fn check(at: &Path, source: &Path, nonempty: bool) -> Result<PathBuf, MountPointError> {
    let place = place(at);
    let shown = place.display().to_string();
    let io = |why: io::Error| match why.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => MountPointError::Absent(shown.clone()),
        Some(Errno::ENOTCONN) => MountPointError::Stale(shown.clone()),
        _ => MountPointError::Io { at: shown.clone(), why },
    };
    let table = mountinfo::read().map_err(io)?;
    if let Some(entry) = mountinfo::topmost(&table, &place).filter(|entry| entry.is_ours()) {
        if !is_alive(entry) {
            return Err(MountPointError::Stale(shown));
        }
        let shows = entry.source.to_string_lossy().into_owned();
        return Err(MountPointError::Mounted { at: shown, shows });
    }
    if !place.metadata().map_err(io)?.is_dir() {
        return Err(MountPointError::NotADirectory(shown));
    }
    let source_dir = source.display().to_string();
    if place.starts_with(source) {
        return Err(MountPointError::Inside { at: shown, source_dir });
    }
    if source.starts_with(&place) {
        return Err(MountPointError::Hides { at: shown, source_dir });
    }
    if !nonempty && place.read_dir().map_err(io)?.next().is_some() {
        return Err(MountPointError::NotEmpty(shown));
    }
    Ok(place)
}

/// A mount point that no other process of ours mounts at while this is held.
#[derive(Debug)]
pub(crate) struct Claim(Option<Flock<File>>);

/// Claims a mount point, so that between [`check`] and the mount nobody mounts there too.
///
/// # Errors
/// Where another process has claimed it. A directory that cannot be locked, as on some network file
/// systems, counts as claimed by us.
pub(crate) fn claim(at: &Path) -> Result<Claim, MountPointError> {
    let Ok(directory) = File::open(at) else { return Ok(Claim(None)) };
    match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Claim(Some(lock))),
        Err((_, Errno::EWOULDBLOCK)) => {
            Err(MountPointError::Taken(place(at).display().to_string()))
        }
        Err(_) => Ok(Claim(None)),
    }
}

impl Claim {
    /// The mount is up, and [`check`] sees it.
    pub(crate) fn release(self) {
        drop(self.0);
    }
}

/// The path under which a mount point stands in the mount table, also where its mount is dead and
/// cannot be looked at.
pub(crate) fn place(at: &Path) -> PathBuf {
    at.canonicalize().unwrap_or_else(|_| {
        let at = std::path::absolute(at).unwrap_or_else(|_| at.to_owned());
        match (at.parent().and_then(|parent| parent.canonicalize().ok()), at.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => at,
        }
    })
}

/// Whether a process answers for the mount.
///
/// Asks for statfs, the one request that the kernel never answers from what it keeps.
pub(crate) fn is_alive(entry: &MountEntry) -> bool {
    nix::sys::statvfs::statvfs(&entry.at) != Err(Errno::ENOTCONN)
}

/// What a mount needs of the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    /// Others than the one who mounts shall see the mount.
    pub others: bool,
    /// fusermount3 shall unmount when the process dies.
    pub auto_unmount: bool,
}

impl Needs {
    /// What a mount with these options needs.
    pub(crate) fn of(options: &MountOptions) -> Needs {
        Needs {
            others: options.acl != SessionACL::Owner,
            auto_unmount: options.extra.contains(&MountOption::AutoUnmount),
        }
    }
}

/// Checks that this machine and this user can mount.
///
/// # Errors
/// Where they cannot.
pub(crate) fn check_machine(needs: Needs) -> Result<(), MountPointError> {
    let root = nix::unistd::geteuid().is_root();
    check_device(Path::new("/dev/fuse"))?;
    if (!root || needs.auto_unmount) && !has_fusermount() {
        return Err(MountPointError::NoFusermount);
    }
    if !root && needs.others {
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
    fn an_empty_directory_will_do() {
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
        assert!(error.contains("is not empty") && error.contains("`-o nonempty`"), "{error}");
    }

    #[test]
    fn one_process_at_a_time_claims_a_mount_point() {
        let root = tempfile::tempdir().unwrap();
        let held = claim(root.path()).unwrap();
        let error = claim(root.path()).unwrap_err().to_string();
        assert!(error.contains("is mounting at"), "{error}");
        held.release();
        claim(root.path()).unwrap().release();
        claim(&root.path().join("absent")).unwrap().release();
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
    fn user_allow_other_has_to_stand_in_the_configuration() {
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
