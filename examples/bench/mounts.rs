//! Mounts, each served by a process of its own. The process is this program, started again with the
//! argument [`SERVE`].

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mount_ckpt::{
    Checkpoint, Engine, EngineOptions, Mapping, MountOptions, Plan, PlanOptions, View, ViewOptions,
};

use super::null;

/// First argument of a process that serves a mount.
pub const SERVE: &str = "serve";

/// What a server sends to `NOTIFY_SOCKET` when the mount answers (the protocol of systemd).
const READY: &[u8] = b"READY=1";

/// The program that serves a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// `mount-ckpt -f`.
    MountCkpt,
    /// The null file system.
    Null,
}

/// A mount that answers. Dropping it unmounts it and waits for its process.
pub struct Mount {
    child: Child,
    at: PathBuf,
    /// Time from the start of the process until the mount answers.
    pub took: Duration,
}

impl Mount {
    /// Mounts a view of `source` at `at` and returns when it answers.
    pub fn new(server: Server, source: &Path, at: &Path, options: &[&str]) -> Result<Mount> {
        fs::create_dir_all(at)?;
        let name = match server {
            Server::MountCkpt => "view",
            Server::Null => "null",
        };
        let socket = tempfile::tempdir()?;
        let socket = socket.path().join("notify");
        let notified = UnixDatagram::bind(&socket)?;
        notified.set_read_timeout(Some(Duration::from_millis(100)))?;
        let start = Instant::now();
        let child = Command::new(std::env::current_exe()?)
            .args([SERVE, name])
            // The checkpoints have experts and few other tensors, so most tensors are missing.
            .args(["--allow-missing", ""])
            .args(options)
            .args([source, at])
            .env("NOTIFY_SOCKET", &socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let mut mount = Mount { child, at: at.to_owned(), took: Duration::ZERO };
        let mut message = [0; 4096];
        loop {
            if let Ok(n) = notified.recv(&mut message)
                && message[..n].split(|&b| b == b'\n').any(|line| line == READY)
            {
                mount.took = start.elapsed();
                return Ok(mount);
            }
            if let Some(status) = mount.child.try_wait()? {
                bail!("the mount of `{}` ended: {status}", source.display());
            }
            ensure!(start.elapsed().as_secs() < 60, "no answer from `{}`", at.display());
        }
    }

    /// The mount point.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// The value of a line of `/proc/PID/status` of the serving process, in bytes.
    pub fn memory(&self, line: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let value = status.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':'));
        let kib = value.and_then(|v| v.trim().strip_suffix(" kB"));
        Ok(kib.with_context(|| format!("no {line}"))?.parse::<u64>()? * 1024)
    }

    /// A counter of the engine, from stats.json.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let stats = fs::read(self.at.join(".mount-ckpt/stats.json"))?;
        let stats: serde_json::Value = serde_json::from_slice(&stats)?;
        stats["engine"][name].as_u64().with_context(|| format!("no counter `{name}`"))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let command = ["mount-ckpt", "umount", "--lazy"].map(OsString::from);
        mount_ckpt::run_command(command.into_iter().chain([self.at.clone().into()]));
        // The process ends after the unmount; kill it if it does not within 5 s.
        for _ in 0..5000 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves a mount: the main function of a process that [`Mount::new`] started.
pub fn serve(arguments: &[OsString]) -> ExitCode {
    let [server, rest @ ..] = arguments else { return ExitCode::FAILURE };
    if server == "view" {
        let command = ["mount-ckpt", "-f", "--log-level", "error"].map(OsString::from);
        return mount_ckpt::run_command(command.into_iter().chain(rest.iter().cloned()));
    }
    match serve_null(rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("null file system: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve_null(arguments: &[OsString]) -> Result<()> {
    let [options @ .., source, at] = arguments else { bail!("no directories") };
    let checkpoint = Arc::new(Checkpoint::open(Path::new(source))?);
    let mapping = Mapping::for_model_types(&checkpoint.config().model_types())?;
    let allow_missing = vec![regex::Regex::new("")?];
    let plan_options = PlanOptions { allow_missing, ..PlanOptions::default() };
    let plan = Arc::new(Plan::build(&checkpoint, &mapping, &plan_options)?);
    let cache = EngineOptions { cache_bytes: 0, ..EngineOptions::default() };
    let engine = Arc::new(Engine::new(checkpoint, plan, cache));
    let view = Arc::new(View::new(engine, &ViewOptions::default())?);
    let direct_io = options.iter().any(|o| o == "--direct-io");
    let options = MountOptions { direct_io, ..MountOptions::default() };
    null::serve(view, Path::new(at), &options)
}
