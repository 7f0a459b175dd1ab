//! Tests of a mounted view. They need `/dev/fuse`.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};

use nix::sys::stat::{major, minor};
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::mount::{MountOptions, Mounted, mount_filesystem};
use crate::source::testing::Dir;
use crate::view::testing::{source, view};

const SOURCE: &str = "/source, with a comma";

/// Mounts the view of `source`; returns the mount and its directory. Without `/dev/fuse` it prints
/// "NOT TESTED" and returns `None`, so that the test ends; under CI it panics. Tests that run the
/// command mount with tests/common/mount.rs; these tests use private items of the crate.
fn mounted(source: &Dir, change: impl Fn(&mut MountOptions)) -> Option<(Mounted, TempDir)> {
    if let Err(e) = File::options().read(true).write(true).open("/dev/fuse") {
        assert!(std::env::var_os("CI").is_none(), "/dev/fuse cannot be opened: {e}");
        let said = format!("NOT TESTED: /dev/fuse cannot be opened: {e}\n");
        io::stderr().write_all(said.as_bytes()).expect("stderr");
        return None;
    }
    let at = tempfile::tempdir().expect("a directory");
    let mut options =
        MountOptions { threads: 2, fs_name: Some(SOURCE.to_owned()), ..MountOptions::default() };
    change(&mut options);
    let filesystem = Filesystem::new(Arc::new(view(source)), options.direct_io);
    let mounted = mount_filesystem(filesystem, at.path(), &options).expect("a mount");
    Some((mounted, at))
}

/// All files below `root` with their bytes, without the status files, whose size is 0.
fn tree(root: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.metadata().expect("there").len() > 0 {
                let name = path.strip_prefix(root).expect("below").to_string_lossy().into_owned();
                files.push((name, fs::read(&path).expect("readable")));
            }
        }
    }
    files.sort();
    files
}

/// The same files, read from the view without a mount.
fn tree_of(view: &View) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut dirs = vec![Ino::ROOT];
    while let Some(dir) = dirs.pop() {
        for n in 2.. {
            let Some(entry) = view.entry(dir, n).expect("a directory") else { break };
            let attr = view.attr(entry.ino).expect("there");
            match attr.kind {
                Kind::Directory => dirs.push(entry.ino),
                Kind::File if attr.size == 0 => {}
                Kind::File => {
                    let mut bytes = vec![0; usize::try_from(attr.size).expect("small")];
                    view.read(entry.ino, 0, &mut bytes).expect("readable");
                    files.push((view.path(entry.ino), bytes));
                }
            }
        }
    }
    files.sort();
    files
}

#[test]
fn a_mount_shows_the_view_with_and_without_direct_io() {
    let source = source();
    let expected = tree_of(&view(&source));
    assert_eq!(expected.len(), 21);
    for direct_io in [false, true] {
        let Some((mount, _at)) = mounted(&source, |o| o.direct_io = direct_io) else { return };
        for time in ["first", "second"] {
            assert!(tree(mount.at()) == expected, "{time} time, direct_io: {direct_io}");
        }
        for (name, bytes) in &expected {
            let file = File::open(mount.at().join(name)).expect("there");
            let mut some = [0; 5000];
            let n = file.read_at(&mut some, 3).expect("readable");
            assert_eq!(some[..n], bytes[3..bytes.len().min(5003)], "{name}");
        }
    }
}

/// Without a request thread, every access to the mount would block for ever.
#[test]
fn zero_threads_means_one_thread() {
    let (send, done) = channel();
    let reader = std::thread::spawn(move || {
        let source = source();
        let Some((mount, _at)) = mounted(&source, |o| o.threads = 0) else { return };
        let bytes = fs::read(mount.at().join("sub/code.py")).expect("readable");
        send.send(bytes).expect("the test receives");
    });
    match done.recv_timeout(Duration::from_secs(60)) {
        Ok(bytes) => assert_eq!(bytes, b"pass\n"),
        Err(RecvTimeoutError::Timeout) => panic!("the mount does not answer"),
        // The thread panicked, or /dev/fuse is missing.
        Err(RecvTimeoutError::Disconnected) => {}
    }
    // A panic of the thread fails the test here. The thread has unmounted.
    reader.join().expect("no panic");
}

#[test]
fn status_files_are_rendered_when_they_are_opened() {
    let source = source();
    let Some((mount, _at)) = mounted(&source, |_| {}) else { return };
    let status = |name: &str| {
        fs::read_to_string(mount.at().join(".mount-ckpt").join(name)).expect("readable")
    };
    let bytes = || -> u64 {
        let stats: Value = serde_json::from_str(&status("stats.json")).expect("JSON");
        stats["served"]["bytes"].as_u64().expect("a number")
    };
    let before = bytes();
    fs::read(mount.at().join(".mount-ckpt/tensors/lm_head.safetensors")).expect("readable");
    // A spliced reply is counted after it was sent, so the reader may get here before that.
    let expected = before + 4096 + 2_000_000;
    while bytes() < expected {
        std::thread::yield_now();
    }
    assert_eq!(bytes(), expected);
    assert!(status("metrics.prom").contains("\nmount_ckpt_served_errors_total 0\n"));
    let plan: Value = serde_json::from_str(&status("plan.json")).expect("JSON");
    assert!(plan.is_object());
}

#[test]
fn every_request_to_write_fails_with_erofs() {
    let source = source();
    let Some((mount, _at)) = mounted(&source, |_| {}) else { return };
    let at = |name: &str| mount.at().join(name);
    let config = || at("config.json");
    for (what, result) in [
        ("create", File::create(at("new")).map(drop)),
        ("write", File::options().write(true).open(config()).map(drop)),
        ("append", File::options().append(true).open(config()).map(drop)),
        ("truncate", File::options().write(true).truncate(true).open(config()).map(drop)),
        ("mkdir", fs::create_dir(at("dir"))),
        ("unlink", fs::remove_file(config())),
        ("rmdir", fs::remove_dir(at("sub"))),
        ("rename", fs::rename(config(), at("c"))),
        ("link", fs::hard_link(config(), at("c"))),
        ("symlink", symlink("a", at("c"))),
        ("chmod", fs::set_permissions(config(), fs::Permissions::from_mode(0o777))),
    ] {
        assert_eq!(result.expect_err(what).kind(), ErrorKind::ReadOnlyFilesystem, "{what}");
    }
    assert_eq!(File::open(at("absent")).expect_err("absent").kind(), ErrorKind::NotFound);
}

#[test]
fn a_source_error_is_eio_and_other_reads_succeed() {
    let source = source();
    let Some((mount, _at)) = mounted(&source, |_| {}) else { return };
    let shard = File::options().write(true).open(source.join("model.safetensors")).expect("there");
    shard.set_len(shard.metadata().expect("there").len() - 50_000).expect("cut");
    let file =
        File::open(mount.at().join(".mount-ckpt/tensors/z.last.safetensors")).expect("there");
    let error = file.read_at(&mut [0; 10], 100_000).expect_err("cut");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(file.read_at(&mut [0; 10], 5000).expect("lies before the cut"), 10);
    fs::read(mount.at().join(".mount-ckpt/tensors/norm.safetensors")).expect("whole");
}

#[test]
fn the_mount_table_and_sysfs_show_the_options() {
    let source = source();
    let Some((mount, _at)) = mounted(&source, |_| {}) else { return };
    let table = fs::read_to_string("/proc/self/mountinfo").expect("readable");
    let at = mount.at().to_str().expect("UTF-8");
    let line = table.lines().find(|line| line.contains(at)).expect("mounted");
    for part in [
        " ro,nosuid,nodev,noatime ",
        " fuse.mount-ckpt /source,\\040with\\040a\\040comma ",
        ",default_permissions",
    ] {
        assert!(line.contains(part), "`{part}` is missing in `{line}`");
    }
    let meta = fs::metadata(mount.at().join("config.json")).expect("there");
    assert_eq!((meta.mode(), meta.blksize(), meta.ino()), (0o100_444, 1 << 20, 9));
    if nix::unistd::geteuid().is_root() {
        let file =
            format!("/sys/class/bdi/{}:{}/read_ahead_kb", major(meta.dev()), minor(meta.dev()));
        assert_eq!(fs::read_to_string(file).expect("readable"), "4096\n");
    }
    let space = nix::sys::statvfs::statvfs(mount.at()).expect("mounted");
    assert_eq!((space.blocks_free(), space.name_max()), (0, 255));
}

#[test]
fn a_busy_mount_is_not_unmounted_and_a_detached_one_drains() {
    let source = source();
    let Some((mount, _at)) = mounted(&source, |_| {}) else { return };
    let open = File::open(mount.at().join("config.json")).expect("there");
    assert_eq!(mount.unmount().expect_err("in use").kind(), ErrorKind::ResourceBusy);
    assert!(mount.wait_timeout(Duration::from_millis(10)).is_none());
    mount.detach().expect("detached");
    assert_eq!(fs::read_dir(mount.at()).expect("a directory").count(), 0);
    assert_eq!(open.read_at(&mut [0; 3], 0).expect("still readable"), 3);
    assert!(mount.wait_timeout(Duration::from_millis(10)).is_none());
    drop(open);
    mount.wait().expect("ended without an error");
    mount.unmount().expect("nothing left to do");
}

#[test]
fn an_unmount_from_outside_ends_the_wait() {
    let source = source();
    let Some((mount, _at)) = mounted(&source, |_| {}) else { return };
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| mount.wait());
        let umount = Command::new("umount").arg(mount.at()).status().expect("umount is installed");
        assert!(umount.success());
        waiter.join().expect("no panic").expect("ended without an error");
    });
}

#[test]
fn dropping_a_mount_unmounts_it() {
    let source = source();
    let Some((mount, at)) = mounted(&source, |_| {}) else { return };
    assert!(at.path().join("config.json").exists());
    drop(mount);
    assert!(!at.path().join("config.json").exists());
}

#[test]
fn each_view_error_has_its_errno() {
    let path = PathBuf::from("tokenizer.json");
    let source = io::Error::other("gone");
    for (error, expected) in [
        (ViewError::NotFound, Errno::ENOENT),
        (ViewError::NotADirectory, Errno::ENOTDIR),
        (ViewError::IsADirectory, Errno::EISDIR),
        (ViewError::Host { path: path.clone(), source }, Errno::EIO),
        (ViewError::HostChanged { path, expected: 2, got: 1 }, Errno::EIO),
    ] {
        assert_eq!(log_and_errno(&error), expected, "{error}");
    }
}

#[test]
fn attributes_are_those_of_the_view() {
    let mtime = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_500_000_000);
    let attr = Attr {
        ino: Ino(7 << 32 | 3),
        kind: Kind::File,
        size: 513,
        mtime,
        mode: 0o440,
        uid: 5,
        gid: 6,
        links: 1,
    };
    let got = file_attr(&attr);
    assert_eq!((got.ino, got.size, got.blocks), (INodeNo(7 << 32 | 3), 513, 2));
    assert_eq!((got.perm, got.uid, got.gid, got.nlink), (0o440, 5, 6, 1));
    assert_eq!((got.atime, got.mtime, got.ctime), (mtime, mtime, mtime));
    assert_eq!((got.kind, got.blksize), (FileType::RegularFile, 1 << 20));
}

#[test]
fn a_panic_fails_only_its_request() {
    assert_eq!(guarded(|| Ok(3)), Ok(3));
    assert_eq!(guarded(|| Err::<u8, _>(ViewError::NotFound)), Err(Errno::ENOENT));
    assert_eq!(guarded(|| -> Result<u8, ViewError> { panic!("on purpose") }), Err(Errno::EIO));
}
