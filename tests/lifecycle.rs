//! The life of a mount, as its users see it. Needs /dev/fuse and says so where it is missing.

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

/// The one mount point of a test.
struct Place(Scratch);

impl Place {
    fn new() -> Option<Place> {
        Scratch::new().map(Place)
    }

    fn at(&self) -> PathBuf {
        self.0.point("mnt")
    }

    fn mount(&self, options: &[&str]) -> Output {
        self.0.command("mnt", checkpoint(), options).output().unwrap()
    }

    fn is_mounted(&self) -> bool {
        self.0.is_mounted("mnt")
    }

    fn foreground(&self) -> Process {
        let plain = self.0.command("mnt", checkpoint(), &["-f"]);
        // Under nohup(1) this process ignores SIGHUP, and so would what it starts.
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

fn ended_well(place: &Place) {
    wait_for("word of the end in the log", || place.0.log("mnt").contains("unmounted `"));
}

#[test]
fn the_command_returns_once_the_mount_answers() {
    let Some(place) = Place::new() else { return };
    let output = place.mount(&[]);
    let line = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(line.starts_with("mounted `") && line.lines().count() == 1, "{line}");
    assert!(line.contains(&format!("at `{}`: ", place.at().display())), "{line}");
    // At once, without waiting: this is what the line promises.
    assert!(!fs::read(place.at().join("config.json")).unwrap().is_empty());
    fs::read(place.at().join(".mount-ckpt/stats.json")).unwrap();

    let listed = place.command(&["status"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains(": "), "{listed:?}");
    let json = place.command(&["status", "--json"]);
    assert!(serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap().is_object());
    let again = place.mount(&[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("already shows"), "{again:?}");

    let output = place.command(&["umount"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!place.is_mounted());
    ended_well(&place);
}

#[test]
fn an_export_is_what_a_mount_shows() {
    let Some(place) = Place::new() else { return };
    let out = place.0.path().join("out");
    let exported = Command::new(BINARY).arg("export").arg(checkpoint()).arg(&out).output().unwrap();
    assert_eq!(exported.status.code(), Some(0), "{exported:?}");
    place.mount(&["-o", "ro,noatime"]);
    let names = |dir: &Path| {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> =
            entries.filter(|name| !name.to_string_lossy().starts_with(".mount-ckpt")).collect();
        names.sort();
        names
    };
    assert_eq!(names(&out), names(&place.at()));
    for name in names(&out) {
        let (copy, shown) = (fs::read(out.join(&name)), fs::read(place.at().join(&name)));
        assert!(copy.unwrap() == shown.unwrap(), "{name:?}");
    }
}

#[test]
fn signals_unmount_and_end_with_success() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let Some(place) = Place::new() else { return };
        let child = place.foreground();
        send(&child, signal);
        assert_eq!(child.end().code(), Some(0), "{signal}");
        assert!(!place.is_mounted(), "{signal}");
    }
}

/// The scheduling policies of a process's threads that answer requests: the 41st field of their
/// `stat`, proc(5).
fn request_policies(child: &Child) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let stats = threads.map(|t| fs::read_to_string(t.unwrap().path().join("stat")).unwrap());
    let policy = |stat: String| {
        // Fields from the third on follow the name in parentheses.
        let (name, fields) = stat.rsplit_once(')').unwrap();
        let policy = fields.split_whitespace().nth(41 - 3).unwrap().parse().unwrap();
        (name.contains("(fuser-") && !name.ends_with("-bg")).then_some(policy)
    };
    stats.filter_map(policy).collect()
}

/// A reader whose page is there is not interrupted by the threads that work for it.
#[test]
fn request_threads_are_batch_threads_unless_readers_wait_for_them() {
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
    let Some(place) = Place::new() else { return };
    fs::write(place.0.path().join("mnt.log"), "before\n").unwrap();
    assert_eq!(place.mount(&[]).status.code(), Some(0));
    let log = place.0.log("mnt");
    assert!(log.starts_with("before\n") && log.contains("mounted `"), "{log}");
}

#[test]
fn an_unmount_from_outside_ends_the_process_with_success() {
    let Some(place) = Place::new() else { return };
    let child = place.foreground();
    nix::mount::umount(&place.at()).unwrap();
    assert_eq!(child.end().code(), Some(0));
}

#[test]
fn a_mount_in_use_is_detached_and_served_on() {
    let Some(place) = Place::new() else { return };
    let child = place.foreground();
    let want = fs::read(place.at().join("config.json")).unwrap();
    let mut file = File::open(place.at().join("config.json")).unwrap();
    let refused = place.command(&["umount"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is in use"), "{refused:?}");

    send(&child, Signal::SIGTERM);
    wait_for("detached mount", || !place.is_mounted());
    let mut got = Vec::new();
    file.read_to_end(&mut got).unwrap();
    assert_eq!(got, want);
    drop(file);
    assert_eq!(child.end().code(), Some(0));
}

/// A session that outlives its mount must not take down the mount that came after it.
#[test]
fn the_end_of_a_detached_mount_leaves_the_next_one_alone() {
    let Some(place) = Place::new() else { return };
    let child = place.foreground();
    let file = File::open(place.at().join("config.json")).unwrap();
    send(&child, Signal::SIGTERM);
    wait_for("detached mount", || !place.is_mounted());
    let next = place.mount(&[]);
    assert_eq!(next.status.code(), Some(0), "{next:?}");
    drop(file);
    assert_eq!(child.end().code(), Some(0));
    assert!(place.is_mounted());
    assert!(place.at().join("config.json").exists());
}

#[test]
fn what_a_killed_process_leaves_is_named_and_taken_down() {
    let Some(place) = Place::new() else { return };
    let child = place.foreground();
    send(&child, Signal::SIGKILL);
    assert_eq!(child.end().code(), None);
    let refused = place.mount(&[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("is left over"), "{said}");
    assert_eq!(place.command(&["umount"]).status.code(), Some(0));
    assert_eq!(place.mount(&[]).status.code(), Some(0));
}

#[test]
fn a_mount_that_fails_in_the_background_says_why() {
    let Some(place) = Place::new() else { return };
    let empty = place.0.path().join("empty");
    fs::create_dir(&empty).unwrap();
    for options in [&[][..], &["-f"][..]] {
        let output =
            Command::new(BINARY).args(options).arg(&empty).arg(place.at()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("mount-ckpt: ") && said.contains("config.json"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert!(!place.is_mounted());
}

#[test]
fn a_mount_hides_files_only_when_told() {
    let Some(place) = Place::new() else { return };
    fs::write(place.at().join("file"), "").unwrap();
    let refused = place.mount(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not empty"), "{refused:?}");
    assert_eq!(place.mount(&["-o", "nonempty"]).status.code(), Some(0));
    assert!(!place.at().join("file").exists());
}

/// mount(8) runs mount.fuse3, which runs the command as fstab would have it.
#[test]
fn mount_8_mounts() {
    let Some(place) = Place::new() else { return };
    if !nix::unistd::geteuid().is_root() || !Path::new("/sbin/mount.fuse3").exists() {
        not_tested("mount(8) needs root and mount.fuse3");
        return;
    }
    // mount(8) clears PATH, so `-t fuse.mount-ckpt` finds only what is installed; `COMMAND#SRC` is
    // the same helper with the command's place said.
    let source = format!("{BINARY}#{}", checkpoint().display());
    for options in ["model=auto,_netdev,noatime", "rw,nofail,x-systemd.automount", "ro,user"] {
        let output = Command::new("mount")
            .args(["-t", "fuse", "-o", options, &source])
            .arg(place.at())
            .output()
            .unwrap();
        assert!(output.status.success(), "{options}: {output:?}");
        assert!(place.at().join("config.json").exists(), "{options}");
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let at = format!(" {} ", place.at().display());
        let line = table.lines().find(|line| line.contains(&at)).unwrap();
        assert!(line.contains(" - fuse.mount-ckpt ") && line.contains(" ro,"), "{line}");
        assert!(Command::new("umount").arg(place.at()).status().unwrap().success(), "{options}");
    }
}
