//! The mount table of this process: parses `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// File system type of our mounts in the mount table.
pub(crate) const FS_TYPE: &str = "fuse.mount-ckpt";

/// One mount of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// Mount id: unique while the mount is up, reused afterwards.
    pub id: u64,
    /// Device number of the file system, `major:minor`. Each FUSE session has its own.
    pub device: String,
    /// Mount point.
    pub at: PathBuf,
    /// Options of this mount, comma separated.
    pub options: String,
    /// File system type, with the subtype after a dot.
    pub fs_type: String,
    /// Source. For our mounts, the checkpoint's directory unless `fsname` was given.
    pub source: OsString,
}

impl MountEntry {
    /// Whether this program made the mount.
    pub(crate) fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// The mount table of this process, in the kernel's order.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read.
pub(crate) fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mount that a path look-up of `at` reaches: the last one of those stacked there.
pub(crate) fn topmost<'a>(entries: &'a [MountEntry], at: &Path) -> Option<&'a MountEntry> {
    entries.iter().rfind(|entry| entry.at == at)
}

fn parse(table: &[u8]) -> Vec<MountEntry> {
    table.split(|&b| b == b'\n').filter_map(parse_line).collect()
}

/// `id parent major:minor root mount-point options [optional]… - type source super-options`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&b| b == b' ');
    let id = text(fields.next()?).parse().ok()?;
    let (_parent, device, _root) = (fields.next()?, fields.next()?, fields.next()?);
    let (at, options) = (fields.next()?, fields.next()?);
    fields.find(|field| *field == b"-")?;
    Some(MountEntry {
        id,
        device: text(device),
        at: PathBuf::from(OsString::from_vec(unescape(at))),
        options: text(options),
        fs_type: text(fields.next()?),
        source: OsString::from_vec(unescape(fields.next()?)),
    })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

/// Decodes the kernel's escapes: space, tab, newline, `#` and backslash are written as a backslash and
/// three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| first == b'\\').and_then(octal);
        plain.push(code.unwrap_or(first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    plain
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
51 27 0:44 / /mnt/a\\040b ro,nosuid,nodev shared:3 - fuse.mount-ckpt /ckpt/x\\134y\\011z ro,user_id=0
52 27 0:45 / /mnt2 ro - fuse.mount-ckpt mount-ckpt ro
not a line

99 27 0:45 / /short
";

    #[test]
    fn mountinfo_lines_are_parsed() {
        let entries = parse(TABLE);
        let got: Vec<_> = entries
            .iter()
            .map(|e| (e.id, e.device.as_str(), e.at.to_str().unwrap(), e.fs_type.as_str()))
            .collect();
        let want = [
            (22, "0:21", "/proc", "proc"),
            (36, "98:0", "/mnt2", "ext3"),
            (51, "0:44", "/mnt/a b", "fuse.mount-ckpt"),
            (52, "0:45", "/mnt2", "fuse.mount-ckpt"),
        ];
        assert_eq!(got, want);
        assert_eq!(entries[2].source, OsString::from("/ckpt/x\\y\tz"));
        assert_eq!(entries[2].options, "ro,nosuid,nodev");
        assert_eq!(entries.iter().filter(|e| e.is_ours()).count(), 2);
    }

    #[test]
    fn the_last_mount_at_a_path_is_the_topmost() {
        let entries = parse(TABLE);
        let id = |at: &str| topmost(&entries, Path::new(at)).map(|entry| entry.id);
        assert_eq!((id("/mnt2"), id("/proc"), id("/mnt")), (Some(52), Some(22), None));
    }

    #[test]
    fn invalid_escapes_are_kept() {
        for (field, plain) in [
            (r"a\040", "a "),
            (r"\1", r"\1"),
            (r"\999", r"\999"),
            (r"\", r"\"),
            (r"\134040", r"\040"),
        ] {
            assert_eq!(unescape(field.as_bytes()), plain.as_bytes(), "{field}");
        }
    }
}
