//! Build script: passes the build target and the git commit to the compiler, for `--version`.
//!
//! Sets `MOUNT_CKPT_TARGET`, and also `MOUNT_CKPT_COMMIT` if the package is a git checkout and git
//! is installed. Without a commit (a package of crates.io, an sdist, a copy without `.git`) the
//! build succeeds; `MOUNT_CKPT_COMMIT` can then be set in the environment of the build, as
//! `examples/docker` does.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src/build.rs");
    let target = std::env::var("TARGET").expect("cargo sets TARGET for build scripts");
    println!("cargo::rustc-env=MOUNT_CKPT_TARGET={target}");
    // Cargo runs build scripts in the package directory. Without this check, git would search the
    // parent directories and could find an unrelated repository. In a worktree, `.git` is a file.
    if !Path::new(".git").exists() {
        return;
    }
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return };
    println!("cargo::rustc-env=MOUNT_CKPT_COMMIT={commit}");
    // Only commits, checkouts and resets write these files, so cargo runs this script again when
    // HEAD moves and not at every build. A path that does not exist would make it run at every
    // build.
    for name in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists());
        if let Some(path) = path {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

/// Runs git and returns its output without the newline; `None` if git is missing, fails or prints
/// nothing.
///
/// `safe.directory=*` makes git accept a checkout that another user owns, as in containers.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(["-c", "safe.directory=*"]).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}
