//! Cuts a long byte range into pieces for a pool of threads, as `verify` and `export` need it.

use crate::tensor::to_usize;
use rayon::ThreadPool;
use rayon::iter::{ParallelBridge, ParallelIterator};

/// Bytes of a piece. It spans several chunks of the engine, so that each thread reads sequentially for
/// a while.
pub(super) const PIECE: u64 = 8 << 20;

/// Cuts `bytes` bytes into pieces and calls `work(offset, buffer)` for each on the threads of `pool`. The
/// buffer is as long as the piece. Pieces start in the order of their offsets.
///
/// # Errors
/// The first error of `work`. No piece is started after it.
pub(super) fn for_each_piece(
    pool: &ThreadPool,
    bytes: u64,
    work: impl Fn(u64, &mut [u8]) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    let offsets = (0..bytes.div_ceil(PIECE)).map(|piece| piece * PIECE);
    pool.install(|| {
        offsets.par_bridge().try_for_each_init(Vec::new, |buffer, at| {
            buffer.resize(to_usize(PIECE.min(bytes - at)), 0);
            work(at, buffer)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::ThreadPoolBuilder;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn pool(threads: usize) -> ThreadPool {
        ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn pieces_cover_every_byte_once() {
        for bytes in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5] {
            for threads in [1, 3] {
                let seen = Mutex::new(Vec::new());
                let work = |at, buffer: &mut [u8]| {
                    seen.lock().unwrap().push((at, u64::try_from(buffer.len()).unwrap()));
                    Ok(())
                };
                for_each_piece(&pool(threads), bytes, work).unwrap();
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
    fn the_first_error_stops_the_work() {
        let done = AtomicU64::new(0);
        let work = |at, _: &mut [u8]| {
            done.fetch_add(1, Ordering::Relaxed);
            anyhow::ensure!(at != PIECE, "no piece at {at}");
            Ok(())
        };
        let error = for_each_piece(&pool(1), 100 * PIECE, work).unwrap_err();
        assert_eq!(error.to_string(), format!("no piece at {PIECE}"));
        assert_eq!(done.into_inner(), 2);
    }
}
