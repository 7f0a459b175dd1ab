//! Mounts for tests: a scratch directory with mounts of the built command below it.
//!
//! Dropping a [`Scratch`] unmounts everything below its directory, also when the test panics. A
//! test that passes must not leave files of its mounts open: a mount that is still busy fails the
//! test.

use std::fs::{self, File};
use std::io::Write as _;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The command under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_mount-ckpt");

/// Prints to stderr, past the capture of the test harness, that the running test was skipped and
/// why. With `CI` set, the test fails instead.
pub fn not_tested(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "CI must run this test: {why}");
    std::io::stderr().write_all(format!("NOT TESTED: {why}\n").as_bytes()).unwrap();
}

/// Waits until `done` returns true. Panics after 30 s.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "no {what} after 30 s");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A temporary directory for the mount points and other files of one test.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    /// `None` where `/dev/fuse` cannot be opened; see [`not_tested`].
    pub fn new() -> Option<Scratch> {
        if let Err(e) = File::options().read(true).write(true).open("/dev/fuse") {
            not_tested(&format!("/dev/fuse cannot be opened: {e}"));
            return None;
        }
        Some(Scratch { dir: tempfile::tempdir().unwrap() })
    }

    /// The directory, without symlinks in its path.
    pub fn path(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap()
    }

    /// The directory `mnt/NAME`, created if it does not exist.
    pub fn mount_point(&self, name: &str) -> PathBuf {
        let at = self.path().join("mnt").join(name);
        fs::create_dir_all(&at).unwrap();
        at
    }

    /// The log of the mount at `name`.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_file(name)).unwrap_or_default()
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.path().join(format!("{name}.log"))
    }

    /// The command `mount-ckpt OPTIONS SOURCE MNT`, not yet run. `source` is a path, relative to
    /// the current directory, or the name of a model.
    pub fn command(&self, name: &str, source: impl AsRef<Path>, options: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(options).arg("--log-file").arg(self.log_file(name));
        command.arg(source.as_ref()).arg(self.mount_point(name));
        command
    }

    /// Mounts `source` in the background and returns the mount point.
    pub fn mount(&self, name: &str, source: impl AsRef<Path>, options: &[&str]) -> PathBuf {
        let mounted = self.try_mount(name, &source, options);
        mounted.unwrap_or_else(|why| panic!("{options:?} {}: {why}", source.as_ref().display()))
    }

    /// As [`Scratch::mount`]. Returns the stderr of the command if it fails.
    pub fn try_mount(
        &self,
        name: &str,
        source: impl AsRef<Path>,
        options: &[&str],
    ) -> Result<PathBuf, String> {
        let output = self.command(name, source, options).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            Ok(self.mount_point(name))
        } else {
            Err(printed.trim().to_owned())
        }
    }

    /// Starts a [`Scratch::command`] with `-f` and returns when its log says that it mounted.
    pub fn foreground(&self, name: &str, mut command: Command) -> Process {
        let process = Process(command.stderr(Stdio::piped()).spawn().unwrap());
        // The mount point alone is not enough: the process may still be checking the new mount.
        wait_for("mount", || self.log(name).contains("mounted `"));
        process
    }

    /// Runs `mount-ckpt ARGS… MNT`.
    pub fn run(&self, args: &[&str], name: &str) -> Output {
        Command::new(BINARY).args(args).arg(self.mount_point(name)).output().unwrap()
    }

    /// Whether something is mounted at `name`.
    pub fn is_mounted(&self, name: &str) -> bool {
        self.mounts().contains(&self.mount_point(name))
    }

    fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(&self.path())
    }
}

/// The mount points below a directory, most recent first.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(dir) && point != dir).rev().collect()
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut busy = Vec::new();
        for at in self.mounts() {
            let unmount = |how: &[&str]| {
                Command::new(BINARY).arg("umount").args(how).arg(&at).output().unwrap()
            };
            // A process started by another test holds copies of this process's file descriptors for
            // a moment, until it calls exec. So a mount may be busy at first.
            let tries = if thread::panicking() { 0 } else { 100 };
            let unused = (0..tries).any(|_| {
                let done = unmount(&["--quiet"]).status.success();
                if !done {
                    thread::sleep(Duration::from_millis(20));
                }
                done
            });
            if !unused {
                unmount(&["--quiet", "--lazy"]);
                busy.push(at);
            }
        }
        if !thread::panicking() {
            assert!(busy.is_empty(), "still in use at the end of the test: {busy:?}");
        }
    }
}

/// A child process that is killed when this value is dropped.
pub struct Process(Child);

impl Process {
    /// Waits up to 30 s for the process to exit.
    pub fn end(mut self) -> ExitStatus {
        let mut status = None;
        wait_for("end of the process", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Deref for Process {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
