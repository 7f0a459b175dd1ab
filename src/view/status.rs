//! The status files in `.mount-ckpt`: the plan of the view and its counters.
//!
//! Their text is rendered when they are opened, so their size is 0 before. As in `/proc`, readers
//! read to the end.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

/// A file whose text is rendered when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StatusFile {
    /// `plan.json`: every tensor and its sources.
    Plan,
    /// `stats.json`: counters since the mount.
    Stats,
    /// `metrics.prom`: the same counters in Prometheus' text format.
    Metrics,
}

impl StatusFile {
    pub(super) const ALL: [(StatusFile, &'static str); 3] = [
        (StatusFile::Plan, "plan.json"),
        (StatusFile::Stats, "stats.json"),
        (StatusFile::Metrics, "metrics.prom"),
    ];
}

/// Reads of files since the view was built.
#[derive(Debug)]
pub(super) struct ReadCounters {
    since: Instant,
    reads: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl ReadCounters {
    pub(super) fn new() -> ReadCounters {
        let zero = || AtomicU64::new(0);
        ReadCounters { since: Instant::now(), reads: zero(), bytes: zero(), errors: zero() }
    }

    /// Counts a read: the bytes that it returned, or `None` if it failed.
    pub(super) fn count(&self, bytes: Option<u64>) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        match bytes {
            Some(n) => self.bytes.fetch_add(n, Ordering::Relaxed),
            None => self.errors.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// The counters as an object, with the age of the view in seconds.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "seconds": self.since.elapsed().as_secs(),
            "reads": self.reads.load(Ordering::Relaxed),
            "bytes": self.bytes.load(Ordering::Relaxed),
            "errors": self.errors.load(Ordering::Relaxed),
        })
    }
}

/// Suffixes of values that are gauges; all others are counters, which only grow.
const GAUGES: [&str; 4] = ["files_count", "files_bytes", "cache_bytes", "cache_budget"];

/// The numbers of `stats` in Prometheus' text format; nested names are joined with underscores.
pub(super) fn prometheus(stats: &Value) -> String {
    let mut out = String::new();
    write_metrics("", stats, &mut out);
    out
}

fn write_metrics(name: &str, value: &Value, out: &mut String) {
    const IN_MEMORY: &str = "writing to memory does not fail";
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let name = if name.is_empty() { key.clone() } else { format!("{name}_{key}") };
                write_metrics(&name, value, out);
            }
        }
        Value::Number(n) => {
            let gauge = GAUGES.iter().any(|g| name.ends_with(g));
            let (kind, suffix) = if gauge { ("gauge", "") } else { ("counter", "_total") };
            writeln!(out, "# TYPE mount_ckpt_{name}{suffix} {kind}").expect(IN_MEMORY);
            writeln!(out, "mount_ckpt_{name}{suffix} {n}").expect(IN_MEMORY);
        }
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_bytes_and_errors_are_counted() {
        let served = ReadCounters::new();
        for n in [Some(10), None, Some(5)] {
            served.count(n);
        }
        let got = served.to_json();
        assert_eq!(
            (&got["reads"], &got["bytes"], &got["errors"]),
            (&json!(3), &json!(15), &json!(1))
        );
    }

    #[test]
    fn numbers_become_counters_and_gauges() {
        let stats = json!({"source": "/x", "reads": 3, "engine": {"hits": 7, "cache_bytes": 9}});
        assert_eq!(
            prometheus(&stats),
            "# TYPE mount_ckpt_reads_total counter\nmount_ckpt_reads_total 3\n\
             # TYPE mount_ckpt_engine_hits_total counter\nmount_ckpt_engine_hits_total 7\n\
             # TYPE mount_ckpt_engine_cache_bytes gauge\nmount_ckpt_engine_cache_bytes 9\n"
        );
    }
}
