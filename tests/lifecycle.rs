//! Mounting and unmounting, as users see it. Needs /dev/fuse; without it, each test prints that it
//! was skipped.

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use common::golden;
use common::mount::{BINARY, Process, Scratch, not_tested, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn checkpoint() -> PathBuf {
    golden("qwen3-vl-moe").join("checkpoint")
}

/// A scratch directory with one mount point.
struct MountPoint(Scratch);

impl MountPoint {
    fn new() -> Option<MountPoint> {
        Scratch::new().map(MountPoint)
    }

    fn at(&self) -> PathBuf {
        self.0.mount_point("mnt")
    }

    fn mount(&self, options: &[&str]) -> Output {
        self.0.command("mnt", checkpoint(), options).output().unwrap()
    }

    fn is_mounted(&self) -> bool {
        self.0.is_mounted("mnt")
    }

    fn foreground(&self) -> Process {
        let plain = self.0.command("mnt", checkpoint(), &["-f"]);
        // Under nohup(1) this process ignores SIGHUP, and its children would inherit that.
        let mut command = Command::new("env");
        command.arg("--default-signal=HUP").arg(plain.get_program()).args(plain.get_args());
        self.0.foreground("mnt", command)
    }

    /// Runs `mount-ckpt COMMAND… MNT`.
    fn command(&self, args: &[&str]) -> Output {
        self.0.run(args, "mnt")
    }
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

fn wait_for_unmount_in_log(point: &MountPoint) {
    wait_for("unmount message in the log", || point.0.log("mnt").contains("unmounted `"));
}

#[test]
fn the_command_returns_once_the_mount_answers() {
    let Some(point) = MountPoint::new() else { return };
    let output = point.mount(&[]);
    let line = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(line.starts_with("mounted `") && line.lines().count() == 1, "{line}");
    assert!(line.contains(&format!("at `{}`: ", point.at().display())), "{line}");
    // Without waiting: when the line is printed, the mount must be ready.
    assert!(!fs::read(point.at().join("config.json")).unwrap().is_empty());
    fs::read(point.at().join(".mount-ckpt/stats.json")).unwrap();

    let listed = point.command(&["status"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains(": "), "{listed:?}");
    let json = point.command(&["status", "--json"]);
    assert!(serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap().is_object());
    let again = point.mount(&[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("already shows"), "{again:?}");

    let output = point.command(&["umount"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!point.is_mounted());
    wait_for_unmount_in_log(&point);
}

#[test]
fn export_writes_the_files_that_a_mount_shows() {
    let Some(point) = MountPoint::new() else { return };
    let out = point.0.path().join("out");
    let exported = Command::new(BINARY).arg("export").arg(checkpoint()).arg(&out).output().unwrap();
    assert_eq!(exported.status.code(), Some(0), "{exported:?}");
    point.mount(&["-o", "ro,noatime"]);
    let names = |dir: &Path| {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> =
            entries.filter(|name| !name.to_string_lossy().starts_with(".mount-ckpt")).collect();
        names.sort();
        names
    };
    assert_eq!(names(&out), names(&point.at()));
    for name in names(&out) {
        let (copy, shown) = (fs::read(out.join(&name)), fs::read(point.at().join(&name)));
        assert!(copy.unwrap() == shown.unwrap(), "{name:?}");
    }
}

#[test]
fn signals_unmount_and_end_with_success() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let Some(point) = MountPoint::new() else { return };
        let child = point.foreground();
        send(&child, signal);
        assert_eq!(child.end().code(), Some(0), "{signal}");
        assert!(!point.is_mounted(), "{signal}");
    }
}

/// The scheduling policies of the threads that answer requests: field 41 of their `stat`, proc(5).
fn request_policies(child: &Child) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let stats = threads.map(|t| fs::read_to_string(t.unwrap().path().join("stat")).unwrap());
    let policy = |stat: String| {
        // Field 2 is the name in parentheses; the others follow it.
        let (name, fields) = stat.rsplit_once(')').unwrap();
        let policy = fields.split_whitespace().nth(41 - 3).unwrap().parse().unwrap();
        (name.contains("(fuser-") && !name.ends_with("-bg")).then_some(policy)
    };
    stats.filter_map(policy).collect()
}

/// With SCHED_BATCH, waking a request thread does not preempt a reader.
#[test]
fn request_threads_use_sched_batch_unless_direct_io() {
    let Some(scratch) = Scratch::new() else { return };
    for (name, options, policy) in [
        ("cached", &["-f", "--threads", "3"][..], libc::SCHED_BATCH),
        ("direct", &["-f", "--threads", "3", "--direct-io"], libc::SCHED_OTHER),
    ] {
        let command = scratch.command(name, checkpoint(), options);
        let process = scratch.foreground(name, command);
        assert_eq!(request_policies(&process), [policy; 3], "{name}");
    }
}

#[test]
fn a_log_file_is_appended_to() {
    let Some(point) = MountPoint::new() else { return };
    fs::write(point.0.path().join("mnt.log"), "before\n").unwrap();
    assert_eq!(point.mount(&[]).status.code(), Some(0));
    let log = point.0.log("mnt");
    assert!(log.starts_with("before\n") && log.contains("mounted `"), "{log}");
}

#[test]
fn an_unmount_from_outside_ends_the_process_with_success() {
    let Some(point) = MountPoint::new() else { return };
    let child = point.foreground();
    nix::mount::umount(&point.at()).unwrap();
    assert_eq!(child.end().code(), Some(0));
}

#[test]
fn a_mount_in_use_is_detached_and_still_served() {
    let Some(point) = MountPoint::new() else { return };
    let child = point.foreground();
    let want = fs::read(point.at().join("config.json")).unwrap();
    let mut file = File::open(point.at().join("config.json")).unwrap();
    let refused = point.command(&["umount"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is in use"), "{refused:?}");

    send(&child, Signal::SIGTERM);
    wait_for("detached mount", || !point.is_mounted());
    let mut got = Vec::new();
    file.read_to_end(&mut got).unwrap();
    assert_eq!(got, want);
    drop(file);
    assert_eq!(child.end().code(), Some(0));
}

/// A process that still serves a detached mount must not unmount a newer one at the same path.
#[test]
fn the_end_of_a_detached_mount_leaves_the_next_one_alone() {
    let Some(point) = MountPoint::new() else { return };
    let child = point.foreground();
    let file = File::open(point.at().join("config.json")).unwrap();
    send(&child, Signal::SIGTERM);
    wait_for("detached mount", || !point.is_mounted());
    let next = point.mount(&[]);
    assert_eq!(next.status.code(), Some(0), "{next:?}");
    drop(file);
    assert_eq!(child.end().code(), Some(0));
    assert!(point.is_mounted());
    assert!(point.at().join("config.json").exists());
}

#[test]
fn the_mount_of_a_killed_process_is_reported_and_can_be_unmounted() {
    let Some(point) = MountPoint::new() else { return };
    let child = point.foreground();
    send(&child, Signal::SIGKILL);
    assert_eq!(child.end().code(), None);
    let refused = point.mount(&[]);
    let printed = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && printed.contains("is left over"), "{printed}");
    assert_eq!(point.command(&["umount"]).status.code(), Some(0));
    assert_eq!(point.mount(&[]).status.code(), Some(0));
}

#[test]
fn a_mount_that_fails_in_the_background_says_why() {
    let Some(point) = MountPoint::new() else { return };
    let empty = point.0.path().join("empty");
    fs::create_dir(&empty).unwrap();
    for options in [&[][..], &["-f"][..]] {
        let output =
            Command::new(BINARY).args(options).arg(&empty).arg(point.at()).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{printed}");
        assert!(
            printed.starts_with("mount-ckpt: ") && printed.contains("config.json"),
            "{printed}"
        );
        assert_eq!(printed.lines().count(), 1, "{printed}");
    }
    assert!(!point.is_mounted());
}

#[test]
fn a_mount_point_with_files_is_refused_without_nonempty() {
    let Some(point) = MountPoint::new() else { return };
    fs::write(point.at().join("file"), "").unwrap();
    let refused = point.mount(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not empty"), "{refused:?}");
    assert_eq!(point.mount(&["-o", "nonempty"]).status.code(), Some(0));
    assert!(!point.at().join("file").exists());
}

/// mount(8) runs mount.fuse3, which runs the command as it does for an entry of fstab.
#[test]
fn mount_8_mounts() {
    let Some(point) = MountPoint::new() else { return };
    if !nix::unistd::geteuid().is_root() || !Path::new("/sbin/mount.fuse3").exists() {
        not_tested("mount(8) needs root and mount.fuse3");
        return;
    }
    // mount(8) clears PATH, so `-t fuse.mount-ckpt` finds only an installed command. `COMMAND#SRC`
    // uses the same helper with the path of the command.
    let source = format!("{BINARY}#{}", checkpoint().display());
    for options in ["model=auto,_netdev,noatime", "rw,nofail,x-systemd.automount", "ro,user"] {
        let output = Command::new("mount")
            .args(["-t", "fuse", "-o", options, &source])
            .arg(point.at())
            .output()
            .unwrap();
        assert!(output.status.success(), "{options}: {output:?}");
        assert!(point.at().join("config.json").exists(), "{options}");
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let at = format!(" {} ", point.at().display());
        let line = table.lines().find(|line| line.contains(&at)).unwrap();
        assert!(line.contains(" - fuse.mount-ckpt ") && line.contains(" ro,"), "{line}");
        assert!(Command::new("umount").arg(point.at()).status().unwrap().success(), "{options}");
    }
}
