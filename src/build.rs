//! Build script: tells `--version` the commit and the target that the program is built from and for.
//!
//! Sets `MOUNT_CKPT_TARGET`, and `MOUNT_CKPT_COMMIT` where the package is a git checkout and git
//! runs. A package of crates.io, an sdist and a directory copied without `.git` have no commit, and
//! that is no error; who builds one can set the variable himself, as `examples/docker` does.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src/build.rs");
    let target = std::env::var("TARGET").expect("cargo sets TARGET for build scripts");
    println!("cargo::rustc-env=MOUNT_CKPT_TARGET={target}");
    // Cargo runs build scripts in the directory of the package. Git would go up from there, to a
    // repository that the package was merely unpacked in. `.git` is a file in a git worktree.
    if !Path::new(".git").exists() {
        return;
    }
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return };
    println!("cargo::rustc-env=MOUNT_CKPT_COMMIT={commit}");
    // Commits, checkouts and resets write both; nothing else does, so the script runs when HEAD
    // moves and not at every build. A path that is absent would have it run every time.
    for name in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists());
        if let Some(path) = path {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

/// What git prints, without the line end; `None` where it is missing or fails.
///
/// A checkout of another user, as containers have, is read all the same.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(["-c", "safe.directory=*"]).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}
