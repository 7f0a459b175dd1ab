//! One mount, from the `mount` system call to the end of its FUSE session.
//!
//! [`mount_filesystem`] mounts any [`Mountable`], starts the threads that answer requests, and
//! returns a [`Mounted`]: the handle to wait for the end of the mount, or to unmount it.

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

/// How the kernel mounts and reads a view.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Threads that answer requests. 0 counts as 1.
    pub threads: usize,
    /// Kernel read-ahead in bytes, which also bounds the size of one request for a memory-mapped
    /// file. 0 keeps the kernel's default, as does a process that is not allowed to change it.
    pub read_ahead: u64,
    /// Open shards with direct I/O: their bytes bypass the page cache.
    pub direct_io: bool,
    /// Which users may access the mount.
    pub acl: SessionACL,
    /// Source column of the mount table; `None` stands for the checkpoint's directory.
    pub fs_name: Option<String>,
    /// Mount options in addition to `ro`, `nosuid`, `nodev`, `noatime` and `default_permissions`.
    /// The opposite of one of the first four (`rw`, `suid`, `dev`, `atime`) replaces it.
    pub extra: Vec<MountOption>,
}

impl Default for MountOptions {
    /// One request thread per core, 4 MiB of read-ahead, through the page cache, accessible to the
    /// mounting user only.
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

/// A file system that [`mount_filesystem`] can mount.
pub trait Mountable: fuser::Filesystem {
    /// The slot for the FUSE descriptor, which is filled once the file system is mounted. A file
    /// system that splices replies keeps a clone of it.
    fn device(&self) -> Device {
        Device::default()
    }

    /// Source column of the mount table, used if [`MountOptions::fs_name`] is `None`.
    fn source(&self) -> String;
}

/// Handle of a mount. Dropping it detaches the mount ([`Mounted::detach`]).
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
    completion: Arc<Completion>,
}

/// The result of a session, set once by the thread that joins the session's threads.
#[derive(Debug, Default)]
struct Completion {
    result: Mutex<Option<io::Result<()>>>,
    completed: Condvar,
}

impl Completion {
    fn complete(&self, result: io::Result<()>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.completed.notify_all();
    }

    /// Waits for the session's result; `None` after `timeout`.
    fn wait(&self, timeout: Option<Duration>) -> Option<io::Result<()>> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match (&*result, deadline) {
                (Some(Ok(())), _) => return Some(Ok(())),
                (Some(Err(e)), _) => return Some(Err(io::Error::new(e.kind(), e.to_string()))),
                (None, None) => {
                    result = self.completed.wait(result).unwrap_or_else(PoisonError::into_inner);
                }
                (None, Some(deadline)) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    let waited = self.completed.wait_timeout(result, left);
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

    /// Waits until the session has ended: the mount was unmounted, by this process or another, and
    /// its last open file was closed.
    ///
    /// # Errors
    /// The error that ended the session, if it was not ended by an unmount.
    pub fn wait(&self) -> io::Result<()> {
        self.completion.wait(None).unwrap_or(Ok(()))
    }

    /// Like [`Mounted::wait`], but returns `None` if the session has not ended after `timeout`.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<io::Result<()>> {
        self.completion.wait(Some(timeout))
    }

    /// Unmounts, as `umount` does. The session then ends, and [`Mounted::wait`] returns.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if a file in the mount is open or a process has its working
    /// directory there; the mount then stays. Any other error of the system call or of
    /// `fusermount3`.
    pub fn unmount(&self) -> io::Result<()> {
        self.unmount_with(false)
    }

    /// Detaches the mount, as `umount -l` does: its path is free at once, open files stay readable,
    /// and the session ends when the last of them is closed.
    ///
    /// # Errors
    /// Any error of the system call or of `fusermount3`.
    pub fn detach(&self) -> io::Result<()> {
        self.unmount_with(true)
    }

    fn unmount_with(&self, lazy: bool) -> io::Result<()> {
        if self.wait_timeout(Duration::ZERO).is_some() {
            return Ok(());
        }
        let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        match umount2(&self.at, flags | MntFlags::UMOUNT_NOFOLLOW) {
            // Users other than root unmount through the set-user-id helper.
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
    // fusermount3 exits with 1 for every failure; only its message, strerror(EBUSY), tells busy.
    let busy = text.contains("busy");
    let kind = if busy { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, text))
}

/// Mounts a file system at the directory `at` and returns once the kernel has accepted it. From then
/// on threads of this process answer its requests, so a process that forks has to fork before.
///
/// # Errors
/// The kernel or `fusermount3` refuses the mount, or the options contradict each other.
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
    // The request threads inherit the scheduling policy of the thread that starts them. That is a
    // short-lived thread, so that the caller keeps its own policy.
    let start = || {
        if !options.direct_io {
            use_batch_scheduling();
        }
        session.spawn()
    };
    let started = thread::scope(|scope| scope.spawn(start).join());
    let started = started.map_err(|_| io::Error::other("fuser panicked"))??;
    let threads = disarm_unmount_on_drop(started);
    let completion = Arc::new(Completion::default());
    let (completed, point) = (Arc::clone(&completion), at.clone());
    thread::Builder::new().name("fuse-session".to_owned()).spawn(move || {
        let panicked = |_| Err(io::Error::other("a session thread panicked"));
        let result = threads.join().unwrap_or_else(panicked);
        let result = result.or_else(|e| if was_unmounted(&e, &point) { Ok(()) } else { Err(e) });
        completed.complete(result);
    })?;
    let mounted = Mounted { at, completion };
    if options.read_ahead > 0
        && let Err(e) = set_read_ahead(&mounted.at, options.read_ahead)
    {
        tracing::debug!("kernel read-ahead of `{}` stays as it is: {e}", mounted.at.display());
    }
    Ok(mounted)
}

/// Switches this thread, and the threads that it starts, to `SCHED_BATCH`, so that waking a request
/// thread does not preempt the reader.
///
/// The kernel's read-ahead sends requests while the reader still has cached pages to copy. If waking
/// a request thread preempts the reader, the reader continues only after all of these requests are
/// answered, and by then the request threads have nothing left to do while it copies. With batch
/// scheduling a mapped copy on two cores is a tenth faster (2.6 to 2.8 GB/s of FP8, 3.5 to 3.9
/// verbatim), and several readers are as fast as before. With direct I/O a reader waits for every
/// reply anyway, and batch scheduling makes it a quarter slower.
#[allow(unsafe_code, reason = "no crate among the dependencies has a safe call")]
fn use_batch_scheduling() {
    // `struct sched_param` of the kernel. That of musl is another one, and its `sched_setscheduler`
    // always fails.
    let priority: libc::c_int = 0;
    let (call, batch) = (libc::SYS_sched_setscheduler, libc::SCHED_BATCH);
    // SAFETY: 0 is the calling thread, and `priority` outlives the call.
    if unsafe { libc::syscall(call, 0, batch, &raw const priority) } != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!("request threads keep their scheduling policy: {error}");
    }
}

/// Whether a session that ended with `error` ended because its mount at `at` was unmounted.
///
/// When the connection to the kernel ends, a thread that waits for a request gets ENODEV, which fuser
/// takes for success, and one that is just receiving a request gets ECONNABORTED. Both happen after an
/// unmount, and also after the connection was aborted (`/sys/fs/fuse/connections/*/abort`), which leaves
/// the mount in place. `statfs`, which the kernel never answers from its caches, tells these apart for
/// ECONNABORTED. With ENODEV an abort looks like an unmount.
fn was_unmounted(error: &io::Error, at: &Path) -> bool {
    error.raw_os_error() == Some(Errno::ECONNABORTED as i32)
        && !matches!(statfs(at), Err(Errno::ENOTCONN | Errno::ECONNABORTED))
}

/// Takes the threads out of a fuser session without fuser's unmount on drop.
///
/// On drop fuser unmounts whatever is mounted at the path by then, which may be a later mount: it
/// checks first whether its own mount is still up, but takes every answer for a yes. [`Mounted`]
/// unmounts instead.
fn disarm_unmount_on_drop(mut session: BackgroundSession) -> JoinHandle<io::Result<()>> {
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
    // As a kernel option, so that the type is `fuse.mount-ckpt` without fusermount3 too.
    config.mount_options.push(CUSTOM("subtype=mount-ckpt".to_owned()));
    config.acl = options.acl;
    config.n_threads = Some(options.threads.max(1));
    // All threads share one descriptor, so that any of them can splice a reply through [`Device`].
    // A descriptor per thread is no faster (two direct I/O readers of the null file system: 14.3
    // GB/s both ways).
    config.clone_fd = false;
    config
}

/// Escapes the source name for fusermount3, which splits its options at commas. As root fuser calls
/// mount(2) itself, which takes the name as it is.
fn fs_name(name: &str) -> String {
    if nix::unistd::geteuid().is_root() {
        return name.to_owned();
    }
    name.replace('\\', "\\\\").replace(',', "\\,")
}

/// Sets the kernel's read-ahead for the mount, through sysfs (root only). INIT offers 128 KiB and
/// the reply to it can only lower that.
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
    fn default_mount_options_yield_to_opposites_and_occur_once() {
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
    fn all_waiters_get_the_result() {
        let completion = Completion::default();
        assert!(completion.wait(Some(Duration::from_millis(1))).is_none());
        thread::scope(|scope| {
            let waiters = [None, Some(Duration::from_secs(60))].map(|timeout| {
                scope.spawn({
                    let completion = &completion;
                    move || completion.wait(timeout)
                })
            });
            completion.complete(Err(io::Error::new(io::ErrorKind::NotConnected, "gone")));
            for waiter in waiters {
                let result = waiter.join().expect("no panic").expect("ended");
                assert_eq!(result.expect_err("an error").kind(), io::ErrorKind::NotConnected);
            }
        });
    }
}
