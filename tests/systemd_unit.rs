//! Checks the systemd unit file.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::mount::{BINARY, not_tested};

const UNIT: &str = "systemd/mount-ckpt@.service";
const INSTALLED: &str = "/usr/local/bin/mount-ckpt";

fn unit() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(UNIT)).unwrap()
}

/// systemd-analyze checks that the binary exists, so the unit names the one under test.
#[test]
fn the_unit_passes_systemd_analyze_verify() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        not_tested("systemd-analyze is missing");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mount-ckpt@.service");
    let here = unit().replace(INSTALLED, BINARY);
    fs::write(&path, here).unwrap();
    let output = Command::new("systemd-analyze").args(["verify"]).arg(&path).output().unwrap();
    // For unknown keys it only prints a warning and exits with 0.
    let printed = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<&str> = printed.lines().filter(|line| line.contains("mount-ckpt")).collect();
    assert!(output.status.success() && ours.is_empty(), "{printed}");
}

/// Each of these keys gives the service its own mount namespace, where no other process sees the
/// mount.
#[test]
fn the_unit_sets_no_key_that_hides_the_mount() {
    let unit = unit();
    let keys: Vec<&str> = unit
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(key, _)| key)
        .collect();
    for key in [
        "PrivateMounts",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateUsers",
        "ProtectSystem",
        "ProtectHome",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ProtectProc",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "InaccessiblePaths",
        "BindPaths",
        "TemporaryFileSystem",
        "MountFlags",
        "RootDirectory",
        "DynamicUser",
        "ProtectClock",
        "DevicePolicy",
    ] {
        assert!(!keys.contains(&key), "{key}");
    }
    assert_eq!(unit.lines().filter(|line| *line == "Type=notify").count(), 1);
}
