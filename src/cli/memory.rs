//! How much memory this process may use: the smaller of the machine's memory and the limits of its
//! control groups. The default size of the cache depends on it.

use std::path::Path;

/// Bytes of memory that this process may use; `None` if the system does not tell.
pub(super) fn limit() -> Option<u64> {
    limit_below(Path::new("/"))
}

/// [`limit`] with `proc` and `sys/fs/cgroup` below `root` instead of `/`.
fn limit_below(root: &Path) -> Option<u64> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let group = groups.lines().filter_map(|line| group_limit(root, line)).min();
    let memory = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let total = memory.lines().find_map(total_bytes);
    match (group, total) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The smallest limit in bytes of a control group and its ancestors. `line` is a line of
/// `/proc/self/cgroup`: `hierarchy:controllers:path`.
fn group_limit(root: &Path, line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (hierarchy, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (mount, file) = match controllers {
        "" if hierarchy == "0" => ("sys/fs/cgroup", "memory.max"),
        _ if controllers.split(',').any(|c| c == "memory") => {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
        }
        _ => return None,
    };
    // Without a limit, version 2 has `max` and version 1 a huge number; a group that a container
    // cannot see has no file. The first and the last are skipped, and the second is never the minimum.
    Path::new(path.trim_start_matches('/'))
        .ancestors()
        .filter_map(|group| {
            let limit = std::fs::read_to_string(root.join(mount).join(group).join(file)).ok()?;
            limit.trim().parse().ok()
        })
        .min()
}

fn total_bytes(line: &str) -> Option<u64> {
    let kib = line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:       16384 kB\nMemFree:         1 kB\n");

    #[test]
    fn the_smallest_memory_limit_is_used() {
        const V1: &str = "sys/fs/cgroup/memory/a/memory.limit_in_bytes";
        type Files = &'static [(&'static str, &'static str)];
        let table: [(&str, Files, Option<u64>); 8] = [
            ("nothing known", &[], None),
            ("no group", &[MEMINFO], Some(16384 << 10)),
            (
                "version 2",
                &[
                    MEMINFO,
                    ("proc/self/cgroup", "0::/a/b\n"),
                    ("sys/fs/cgroup/a/b/memory.max", "4096\n"),
                ],
                Some(4096),
            ),
            (
                "version 2, the parent is tighter",
                &[
                    ("proc/self/cgroup", "0::/a/b\n"),
                    ("sys/fs/cgroup/a/b/memory.max", "max\n"),
                    ("sys/fs/cgroup/a/memory.max", "8192\n"),
                ],
                Some(8192),
            ),
            (
                "version 2, a namespace whose root is the group",
                &[("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "77\n")],
                Some(77),
            ),
            (
                "version 1",
                &[MEMINFO, ("proc/self/cgroup", "5:cpu,memory:/a\n3:pids:/\n"), (V1, "12288\n")],
                Some(12288),
            ),
            (
                "version 1, unlimited",
                &[MEMINFO, ("proc/self/cgroup", "5:memory:/a\n"), (V1, "9223372036854771712\n")],
                Some(16384 << 10),
            ),
            (
                "no limit that can be read",
                &[MEMINFO, ("proc/self/cgroup", "0::/a\nnonsense\n")],
                Some(16384 << 10),
            ),
        ];
        for (name, files, limit) in table {
            let root = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = root.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            assert_eq!(limit_below(root.path()), limit, "{name}");
        }
    }
}
