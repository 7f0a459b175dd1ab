//! The unit file, as systemd itself reads it.

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

/// systemd-analyze looks for the binary too, so it is given the one under test.
#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        not_tested("systemd-analyze is missing");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mount-ckpt@.service");
    let here = unit().replace(INSTALLED, BINARY);
    fs::write(&path, here).unwrap();
    let output = Command::new("systemd-analyze").args(["verify"]).arg(&path).output().unwrap();
    // It exits with 0 on unknown keys, which it only mentions.
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("mount-ckpt")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}

/// Each of these gives the service a mount namespace of its own, in which nobody else sees the view.
#[test]
fn nothing_in_the_unit_hides_the_mount() {
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
