//! Long byte ranges cut into pieces that threads take in order.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of a piece: a few chunks, so that a thread stays on one for a while.
pub(super) const PIECE: u64 = 8 << 20;

/// Calls `work(at, buffer)` for every piece of `bytes` bytes, on `threads` threads, each with a
/// buffer of its own of the piece's length.
///
/// # Errors
/// The first error of `work`; pieces that nobody has begun are left then.
pub(super) fn for_each_piece(
    bytes: u64,
    threads: usize,
    work: impl Fn(u64, &mut [u8]) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let run = || {
        let mut buffer = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(PIECE, Ordering::Relaxed);
            let Some(left) = bytes.checked_sub(at).filter(|left| *left > 0) else { break };
            let length = usize::try_from(left.min(PIECE)).expect("a piece fits into memory");
            buffer.resize(length, 0);
            if let Err(error) = work(at, &mut buffer) {
                failed.store(true, Ordering::Relaxed);
                first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    let pieces = usize::try_from(bytes.div_ceil(PIECE)).unwrap_or(usize::MAX);
    std::thread::scope(|scope| {
        for _ in 1..threads.min(pieces) {
            scope.spawn(run);
        }
        run();
    });
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_whole_once() {
        for bytes in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5] {
            for threads in [1, 3] {
                let seen = Mutex::new(Vec::new());
                let work = |at, buffer: &mut [u8]| {
                    seen.lock().unwrap().push((at, u64::try_from(buffer.len()).unwrap()));
                    Ok(())
                };
                for_each_piece(bytes, threads, work).unwrap();
                let mut seen = seen.into_inner().unwrap();
                seen.sort_unstable();
                let end = seen.iter().fold(0, |end, (at, n)| {
                    assert_eq!(*at, end, "{bytes} bytes");
                    end + n
                });
                assert_eq!(end, bytes);
            }
        }
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let done = AtomicU64::new(0);
        let work = |at, _: &mut [u8]| {
            done.fetch_add(1, Ordering::Relaxed);
            anyhow::ensure!(at != PIECE, "no piece at {at}");
            Ok(())
        };
        let error = for_each_piece(100 * PIECE, 1, work).unwrap_err();
        assert_eq!(error.to_string(), format!("no piece at {PIECE}"));
        assert_eq!(done.into_inner(), 2);
    }
}
