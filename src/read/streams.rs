//! Which readers go forward, told by where they read.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::plan::TensorId;

/// Readers that are told apart; 8 that read a file each, and as many that come and go.
const STREAMS: usize = 16;

/// Reads by which a reader may be ahead of where it is expected, in reads as large as the one that is
/// judged: the kernel has several requests of a read-ahead window under way at once.
const AHEAD: u64 = 16;

/// Reads by which it may be behind the furthest. Threads that take turns with pieces of 8 MiB are one
/// reader, and drift apart: two of them read past the page cache at 4.5 GB/s where this is 16, and at
/// 5.1 where it is 128.
const BEHIND: u64 = 128;

/// A reader that goes forward through a tensor.
#[derive(Clone, Copy, Debug)]
struct Stream {
    tensor: TensorId,
    /// Byte of the tensor that it came in at.
    start: u64,
    /// Bytes of the tensors before that it read whole.
    before: u64,
    /// Byte behind the furthest that it read.
    next: u64,
    /// Bytes of the tensor.
    size: u64,
    /// Where what was asked for ends, for each unit.
    asked: [u64; 3],
}

/// What is asked for on behalf of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// Chunks, made.
    Chunk,
    /// Planes ahead, whose stored rows are read.
    Plane,
    /// Planes behind, whose stored rows are let go.
    Behind,
}

/// The readers of late, the last one first.
#[derive(Debug, Default)]
pub(super) struct Streams(Mutex<Vec<Stream>>);

impl Streams {
    /// Notes a read of bytes `at..end` of a tensor of `size` bytes. Gives how many bytes its reader read
    /// without a gap before, those of tensors that it read whole just before included; 0 where it just
    /// came in.
    pub(super) fn advance(&self, tensor: TensorId, size: u64, at: u64, end: u64) -> u64 {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (ahead, behind) = (AHEAD * (end - at), BEHIND * (end - at));
        let near = |s: &Stream| {
            let from = s.next.saturating_sub(behind).max(s.start.saturating_sub(ahead));
            s.tensor == tensor && (from..=s.next + ahead).contains(&at)
        };
        let found = streams.iter().position(near);
        let mut stream = match found {
            Some(i) => streams.remove(i),
            None => {
                // Whoever read the last tensor whole will read this one whole.
                let whole = |s: &&Stream| at <= ahead && s.start == 0 && s.next + ahead >= s.size;
                let before = streams.first().filter(whole).map_or(0, |s| s.before + s.next);
                Stream { tensor, start: at, before, next: at, size, asked: [0; 3] }
            }
        };
        stream.start = stream.start.min(at);
        let run = stream.before + at - stream.start;
        stream.next = stream.next.max(end);
        streams.truncate(STREAMS - 1);
        streams.insert(0, stream);
        run
    }

    /// Whether the last reader of a tensor came by byte `at`.
    pub(super) fn passed(&self, tensor: TensorId, at: u64) -> bool {
        let streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = streams.iter().find(|s| s.tensor == tensor);
        last.is_some_and(|s| (s.start..s.next).contains(&at))
    }

    /// What to ask for on behalf of the reader that [`Streams::advance`] saw last in a tensor: what
    /// before `until` was not asked for yet, at most `most` of it.
    pub(super) fn ask(&self, tensor: TensorId, unit: Unit, until: u64, most: u64) -> Range<u64> {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = streams.iter_mut().find(|s| s.tensor == tensor) else { return 0..0 };
        let asked = match unit {
            Unit::Chunk => &mut stream.asked[0],
            Unit::Plane => &mut stream.asked[1],
            Unit::Behind => &mut stream.asked[2],
        };
        let start = (*asked).max(until.saturating_sub(most)).min(until);
        *asked = until.max(*asked);
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

    fn run(streams: &Streams, tensor: TensorId, at: u64) -> u64 {
        streams.advance(tensor, SIZE, at, at + 10)
    }

    #[test]
    fn a_reader_goes_forward() {
        let streams = Streams::default();
        assert_eq!([0, 10, 20, 30].map(|at| run(&streams, A, at)), [0, 10, 20, 30]);
        // Requests of a window come in any order.
        assert_eq!([60, 40, 50, 70].map(|at| run(&streams, A, at)), [60, 40, 50, 70]);
        // Another tensor, a jump, and back.
        assert_eq!(run(&streams, B, 80), 0);
        assert_eq!(run(&streams, A, 241), 0);
        assert_eq!(run(&streams, A, 251), 10);
        assert_eq!(run(&streams, A, 80), 80);
        // A thread that is behind the others, and one that is too far behind.
        assert_eq!(run(&streams, C, 5000), 0);
        assert!((5010..7000).step_by(10).all(|at| run(&streams, C, at) == at - 5000));
        assert_eq!(run(&streams, C, 5720), 720);
        let passed = |at| streams.passed(C, at);
        assert_eq!([4999, 5000, 6999, 7000].map(passed), [false, true, true, false]);
        assert_eq!(run(&streams, C, 5700), 0);
        assert_eq!([5700, 5710].map(passed), [true, false], "this is another reader");
    }

    #[test]
    fn a_reader_of_whole_tensors_goes_on_in_the_next() {
        let streams = Streams::default();
        let read = |tensor, at: u64| streams.advance(tensor, 10_000, at, at + 100);
        assert!((0..100).all(|i| read(A, 100 * i) == 100 * i));
        // Requests of a window come in any order here too.
        assert_eq!([read(B, 100), read(B, 0), read(B, 200)], [10_000, 10_000, 10_200]);
        assert_eq!(read(C, 0), 0, "most of the tensor before is missing");

        let streams = Streams::default();
        let read = |tensor, at: u64| streams.advance(tensor, 10_000, at, at + 100);
        assert!((40..100).all(|i| read(A, 100 * i) == 100 * (i - 40)));
        assert_eq!(read(B, 0), 0, "the start of the tensor before is missing");
        assert!((1..100).all(|i| read(B, 100 * i) == 100 * i));
        assert_eq!(read(C, 5000), 0, "it does not start with the tensor");
    }

    #[test]
    fn readers_are_told_apart_up_to_a_number() {
        let streams = Streams::default();
        let starts = || (0..16).map(|i| 1000 * i);
        assert!(starts().all(|at| run(&streams, A, at) == 0));
        assert!(starts().all(|at| run(&streams, A, at + 10) == 10));
        assert_eq!(run(&streams, A, 99_000), 0);
        assert_eq!(run(&streams, A, 20), 0, "the first of them was forgotten");
    }

    #[test]
    fn nothing_is_asked_for_twice() {
        let streams = Streams::default();
        let ask = |until| streams.ask(A, Unit::Chunk, until, 4);
        assert_eq!(ask(5), 0..0, "nobody reads");
        run(&streams, A, 0);
        assert_eq!([5, 5, 7, 6].map(ask), [1..5, 5..5, 5..7, 6..6]);
        assert_eq!(ask(100), 96..100);
        assert_eq!(streams.ask(A, Unit::Plane, 2, 1), 1..2);
    }
}
