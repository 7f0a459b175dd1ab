//! `status` and `umount`: finds the mounts of all processes in the mount table, shows their counters,
//! unmounts them.

use super::args::{StatusArgs, UmountArgs};
use super::output;
use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::mountpoint::{is_alive, path_in_table};
use crate::mount::unmount::{Unmount, UnmountError, unmount};
use crate::view::STATUS_DIRECTORY;
use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// One mount in the list of `status`.
#[derive(Debug, Serialize)]
struct MountRow {
    mount: String,
    source: String,
    /// Whether a process still serves it.
    alive: bool,
    options: String,
}

/// Lists all mounts, or shows the counters of the one that is named.
///
/// # Errors
/// The named mount does not exist, is not ours, or has lost its process.
pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let table = mountinfo::read().context("cannot read the mount table")?;
    match &args.at {
        None => list(&table, args.json),
        Some(at) => show(&table, &path_in_table(at), args.json),
    }
}

fn list(table: &[MountEntry], json: bool) -> anyhow::Result<()> {
    let rows: Vec<MountRow> = table
        .iter()
        .filter(|entry| entry.is_ours())
        .map(|entry| MountRow {
            mount: entry.at.display().to_string(),
            source: entry.source.to_string_lossy().into_owned(),
            alive: is_alive(entry),
            options: entry.options.clone(),
        })
        .collect();
    if json {
        return output::print_json(&rows);
    }
    let lines = rows.iter().map(|row| {
        let dead = if row.alive {
            ""
        } else {
            "  (its process died: unmount it with `mount-ckpt umount`)"
        };
        format!("{}  {}{dead}\n", row.mount, row.source)
    });
    output::print(&lines.collect::<String>())
}

fn show(table: &[MountEntry], at: &Path, json: bool) -> anyhow::Result<()> {
    let shown = at.display();
    let entry = mountinfo::topmost(table, at);
    let entry = entry.with_context(|| format!("`{shown}` is not mounted"))?;
    anyhow::ensure!(
        entry.is_ours(),
        "`{shown}` is not our mount: expected type `{}`, got `{}`",
        mountinfo::FS_TYPE,
        entry.fs_type
    );
    anyhow::ensure!(
        is_alive(entry),
        "the process of the mount at `{shown}` died: run `mount-ckpt umount {shown}`, then mount again"
    );
    let file = at.join(STATUS_DIRECTORY).join("stats.json");
    let text = std::fs::read(&file).with_context(|| format!("cannot read `{}`", file.display()))?;
    let counters: Value = serde_json::from_slice(text.trim_ascii())
        .with_context(|| format!("`{}` is not JSON", file.display()))?;
    if json {
        return output::print_json(&counters);
    }
    let mut lines = format!("{shown}  {}\n", entry.source.to_string_lossy());
    flatten("", &counters, &mut lines);
    output::print(&lines)
}

/// Adds a line `outer.inner: value` to `lines` for every value that is not an object.
fn flatten(name: &str, value: &Value, lines: &mut String) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                flatten(&name, value, lines);
            }
        }
        Value::String(text) => lines.push_str(&format!("{name}: {text}\n")),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => {
            lines.push_str(&format!("{name}: {value}\n"));
        }
    }
}

/// Unmounts, and tries again for half a second while the mount is in use. If another view was mounted
/// of files in this mount, the process of that view holds them for a moment after it was unmounted.
fn unmount_with_retry(
    mut unmount: impl FnMut() -> Result<(), UnmountError>,
) -> Result<(), UnmountError> {
    const TRIES: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(25);
    for _ in 1..TRIES {
        match unmount() {
            Err(UnmountError::Busy(_)) => thread::sleep(PAUSE),
            done => return done,
        }
    }
    unmount()
}

/// Unmounts every mount point that is given, also those after one that fails.
///
/// # Errors
/// Some of them could not be unmounted; the error names each.
pub(super) fn unmount_all(args: &UmountArgs) -> anyhow::Result<()> {
    let how = if args.lazy { Unmount::Lazy } else { Unmount::Now };
    let mut failures = Vec::new();
    for at in &args.at {
        match unmount_with_retry(|| unmount(at, how)) {
            Err(UnmountError::NotMounted(_)) if args.quiet => {}
            Err(error) => failures.push(output::one_line(&error.into())),
            Ok(()) => {}
        }
    }
    anyhow::ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_mount_is_unmounted_with_retries() {
        let mut left = 3;
        let done = unmount_with_retry(|| {
            left -= 1;
            if left > 0 { Err(UnmountError::Busy("/mnt".to_owned())) } else { Ok(()) }
        });
        assert!(done.is_ok());
        let mut tries = 0;
        let done = unmount_with_retry(|| {
            tries += 1;
            Err(UnmountError::Busy("/mnt".to_owned()))
        });
        assert!(matches!(done, Err(UnmountError::Busy(_))) && tries > 1);
        let done = unmount_with_retry(|| Err(UnmountError::NotMounted("/mnt".into())));
        assert!(
            matches!(done, Err(UnmountError::NotMounted(_))),
            "other errors are returned at once"
        );
    }

    #[test]
    fn counters_are_printed_flat() {
        let counters = serde_json::json!({
            "cache": { "hits": 3, "bytes": 0 }, "layout": "native", "errors": [], "since": null
        });
        let mut lines = String::new();
        flatten("", &counters, &mut lines);
        assert_eq!(
            lines,
            "cache.hits: 3\ncache.bytes: 0\nlayout: native\nerrors: []\nsince: null\n"
        );
    }
}
