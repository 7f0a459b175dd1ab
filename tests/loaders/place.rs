//! A scratch directory with mounts in it, all taken down when it goes, also when a test fails.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

const BINARY: &str = env!("CARGO_BIN_EXE_mount-ckpt");

/// Mounts and scratch files of one test.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// `None` where nothing can be mounted, which CI does not accept.
    pub fn new() -> Option<Place> {
        if File::options().read(true).write(true).open("/dev/fuse").is_err() {
            assert!(std::env::var_os("CI").is_none(), "CI has to have /dev/fuse");
            crate::aloud("NOT TESTED: /dev/fuse is missing or closed");
            return None;
        }
        Some(Place { dir: tempfile::tempdir().unwrap() })
    }

    /// The scratch directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Mounts `source` at a directory of this name.
    pub fn mount(&self, name: &str, source: impl AsRef<Path>, options: &[&str]) -> PathBuf {
        self.mount_with(name, source, options, &[])
    }

    /// The same with variables in the environment of the command.
    pub fn mount_with(
        &self,
        name: &str,
        source: impl AsRef<Path>,
        options: &[&str],
        variables: &[(&str, &Path)],
    ) -> PathBuf {
        let mounted = self.try_mount(name, &source, options, variables);
        mounted.unwrap_or_else(|why| panic!("{options:?} {}: {why}", source.as_ref().display()))
    }

    /// The same, or what the command said.
    pub fn try_mount(
        &self,
        name: &str,
        source: impl AsRef<Path>,
        options: &[&str],
        variables: &[(&str, &Path)],
    ) -> Result<PathBuf, String> {
        let at = self.mounts().join(name);
        fs::create_dir_all(&at).unwrap();
        let mut command = Command::new(BINARY);
        command.args(options).arg(source.as_ref()).arg(&at);
        command.envs(variables.iter().copied());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(at) } else { Err(said.trim().to_owned()) }
    }

    /// Writes the view to a directory of this name.
    pub fn export(&self, name: &str, source: &Path, options: &[&str]) -> PathBuf {
        let out = self.path().join(name);
        let output =
            Command::new(BINARY).arg("export").args(options).arg(source).arg(&out).output();
        assert!(output.as_ref().is_ok_and(|o| o.status.success()), "{output:?}");
        out
    }

    fn mounts(&self) -> PathBuf {
        self.path().join("mnt")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Ok(mounts) = fs::read_dir(self.mounts()) else { return };
        for mount in mounts {
            let at = mount.unwrap().path();
            let _ = Command::new(BINARY).args(["umount", "--lazy", "--quiet"]).arg(at).output();
        }
    }
}
