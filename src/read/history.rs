//! Detects sequential readers from the ranges that they read.
//!
//! FUSE requests do not say which reader they come from. The engine therefore keeps the last
//! [`MAX_READERS`] positions at which somebody read forward, and assigns each request to the one
//! that it continues. Requests may arrive a little out of order, and several threads that share the
//! work count as one reader.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::plan::TensorId;

/// Readers that are tracked: eight with a file each, and as many short-lived ones.
const MAX_READERS: usize = 16;

/// Tolerance for out-of-order requests: a read that starts at most this many times its own size
/// beyond the expected position still counts as sequential. The kernel has several requests of a
/// read-ahead window in flight at once.
const MAX_READS_AHEAD: u64 = 16;

/// The same behind the furthest position. Threads that take turns with pieces of 8 MiB are one
/// reader, and drift apart: two of them read with direct I/O at 4.5 GB/s if this is 16, and at 5.1
/// if it is 128.
const MAX_READS_BEHIND: u64 = 128;

/// A reader that reads forward through a tensor.
#[derive(Clone, Copy, Debug)]
struct Reader {
    tensor: TensorId,
    /// First byte of the tensor that it read.
    start: u64,
    /// Bytes that it read in the tensors before, each of them whole.
    before: u64,
    /// End of the furthest read.
    next: u64,
    /// Bytes of the tensor.
    size: u64,
    /// End of what was claimed for it, for each [`Claim`].
    claimed: [u64; 3],
}

/// Work that is done once on behalf of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Decode chunks ahead of the reader.
    Chunks,
    /// Read the source rows of planes ahead of the reader.
    PlanesAhead,
    /// Release the source rows of planes behind the reader.
    PlanesBehind,
}

/// The latest readers, the most recently active one first.
#[derive(Debug, Default)]
pub(super) struct ReaderHistory(Mutex<Vec<Reader>>);

impl ReaderHistory {
    /// Records a read of bytes `at..end` of a tensor of `size` bytes and returns how many bytes its
    /// reader had read in sequence before it: 0 for a new reader. Tensors that the reader read
    /// whole just before this one are included.
    pub(super) fn observe(&self, tensor: TensorId, size: u64, at: u64, end: u64) -> u64 {
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (ahead, behind) = (MAX_READS_AHEAD * (end - at), MAX_READS_BEHIND * (end - at));
        let continues = |r: &Reader| {
            let from = r.next.saturating_sub(behind).max(r.start.saturating_sub(ahead));
            r.tensor == tensor && (from..=r.next + ahead).contains(&at)
        };
        let found = readers.iter().position(continues);
        let mut reader = match found {
            Some(i) => readers.remove(i),
            None => {
                // The reader that just finished a whole tensor is expected to read this one whole.
                let whole = |r: &&Reader| at <= ahead && r.start == 0 && r.next + ahead >= r.size;
                let before = readers.first().filter(whole).map_or(0, |r| r.before + r.next);
                Reader { tensor, start: at, before, next: at, size, claimed: [0; 3] }
            }
        };
        reader.start = reader.start.min(at);
        let run = reader.before + at - reader.start;
        reader.next = reader.next.max(end);
        readers.truncate(MAX_READERS - 1);
        readers.insert(0, reader);
        run
    }

    /// Whether the last reader of a tensor has already passed byte `at`.
    pub(super) fn has_passed(&self, tensor: TensorId, at: u64) -> bool {
        let readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = readers.iter().find(|r| r.tensor == tensor);
        last.is_some_and(|r| (r.start..r.next).contains(&at))
    }

    /// Claims work up to `until` on behalf of the last reader of a tensor. Returns the part that
    /// was not claimed before, at most the last `most` items of it.
    pub(super) fn claim(
        &self,
        tensor: TensorId,
        claim: Claim,
        until: u64,
        most: u64,
    ) -> Range<u64> {
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reader) = readers.iter_mut().find(|r| r.tensor == tensor) else { return 0..0 };
        let claimed = match claim {
            Claim::Chunks => &mut reader.claimed[0],
            Claim::PlanesAhead => &mut reader.claimed[1],
            Claim::PlanesBehind => &mut reader.claimed[2],
        };
        let start = (*claimed).max(until.saturating_sub(most)).min(until);
        *claimed = until.max(*claimed);
        start..until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TensorId = TensorId(0);
    const B: TensorId = TensorId(1);
    const C: TensorId = TensorId(2);

    const SIZE: u64 = 100_000;

    fn run(history: &ReaderHistory, tensor: TensorId, at: u64) -> u64 {
        history.observe(tensor, SIZE, at, at + 10)
    }

    #[test]
    fn sequential_reads_extend_the_run() {
        let history = ReaderHistory::default();
        assert_eq!([0, 10, 20, 30].map(|at| run(&history, A, at)), [0, 10, 20, 30]);
        // Requests within a read-ahead window arrive in any order.
        assert_eq!([60, 40, 50, 70].map(|at| run(&history, A, at)), [60, 40, 50, 70]);
        // Another tensor and a jump start runs of their own; the first run is still known.
        assert_eq!(run(&history, B, 80), 0);
        assert_eq!(run(&history, A, 241), 0);
        assert_eq!(run(&history, A, 251), 10);
        assert_eq!(run(&history, A, 80), 80);
        // 5720 is 128 reads behind the furthest and belongs to the run; 5700 is too far behind.
        assert_eq!(run(&history, C, 5000), 0);
        assert!((5010..7000).step_by(10).all(|at| run(&history, C, at) == at - 5000));
        assert_eq!(run(&history, C, 5720), 720);
        let passed = |at| history.has_passed(C, at);
        assert_eq!([4999, 5000, 6999, 7000].map(passed), [false, true, true, false]);
        assert_eq!(run(&history, C, 5700), 0);
        assert_eq!([5700, 5710].map(passed), [true, false], "5700 starts another run");
    }

    #[test]
    fn a_run_continues_in_the_next_tensor() {
        let history = ReaderHistory::default();
        let read = |tensor, at: u64| history.observe(tensor, 10_000, at, at + 100);
        assert!((0..100).all(|i| read(A, 100 * i) == 100 * i));
        // Here, too, requests within a window arrive in any order.
        assert_eq!([read(B, 100), read(B, 0), read(B, 200)], [10_000, 10_000, 10_200]);
        assert_eq!(read(C, 0), 0, "most of the previous tensor was not read");

        let history = ReaderHistory::default();
        let read = |tensor, at: u64| history.observe(tensor, 10_000, at, at + 100);
        assert!((40..100).all(|i| read(A, 100 * i) == 100 * (i - 40)));
        assert_eq!(read(B, 0), 0, "the start of the previous tensor was not read");
        assert!((1..100).all(|i| read(B, 100 * i) == 100 * i));
        assert_eq!(read(C, 5000), 0, "the read is not at the start of the tensor");
    }

    #[test]
    fn only_the_latest_16_readers_are_tracked() {
        let history = ReaderHistory::default();
        let starts = || (0..16).map(|i| 1000 * i);
        assert!(starts().all(|at| run(&history, A, at) == 0));
        assert!(starts().all(|at| run(&history, A, at + 10) == 10));
        assert_eq!(run(&history, A, 99_000), 0);
        assert_eq!(run(&history, A, 20), 0, "the first of 17 readers is not tracked any more");
    }

    #[test]
    fn claims_do_not_overlap() {
        let history = ReaderHistory::default();
        let ask = |until| history.claim(A, Claim::Chunks, until, 4);
        assert_eq!(ask(5), 0..0, "no read was observed");
        run(&history, A, 0);
        assert_eq!([5, 5, 7, 6].map(ask), [1..5, 5..5, 5..7, 6..6]);
        assert_eq!(ask(100), 96..100);
        assert_eq!(history.claim(A, Claim::PlanesAhead, 2, 1), 1..2);
    }
}
