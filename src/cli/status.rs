//! `status` and `umount`: the mounts that are up, seen from outside.

use super::args::{StatusArgs, UmountArgs};
use super::output;
use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::mountpoint::{is_alive, place};
use crate::mount::unmount::{Unmount, UnmountError, unmount};
use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// A mount, as `status` lists it.
#[derive(Debug, Serialize)]
struct MountRow {
    mount: String,
    source: String,
    /// Whether its process answers.
    alive: bool,
    options: String,
}

/// Lists the mounts, or shows the counters of one.
///
/// # Errors
/// Where the one that is named is not there, not ours or dead.
pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let table = mountinfo::read().context("cannot read the mount table")?;
    match &args.at {
        None => list(&table, args.json),
        Some(at) => show(&table, &place(at), args.json),
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
        let dead = if row.alive { "" } else { "  (dead: take it down with `mount-ckpt umount`)" };
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
        "`{shown}` is a mount of type `{}`, expected `{}`",
        entry.fs_type,
        mountinfo::FS_TYPE
    );
    anyhow::ensure!(
        is_alive(entry),
        "the process of the mount at `{shown}` is gone: `mount-ckpt umount {shown}`, then mount again"
    );
    let file = at.join(".mount-ckpt/stats.json");
    let text = std::fs::read(&file).with_context(|| format!("cannot read `{}`", file.display()))?;
    let counters: Value = serde_json::from_slice(text.trim_ascii())
        .with_context(|| format!("`{}` is no JSON", file.display()))?;
    if json {
        return output::print_json(&counters);
    }
    let mut lines = format!("{shown}  {}\n", entry.source.to_string_lossy());
    lay_flat("", &counters, &mut lines);
    output::print(&lines)
}

/// One line for each number or word, named by the way to it.
fn lay_flat(name: &str, value: &Value, lines: &mut String) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                lay_flat(&name, value, lines);
            }
        }
        Value::String(word) => lines.push_str(&format!("{name}: {word}\n")),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => {
            lines.push_str(&format!("{name}: {value}\n"));
        }
    }
}

/// Takes a mount down that may be in use by what is just ending: the process of a mount of its files
/// outlives that mount by a moment.
fn settled(mut unmount: impl FnMut() -> Result<(), UnmountError>) -> Result<(), UnmountError> {
    const TRIES: u32 = 20;
    const BETWEEN: Duration = Duration::from_millis(25);
    for _ in 1..TRIES {
        match unmount() {
            Err(UnmountError::Busy(_)) => thread::sleep(BETWEEN),
            done => return done,
        }
    }
    unmount()
}

/// Takes mounts down, those after a failure too.
///
/// # Errors
/// Where one of them stays.
pub(super) fn unmount_all(args: &UmountArgs) -> anyhow::Result<()> {
    let how = if args.lazy { Unmount::Lazy } else { Unmount::Now };
    let mut failures = Vec::new();
    for at in &args.at {
        match settled(|| unmount(at, how)) {
            Err(UnmountError::NotMounted(_)) if args.quiet => {}
            Err(error) => failures.push(error.to_string()),
            Ok(()) => {}
        }
    }
    anyhow::ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_is_tried_for_a_while() {
        let mut left = 3;
        let done = settled(|| {
            left -= 1;
            if left > 0 { Err(UnmountError::Busy("/mnt".to_owned())) } else { Ok(()) }
        });
        assert!(done.is_ok());
        let mut tries = 0;
        let done = settled(|| {
            tries += 1;
            Err(UnmountError::Busy("/mnt".to_owned()))
        });
        assert!(matches!(done, Err(UnmountError::Busy(_))) && tries > 1);
        let done = settled(|| Err(UnmountError::NotMounted("/mnt".into())));
        assert!(matches!(done, Err(UnmountError::NotMounted(_))), "it is not tried again");
    }

    #[test]
    fn counters_lie_flat() {
        let counters = serde_json::json!({
            "cache": { "hits": 3, "bytes": 0 }, "layout": "native", "errors": [], "since": null
        });
        let mut lines = String::new();
        lay_flat("", &counters, &mut lines);
        assert_eq!(
            lines,
            "cache.hits: 3\ncache.bytes: 0\nlayout: native\nerrors: []\nsince: null\n"
        );
    }
}
