//! The life of one mount: made, waited for, taken away.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::statfs;

use super::splice::Device;

/// How the kernel shows a view.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Threads that answer requests; at least 1.
    pub threads: usize,
    /// Bytes that the kernel reads ahead, which is also its largest request for a mapped file.
    /// 0 leaves the kernel's own choice; so does a process that may not change it.
    pub read_ahead: u64,
    /// Shards are read past the page cache.
    pub direct_io: bool,
    /// Who may see the mount.
    pub acl: SessionACL,
    /// What the mount table shows as the source; `None` is the directory of the checkpoint.
    pub fs_name: Option<String>,
    /// Options beside `ro`, `nosuid`, `nodev`, `noatime` and `default_permissions`, which hold
    /// unless their opposite is given here.
    pub extra: Vec<MountOption>,
}

impl Default for MountOptions {
    /// A request thread for each core, read-ahead of 4 MiB, through the page cache, for the user who
    /// mounts.
    fn default() -> MountOptions {
        MountOptions {
            threads: thread::available_parallelism().map_or(1, usize::from),
            read_ahead: 4 << 20,
            direct_io: false,
            acl: SessionACL::Owner,
            fs_name: None,
            extra: Vec::new(),
        }
    }
}

/// A file system that [`mount_filesystem`] mounts.
pub trait Mountable: fuser::Filesystem {
    /// Where the descriptor is noted through which it may answer by itself.
    fn device(&self) -> Device {
        Device::default()
    }

    /// What the mount table shows as the source, where the options do not say it.
    fn source(&self) -> String;
}

/// A mount that is up, or was. Dropped, it takes the mount away.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
    end: Arc<End>,
}

/// What the session's thread leaves behind.
#[derive(Debug, Default)]
struct End {
    result: Mutex<Option<io::Result<()>>>,
    reached: Condvar,
}

impl End {
    fn reach(&self, result: io::Result<()>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.reached.notify_all();
    }

    /// The session's result, once there is one; `None` after `timeout`.
    fn wait(&self, timeout: Option<Duration>) -> Option<io::Result<()>> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match (&*result, deadline) {
                (Some(Ok(())), _) => return Some(Ok(())),
                (Some(Err(e)), _) => return Some(Err(io::Error::new(e.kind(), e.to_string()))),
                (None, None) => {
                    result = self.reached.wait(result).unwrap_or_else(PoisonError::into_inner);
                }
                (None, Some(deadline)) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    let waited = self.reached.wait_timeout(result, left);
                    result = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}

impl Mounted {
    /// The mount point, absolute.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// Returns once the mount is gone, whoever took it away.
    ///
    /// # Errors
    /// What ended the session, where that was not an unmount.
    pub fn wait(&self) -> io::Result<()> {
        self.end.wait(None).unwrap_or(Ok(()))
    }

    /// As [`Mounted::wait`]; `None` where the mount is still up after `timeout`.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<io::Result<()>> {
        self.end.wait(Some(timeout))
    }

    /// Unmounts, as `umount` does. Callers of [`Mounted::wait`] return when that is done.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] where a file is open or a process stands in the mount, which
    /// then stays.
    pub fn unmount(&self) -> io::Result<()> {
        self.take_away(false)
    }

    /// Takes the mount out of the tree, as `umount -l` does: files that are open stay readable,
    /// and the session ends when the last is closed.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn detach(&self) -> io::Result<()> {
        self.take_away(true)
    }

    fn take_away(&self, lazy: bool) -> io::Result<()> {
        if self.wait_timeout(Duration::ZERO).is_some() {
            return Ok(());
        }
        let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        match umount2(&self.at, flags | MntFlags::UMOUNT_NOFOLLOW) {
            // What an ordinary user mounted, the setuid helper takes away.
            Err(Errno::EPERM) => fusermount(&self.at, lazy),
            Err(e) => Err(e.into()),
            Ok(()) => Ok(()),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(e) = self.detach() {
            tracing::warn!("cannot unmount `{}`: {e}", self.at.display());
        }
    }
}

fn fusermount(at: &Path, lazy: bool) -> io::Result<()> {
    let output = Command::new("fusermount3")
        .arg(if lazy { "-uz" } else { "-u" })
        .arg("--")
        .arg(at)
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    // The helper tells only in words, which it takes from strerror(EBUSY).
    let busy = text.contains("busy");
    let kind = if busy { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, text))
}

/// Mounts a file system at the directory `at` and returns once the kernel has it. Threads of this
/// process answer its requests from then on, so a process that forks has to fork before.
///
/// # Errors
/// Where `at` cannot be mounted on, or the options contradict each other.
pub fn mount_filesystem(
    filesystem: impl Mountable,
    at: &Path,
    options: &MountOptions,
) -> io::Result<Mounted> {
    let at = fs::canonicalize(at)?;
    let device = filesystem.device();
    let name = options.fs_name.clone().unwrap_or_else(|| filesystem.source());
    let session = Session::new(filesystem, &at, &config(options, &name))?;
    if let Err(e) = device.set(session.as_fd()) {
        tracing::debug!("replies are not spliced: {e}");
    }
    // The session's threads have the policy of the one that starts them.
    let start = || {
        if !options.direct_io {
            interrupt_nobody();
        }
        session.spawn()
    };
    let started = thread::scope(|scope| scope.spawn(start).join());
    let threads = keep_mounted(started.map_err(|_| io::Error::other("fuser panicked"))??);
    let end = Arc::new(End::default());
    let (reached, point) = (Arc::clone(&end), at.clone());
    thread::Builder::new().name("fuse-session".to_owned()).spawn(move || {
        let panicked = |_| Err(io::Error::other("a session thread panicked"));
        let result = threads.join().unwrap_or_else(panicked);
        reached.reach(result.or_else(|e| if was_unmounted(&e, &point) { Ok(()) } else { Err(e) }));
    })?;
    let mounted = Mounted { at, end };
    if options.read_ahead > 0
        && let Err(e) = set_read_ahead(&mounted.at, options.read_ahead)
    {
        tracing::debug!("kernel read-ahead of `{}` stays as it is: {e}", mounted.at.display());
    }
    Ok(mounted)
}

/// Has this thread, and those that it starts, wait for a processor instead of taking it from a reader.
///
/// A reader whose page is there is else interrupted as soon as it makes the kernel read ahead; it then
/// waits until all of that is answered, and leaves nothing to do meanwhile for the threads that answered.
/// A mapped copy on two cores is a tenth faster so (2.6 to 2.8 GB/s of FP8, 3.5 to 3.9 verbatim), several
/// readers are as fast. Readers past the page cache wait for each answer anyway: a quarter slower.
#[allow(unsafe_code, reason = "no crate among the dependencies has a safe call")]
fn interrupt_nobody() {
    // The kernel's `struct sched_param`. The C library's is another in musl, whose function of this
    // name fails always.
    let priority: libc::c_int = 0;
    let (call, batch) = (libc::SYS_sched_setscheduler, libc::SCHED_BATCH);
    // SAFETY: 0 is the calling thread, and the parameters live longer than the call.
    if unsafe { libc::syscall(call, 0, batch, &raw const priority) } != 0 {
        tracing::debug!("threads interrupt readers: {}", io::Error::last_os_error());
    }
}

/// Whether a session that ended in `error` ended because its mount at `at` was taken away.
///
/// A thread that comes late to the end, when another has closed its queue, reads ECONNABORTED and not
/// ENODEV. So it does where somebody aborts the connection, but then the mount is still there: it
/// asks its file system, not what the kernel remembers of it.
fn was_unmounted(error: &io::Error, at: &Path) -> bool {
    error.raw_os_error() == Some(Errno::ECONNABORTED as i32)
        && !matches!(statfs(at), Err(Errno::ENOTCONN | Errno::ECONNABORTED))
}

/// The session's threads, without what fuser does when it drops a session: it unmounts whatever is
/// at the mount point by then, which may be the next mount. (It asks the device whether its own is
/// still up, and takes every answer for yes.) [`Mounted`] unmounts; nothing else has to.
fn keep_mounted(mut session: BackgroundSession) -> JoinHandle<io::Result<()>> {
    let threads = mem::replace(&mut session.guard, thread::spawn(|| Ok(())));
    mem::forget(session);
    threads
}

fn config(options: &MountOptions, name: &str) -> Config {
    use MountOption::*;

    let mut config = Config::default();
    config.mount_options = options.extra.clone();
    for (option, opposite) in [(RO, RW), (NoSuid, Suid), (NoDev, Dev), (NoAtime, Atime)] {
        if !options.extra.contains(&opposite) && !options.extra.contains(&option) {
            config.mount_options.push(option);
        }
    }
    if !options.extra.contains(&DefaultPermissions) {
        config.mount_options.push(DefaultPermissions);
    }
    config.mount_options.push(FSName(fs_name(name)));
    // As an option of the kernel, so that the type is `fuse.mount-ckpt` without the helper too.
    config.mount_options.push(CUSTOM("subtype=mount-ckpt".to_owned()));
    config.acl = options.acl;
    config.n_threads = Some(options.threads.max(1));
    // One queue for all threads, so that any may answer through [`Device`]: as fast as a queue for each
    // (two readers past the page cache of the null file system: 14.3 GB/s both).
    config.clone_fd = false;
    config
}

/// The helper, through which an ordinary user mounts, splits its options at commas.
fn fs_name(name: &str) -> String {
    if nix::unistd::geteuid().is_root() {
        return name.to_owned();
    }
    name.replace('\\', "\\\\").replace(',', "\\,")
}

/// Sets the read-ahead of the device that a mount is. INIT offers 128 KiB and can only lower it.
fn set_read_ahead(at: &Path, bytes: u64) -> io::Result<()> {
    let device = fs::metadata(at)?.dev();
    let file = format!("/sys/class/bdi/{}:{}/read_ahead_kb", major(device), minor(device));
    fs::write(file, (bytes / 1024).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(extra: Vec<MountOption>) -> MountOptions {
        MountOptions { extra, ..MountOptions::default() }
    }

    #[test]
    fn defaults_yield_to_their_opposites_and_occur_once() {
        use MountOption::*;

        let of = |extra: &[MountOption]| config(&options(extra.to_vec()), "/source").mount_options;
        let named = [FSName("/source".to_owned()), CUSTOM("subtype=mount-ckpt".to_owned())];
        for (extra, expected) in [
            (vec![], vec![RO, NoSuid, NoDev, NoAtime, DefaultPermissions]),
            (vec![Atime, NoExec], vec![Atime, NoExec, RO, NoSuid, NoDev, DefaultPermissions]),
            (
                vec![RO, DefaultPermissions, Suid, Dev],
                vec![RO, DefaultPermissions, Suid, Dev, NoAtime],
            ),
        ] {
            assert_eq!(of(&extra), [&expected[..], &named[..]].concat(), "{extra:?}");
        }
    }

    #[test]
    fn the_end_is_seen_by_all_who_wait() {
        let end = End::default();
        assert!(end.wait(Some(Duration::from_millis(1))).is_none());
        thread::scope(|scope| {
            let waiters = [None, Some(Duration::from_secs(60))].map(|timeout| {
                scope.spawn({
                    let end = &end;
                    move || end.wait(timeout)
                })
            });
            end.reach(Err(io::Error::new(io::ErrorKind::NotConnected, "gone")));
            for waiter in waiters {
                let result = waiter.join().expect("no panic").expect("ended");
                assert_eq!(result.expect_err("an error").kind(), io::ErrorKind::NotConnected);
            }
        });
    }
}
