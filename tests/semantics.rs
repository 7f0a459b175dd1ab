//! Tests of the promises in `src/mount/README.md` that no other test covers. Needs /dev/fuse;
//! without it, each test prints that it was skipped.

mod common;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::mount::{BINARY, Process, Scratch, wait_for};
use common::{Zeros, assert_same, copy_files, golden, tensors_of};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Whence, lseek};
use serde_json::Value;

/// Name of the mount of a [`Fixture`].
const NAME: &str = "view";
const SHARD: &str = "model-00001-of-00001.safetensors";

/// A copy of a small checkpoint and its mount, in a [`Scratch`].
struct Fixture {
    scratch: Scratch,
}

impl Fixture {
    /// A copy that is not mounted yet. `None` without /dev/fuse.
    fn new() -> Option<Fixture> {
        let fixture = Fixture { scratch: Scratch::new()? };
        copy_files(&golden("mimo-v2-flash").join("checkpoint"), &fixture.source(""));
        Some(fixture)
    }

    /// A mounted copy.
    fn mounted(options: &[&str]) -> Option<Fixture> {
        let fixture = Fixture::new()?;
        fixture.scratch.mount(NAME, fixture.source(""), options);
        Some(fixture)
    }

    /// A mounted copy, and the foreground process that serves it.
    fn foreground() -> Option<(Fixture, Process)> {
        let fixture = Fixture::new()?;
        let process = fixture.scratch.foreground(NAME, fixture.command(&["-f"]));
        Some((fixture, process))
    }

    fn command(&self, options: &[&str]) -> Command {
        self.scratch.command(NAME, self.source(""), options)
    }

    fn umount(&self, options: &[&str]) -> Output {
        self.scratch.run(&[&["umount"], options].concat(), NAME)
    }

    /// A file of the mount.
    fn at(&self, name: &str) -> PathBuf {
        self.scratch.path().join("mnt").join(NAME).join(name)
    }

    /// A file of the checkpoint.
    fn source(&self, name: &str) -> PathBuf {
        self.scratch.path().join("checkpoint").join(name)
    }

    fn log_text(&self) -> String {
        self.scratch.log(NAME)
    }

    /// Number of bytes that the process has served, without status files.
    fn served_bytes(&self) -> u64 {
        let stats = fs::read(self.at(".mount-ckpt/stats.json")).unwrap();
        let stats: Value = serde_json::from_slice(&stats).unwrap();
        stats["served"]["bytes"].as_u64().unwrap()
    }
}

fn send(process: &Process, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(process.id()).unwrap()), signal).unwrap();
}

fn errno(result: std::io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Properties of a file that must be the same in two mounts.
#[derive(PartialEq)]
struct FileFacts {
    size: u64,
    inode: u64,
    times: [i64; 3],
    mode: u32,
    bytes: Vec<u8>,
}

/// Every file below a directory, except the status files.
fn tree(root: &Path) -> BTreeMap<PathBuf, FileFacts> {
    let mut files = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.metadata().unwrap();
            if meta.is_dir() {
                directories.push(path);
            } else if meta.len() > 0 {
                let facts = FileFacts {
                    size: meta.len(),
                    inode: meta.ino(),
                    times: [meta.mtime(), meta.mtime_nsec(), meta.ctime()],
                    mode: meta.mode(),
                    bytes: fs::read(&path).unwrap(),
                };
                files.insert(path.strip_prefix(root).unwrap().to_owned(), facts);
            }
        }
    }
    files
}

/// Replaces a shard as an editor or `hf download` does: renames another file to its name.
fn replace(path: &Path, bytes: &[u8]) {
    let other = path.with_extension("new");
    fs::write(&other, bytes).unwrap();
    fs::rename(&other, path).unwrap();
}

/// A citation is a file of the repository and a test in it: `` `tests/mount.rs: name` ``.
#[test]
fn every_test_that_the_page_cites_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("src/mount/README.md")).unwrap();
    let cited: Vec<(&str, &str)> = page
        .split('`')
        .filter_map(|code| code.split_once(".rs: "))
        .filter(|(file, _)| file.starts_with("src/") || file.starts_with("tests/"))
        .collect();
    assert!(cited.len() > 25, "the page cites a test for each promise, found {cited:?}");
    for (file, name) in cited {
        let path = root.join(format!("{file}.rs"));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let test = format!("#[test]\nfn {name}()");
        let nested = format!("#[test]\n    fn {name}()");
        assert!(text.contains(&test) || text.contains(&nested), "no test `{name}` in {file}.rs");
    }
}

#[test]
fn two_mounts_show_the_same_tree() {
    let Some(fixture) = Fixture::mounted(&["--ep-size", "2"]) else { return };
    let first = tree(&fixture.at(""));
    assert!(first.len() > 70, "{:?}", first.keys());
    assert!(fixture.umount(&[]).status.success());
    let options = ["--ep-size", "2", "--threads", "1", "--cache-size", "0", "--direct-io"];
    assert!(fixture.command(&options).status().unwrap().success());
    let second = tree(&fixture.at(""));
    assert!(first.keys().eq(second.keys()));
    for (name, facts) in &first {
        assert!(second[name] == *facts, "{}", name.display());
    }
}

#[test]
fn pages_are_kept_from_one_open_to_the_next() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let first = fs::read(fixture.at(SHARD)).unwrap();
    let size = u64::try_from(first.len()).unwrap();
    // A reply may be counted shortly after the reader has received it.
    wait_for("count of all bytes", || fixture.served_bytes() >= size);
    let served = fixture.served_bytes();
    assert!(fs::read(fixture.at(SHARD)).unwrap() == first);
    assert_eq!(fixture.served_bytes(), served);
}

#[test]
fn a_replaced_shard_is_served_as_it_was() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    for n in 1..=3 {
        let shard = fixture.source(&format!("model-0000{n}-of-00003.safetensors"));
        let size = usize::try_from(shard.metadata().unwrap().len()).unwrap();
        replace(&shard, &vec![0xAA; size]);
    }
    let expected = tensors_of(&golden("mimo-v2-flash").join("native.safetensors"));
    assert_same(&tensors_of(&fixture.at(SHARD)), &expected, Zeros::Signed);
}

#[test]
fn a_truncated_shard_gives_eio_and_a_log_line() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let shard = fixture.source("model-00003-of-00003.safetensors");
    OpenOptions::new().write(true).open(&shard).unwrap().set_len(5000).unwrap();
    let file = fixture.at(".mount-ckpt/tensors/model.layers.0.mlp.down_proj.weight.safetensors");
    assert_eq!(errno(fs::read(&file)), Some(libc::EIO));
    let log = fixture.log_text();
    let line = log.lines().find(|line| line.contains("ERROR")).expect("a line about the error");
    let shard = shard.canonicalize().unwrap();
    let tensor = "`model.layers.0.mlp.down_proj.weight`";
    for part in [shard.to_str().unwrap(), tensor, "offset 6696", "5000 bytes"] {
        assert!(line.contains(part), "`{part}` is missing in `{line}`");
    }
    assert!(fs::read(fixture.at("config.json")).is_ok(), "the process keeps serving");
}

/// The reader is a separate process, since the signal kills it.
#[test]
fn a_mapped_reader_of_a_truncated_shard_gets_sigbus() {
    const READER: &str = "import mmap, sys
with open(sys.argv[1], 'rb') as file:
    sum(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[:])";
    let read = |path: &Path| Command::new("python3").args(["-c", READER]).arg(path).status();
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let Ok(whole) = read(&fixture.at(SHARD)) else {
        assert!(std::env::var_os("CI").is_none(), "CI needs python3");
        eprintln!("NOT TESTED: python3 is missing");
        return;
    };
    assert!(whole.success());
    let shard = fixture.source("model-00003-of-00003.safetensors");
    OpenOptions::new().write(true).open(&shard).unwrap().set_len(5000).unwrap();
    // Not the file that is in the page cache already.
    let status =
        read(&fixture.at(".mount-ckpt/tensors/model.layers.0.mlp.down_proj.weight.safetensors"))
            .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

#[test]
fn a_passed_through_file_that_changed_before_its_first_open_gives_eio() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let [changed, kept] = ["generation_config.json", "tokenizer_config.json"];
    fs::write(fixture.source(changed), "{}").unwrap();
    assert_eq!(errno(File::open(fixture.at(changed))), Some(libc::EIO));
    assert!(fixture.log_text().contains("generation_config.json` changed"));
    // A file that was opened before stays open, so replacing it has no effect.
    let before = fs::read(fixture.at(kept)).unwrap();
    replace(&fixture.source(kept), b"{}");
    assert!(fs::read(fixture.at(kept)).unwrap() == before);
}

#[test]
fn a_status_file_has_size_0_and_one_snapshot_for_each_open() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let stats = fixture.at(".mount-ckpt/stats.json");
    assert_eq!(stats.metadata().unwrap().len(), 0);
    let bytes = |text: &str| -> u64 {
        let stats: Value = serde_json::from_str(text).unwrap();
        stats["served"]["bytes"].as_u64().unwrap()
    };
    let mut file = File::open(&stats).unwrap();
    let mut text = String::new();
    file.by_ref().take(10).read_to_string(&mut text).unwrap();
    fs::read(fixture.at("config.json")).unwrap();
    file.read_to_string(&mut text).unwrap();
    let whole = text.clone();
    text.clear();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, whole);
    let config = fixture.at("config.json").metadata().unwrap().len();
    assert!(fixture.served_bytes() >= bytes(&whole) + config, "each open has a new snapshot");
}

#[test]
fn files_have_no_holes_and_no_attributes() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let file = File::open(fixture.at(SHARD)).unwrap();
    let size = i64::try_from(file.metadata().unwrap().len()).unwrap();
    assert_eq!(lseek(&file, 5, Whence::SeekData), Ok(5));
    assert_eq!(lseek(&file, 5, Whence::SeekHole), Ok(size));
    let path = CString::new(fixture.at(SHARD).into_os_string().into_encoded_bytes()).unwrap();
    let mut buffer = [0u8; 256];
    // SAFETY: both names end in NUL, and no more than the buffer's length is written to it.
    #[allow(unsafe_code)]
    let (listed, got) = unsafe {
        let at = buffer.as_mut_ptr();
        let listed = libc::listxattr(path.as_ptr(), at.cast(), buffer.len());
        let got = libc::getxattr(path.as_ptr(), c"user.x".as_ptr(), at.cast(), buffer.len());
        (listed, if got < 0 { Errno::last_raw() } else { 0 })
    };
    assert_eq!((listed, got), (0, libc::ENOTSUP));
}

#[test]
fn flock_and_fcntl_read_locks_work() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let open = || File::open(fixture.at(SHARD)).unwrap();
    let held = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
    let (_, refused) = Flock::lock(open(), FlockArg::LockSharedNonblock).unwrap_err();
    assert_eq!(refused, Errno::EWOULDBLOCK);
    drop(held);
    assert!(Flock::lock(open(), FlockArg::LockSharedNonblock).is_ok());
    for (kind, expected) in [(libc::F_RDLCK, Ok(0)), (libc::F_WRLCK, Err(Errno::EBADF))] {
        let whole = libc::flock {
            l_type: i16::try_from(kind).unwrap(),
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        assert_eq!(fcntl(open(), FcntlArg::F_SETLK(&whole)), expected, "{kind}");
    }
}

#[test]
fn o_direct_reads_any_offset_and_length() {
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let whole = fs::read(fixture.at(SHARD)).unwrap();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(fixture.at(SHARD));
    let file = file.unwrap();
    for (at, n) in [(0, 4096), (1, 1), (4095, 70_001), (100_003, 1_500_000)] {
        let mut bytes = vec![0; n];
        file.read_exact_at(&mut bytes, u64::try_from(at).unwrap()).unwrap();
        assert!(bytes == whole[at..at + n], "{n} bytes at {at}");
    }
}

/// An NFS server does this for its clients: it gets a handle for a name, and a file for a handle.
#[test]
fn a_file_handle_opens_its_file() {
    #[repr(C)]
    struct Handle {
        head: libc::file_handle,
        rest: [u8; 128],
    }
    let Some(fixture) = Fixture::mounted(&[]) else { return };
    let path = CString::new(fixture.at(SHARD).into_os_string().into_encoded_bytes()).unwrap();
    let root = File::open(fixture.at("")).unwrap();
    // SAFETY: all zero is a value of these integers and arrays of bytes.
    #[allow(unsafe_code)]
    let mut handle: Handle = unsafe { std::mem::zeroed() };
    handle.head.handle_bytes = 128;
    let mut mount = 0;
    // SAFETY: the name ends in NUL, and the handle has the room that it states.
    #[allow(unsafe_code)]
    let opened = unsafe {
        let at = &raw mut handle.head;
        let named = libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), at, &raw mut mount, 0);
        assert_eq!(named, 0, "{}", std::io::Error::last_os_error());
        libc::open_by_handle_at(root.as_raw_fd(), at, libc::O_RDONLY)
    };
    if opened < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM) {
        eprintln!("NOT TESTED: open_by_handle_at needs CAP_DAC_READ_SEARCH");
        return;
    }
    assert!(opened >= 0, "{}", std::io::Error::last_os_error());
    let by_handle = fs::read(format!("/proc/self/fd/{opened}")).unwrap();
    nix::unistd::close(opened).unwrap();
    assert!(by_handle == fs::read(fixture.at(SHARD)).unwrap());
}

#[test]
fn a_lazy_umount_keeps_open_files_until_they_are_closed() {
    let Some((fixture, child)) = Fixture::foreground() else { return };
    let mut file = File::open(fixture.at(SHARD)).unwrap();
    assert_eq!(fixture.umount(&[]).status.code(), Some(1), "a file is open");
    assert!(fixture.umount(&["--lazy"]).status.success());
    assert!(!fixture.at("config.json").exists());
    let copy = fixture.source("copy");
    std::io::copy(&mut file, &mut File::create(&copy).unwrap()).unwrap();
    let expected = tensors_of(&golden("mimo-v2-flash").join("native.safetensors"));
    assert_same(&tensors_of(&copy), &expected, Zeros::Signed);
    drop(file);
    assert_eq!(child.end().code(), Some(0));
}

#[test]
fn a_second_signal_ends_the_process_and_open_files_fail() {
    let Some((fixture, child)) = Fixture::foreground() else { return };
    let file = File::open(fixture.at(SHARD)).unwrap();
    send(&child, Signal::SIGTERM);
    wait_for("detached mount", || !fixture.at("config.json").exists());
    send(&child, Signal::SIGTERM);
    assert_eq!(child.end().code(), Some(0));
    assert_eq!(errno(file.read_at(&mut [0; 10], 0)), Some(libc::ENOTCONN));
}

/// Takes 10 s, for which open files are served after SIGTERM.
#[test]
fn sigterm_ends_the_process_even_if_a_file_stays_open() {
    let Some((fixture, child)) = Fixture::foreground() else { return };
    let file = File::open(fixture.at(SHARD)).unwrap();
    send(&child, Signal::SIGTERM);
    wait_for("detached mount", || !fixture.at("config.json").exists());
    assert_eq!(file.read_at(&mut [0; 10], 0).unwrap(), 10);
    assert_eq!(child.end().code(), Some(0));
    assert_eq!(errno(file.read_at(&mut [0; 10], 1 << 20)), Some(libc::ENOTCONN));
}

#[test]
fn a_killed_process_leaves_a_mount_that_is_not_connected() {
    let Some((fixture, child)) = Fixture::foreground() else { return };
    let file = File::open(fixture.at(SHARD)).unwrap();
    send(&child, Signal::SIGKILL);
    assert_eq!(child.end().signal(), Some(libc::SIGKILL));
    assert_eq!(errno(file.read_at(&mut [0; 10], 1 << 20)), Some(libc::ENOTCONN));
    assert_eq!(errno(File::open(fixture.at(SHARD))), Some(libc::ENOTCONN));
    let listed = Command::new(BINARY).arg("status").output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let at = fixture.at("");
    let line =
        listed.lines().find(|line| line.contains(at.to_str().unwrap().trim_end_matches('/')));
    assert!(line.is_some_and(|line| line.contains("its process died")), "{listed}");
    drop(file);
    assert!(fixture.umount(&[]).status.success());
    assert!(fixture.command(&[]).status().unwrap().success());
    assert!(fixture.at(SHARD).exists());
}
