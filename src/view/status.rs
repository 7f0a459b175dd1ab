//! The live files below `.mount-ckpt`: what serves what, and how much of it was served.
//!
//! Their text is made when they are opened, so they have no size before; readers get it by
//! reading to the end, as in `/proc`.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

/// A file whose text is made when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Live {
    /// `plan.json`: every tensor and what it is made of.
    Plan,
    /// `stats.json`: counters since the mount.
    Stats,
    /// `metrics.prom`: the same counters in the text format of Prometheus.
    Metrics,
}

impl Live {
    pub(super) const ALL: [(Live, &'static str); 3] =
        [(Live::Plan, "plan.json"), (Live::Stats, "stats.json"), (Live::Metrics, "metrics.prom")];
}

/// What the view has served since it was built.
#[derive(Debug)]
pub(super) struct Served {
    since: Instant,
    reads: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl Served {
    pub(super) fn new() -> Served {
        let zero = || AtomicU64::new(0);
        Served { since: Instant::now(), reads: zero(), bytes: zero(), errors: zero() }
    }

    /// Counts a read that gave so many bytes, or failed.
    pub(super) fn count(&self, bytes: Option<u64>) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        match bytes {
            Some(n) => self.bytes.fetch_add(n, Ordering::Relaxed),
            None => self.errors.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// The counters.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "seconds": self.since.elapsed().as_secs(),
            "reads": self.reads.load(Ordering::Relaxed),
            "bytes": self.bytes.load(Ordering::Relaxed),
            "errors": self.errors.load(Ordering::Relaxed),
        })
    }
}

/// Values that stay, or go up and down; all others only grow.
const GAUGES: [&str; 4] = ["files_count", "files_bytes", "cache_bytes", "cache_budget"];

/// The numbers of `stats` as Prometheus text; nested names are joined by underscores.
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
        let served = Served::new();
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
