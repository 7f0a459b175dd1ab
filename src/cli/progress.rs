//! One line on stderr that says how far a long command is, where a person is looking.

use crate::tensor::ByteSize;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often the line changes.
const PACE: Duration = Duration::from_millis(200);

/// Bytes done of bytes to do, shared by the threads that do them.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    total: u64,
    done: AtomicU64,
    start: Instant,
    /// When the line was last drawn; `None` where nobody looks.
    drawn: Option<Mutex<Instant>>,
}

impl Progress {
    /// Of `total` bytes, none done.
    pub(super) fn new(what: &'static str, total: u64) -> Progress {
        let start = Instant::now();
        let drawn = io::stderr().is_terminal().then(|| Mutex::new(start));
        Progress { what, total, done: AtomicU64::new(0), start, drawn }
    }

    /// `bytes` more are done.
    pub(super) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // One thread draws; the others have work to do.
        let Some(Ok(mut drawn)) = self.drawn.as_ref().map(Mutex::try_lock) else { return };
        if drawn.elapsed() >= PACE {
            *drawn = Instant::now();
            let line = line(self.what, done, self.total, self.start.elapsed());
            let _ = write!(io::stderr(), "\r\x1b[K{line}");
        }
    }

    /// Bytes done so far.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Time since the start.
    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// Bytes a second, for reading.
pub(super) fn rate(bytes: u64, time: Duration) -> String {
    let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = u128::from(bytes) * 1000 / u128::from(millis);
    format!("{}/s", ByteSize(u64::try_from(rate).unwrap_or(u64::MAX)))
}

fn line(what: &str, done: u64, total: u64, time: Duration) -> String {
    let percent = u128::from(done) * 100 / u128::from(total.max(1));
    let left = u128::from(total.saturating_sub(done)) * time.as_millis() / u128::from(done.max(1));
    let left = left.div_ceil(1000);
    format!(
        "{what}: {} of {} ({percent} %), {}, {}:{:02} left",
        ByteSize(done),
        ByteSize(total),
        rate(done, time),
        left / 60,
        left % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_tells_rate_and_time_left() {
        let table = [
            (1 << 30, 4 << 30, 2, "export: 1.0 GiB of 4.0 GiB (25 %), 512.0 MiB/s, 0:06 left"),
            (0, 100, 0, "export: 0 B of 100 B (0 %), 0 B/s, 0:00 left"),
            (1 << 20, 1 << 30, 1, "export: 1.0 MiB of 1.0 GiB (0 %), 1.0 MiB/s, 17:03 left"),
            (5, 5, 1, "export: 5 B of 5 B (100 %), 5 B/s, 0:00 left"),
            (0, 0, 1, "export: 0 B of 0 B (0 %), 0 B/s, 0:00 left"),
        ];
        for (done, total, seconds, want) in table {
            assert_eq!(line("export", done, total, Duration::from_secs(seconds)), want);
        }
    }
}
