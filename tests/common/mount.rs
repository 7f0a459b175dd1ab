//! The one place where tests mount: a scratch directory with mounts of the built command in it.
//!
//! Dropping a [`Scratch`] unmounts everything below its directory, also when the test fails. A test
//! that passes must leave its mounts unused: a mount that is still busy then fails the test.

use std::fs::{self, File};
use std::io::Write as _;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The command under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_mount-ckpt");

/// Reports on stderr itself, which the test harness does not capture, that the running test was
/// not run and why. Under CI a test must not be skipped: this fails it.
pub fn not_tested(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "CI must run this test: {why}");
    std::io::stderr().write_all(format!("NOT TESTED: {why}\n").as_bytes()).unwrap();
}

/// Waits up to 30 s until `done`.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "no {what} after 30 s");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A temporary directory for mount points and other files of one test.
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

    /// The directory `name` below `mnt`, made if it is not there.
    pub fn point(&self, name: &str) -> PathBuf {
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

    /// `mount-ckpt OPTIONS SOURCE MNT`, not yet run. `source` is relative to the current directory
    /// or the name of a model.
    pub fn command(&self, name: &str, source: impl AsRef<Path>, options: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(options).arg("--log-file").arg(self.log_file(name));
        command.arg(source.as_ref()).arg(self.point(name));
        command
    }

    /// Mounts `source` in the background and returns the mount point.
    pub fn mount(&self, name: &str, source: impl AsRef<Path>, options: &[&str]) -> PathBuf {
        let mounted = self.try_mount(name, &source, options);
        mounted.unwrap_or_else(|why| panic!("{options:?} {}: {why}", source.as_ref().display()))
    }

    /// As [`Scratch::mount`]; what the command said where it fails.
    pub fn try_mount(
        &self,
        name: &str,
        source: impl AsRef<Path>,
        options: &[&str],
    ) -> Result<PathBuf, String> {
        let output = self.command(name, source, options).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(self.point(name)) } else { Err(said.trim().to_owned()) }
    }

    /// Runs a [`Scratch::command`] with `-f` and returns once it says that it mounted.
    pub fn foreground(&self, name: &str, mut command: Command) -> Process {
        let process = Process(command.stderr(Stdio::piped()).spawn().unwrap());
        // Not when the mount can be seen: its process may still be looking at it.
        wait_for("mount", || self.log(name).contains("mounted `"));
        process
    }

    /// Runs `mount-ckpt ARGS… MNT`.
    pub fn run(&self, args: &[&str], name: &str) -> Output {
        Command::new(BINARY).args(args).arg(self.point(name)).output().unwrap()
    }

    /// Whether something is mounted at `name`.
    pub fn is_mounted(&self, name: &str) -> bool {
        self.mounts().contains(&self.point(name))
    }

    fn mounts(&self) -> Vec<PathBuf> {
        mounts_below(&self.path())
    }
}

/// The mount points below a directory, the last mount first.
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
            // A process that another test starts holds copies of this one's files for a moment,
            // until it runs its program.
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

/// A process that is killed when it goes.
pub struct Process(Child);

impl Process {
    /// The status with which it ends, within 30 s.
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
