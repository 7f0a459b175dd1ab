//! Reading tensor bytes, by `pread`.
//!
//! Never through a map: a file that shrinks under a map kills the process, a `pread` comes up
//! short and becomes a [`SourceReadError`].

use crate::tensor::to_u64;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::checkpoint::{Checkpoint, SourceId, SourceTensor};
use super::error::SourceReadError;

/// Bytes of a span that is read at once and then picked apart: stays in the L2 cache; spans of
/// 256 KiB and 1 MiB were no faster.
const SPAN_BYTES: usize = 64 << 10;

/// Bytes between two runs that cost less to read than another system call: a warm `pread` of 64 to
/// 256 bytes takes 0.23 to 0.4 us, one of 1 KiB 0.33, of 4 KiB 0.8 to 2, so that 2 KiB of gap and
/// one call less are even (`cargo test --release -- --ignored --nocapture cost_of_a_run`).
const CHEAP_GAP_BYTES: u64 = 2 << 10;

impl Checkpoint {
    /// Reads bytes `at..at + out.len()` of a tensor.
    ///
    /// # Errors
    /// Where the request leaves the tensor, the shard has become shorter, or the system reports
    /// an error. What `out` holds then is not defined.
    pub fn read(&self, id: SourceId, at: u64, out: &mut [u8]) -> Result<(), SourceReadError> {
        let t = self.tensor(id);
        check_range(t, at, Some(to_u64(out.len())))?;
        self.pread(t, at, out)
    }

    /// Reads `rows` runs of `width` bytes, the first at `at` and each `stride` bytes behind the one
    /// before; run r goes to `out[r * out_stride..][..width]`, the rest of `out` stays.
    ///
    /// Runs that lie at most 2 KiB apart are read in spans and copied from there; others take a
    /// system call each, which is most of the time of a run below 1 KiB: ask for wide strips.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    ///
    /// # Panics
    /// Where `out` does not hold the runs, or `out_stride` is below `width`.
    #[allow(clippy::too_many_arguments)]
    pub fn read_rows(
        &self,
        id: SourceId,
        at: u64,
        width: usize,
        stride: u64,
        rows: usize,
        out: &mut [u8],
        out_stride: usize,
    ) -> Result<(), SourceReadError> {
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let t = self.tensor(id);
        let length =
            to_u64(rows - 1).checked_mul(stride).and_then(|n| n.checked_add(to_u64(width)));
        check_range(t, at, length)?;
        let needed = (rows - 1).checked_mul(out_stride).and_then(|n| n.checked_add(width));
        assert!(needed.is_some_and(|n| n <= out.len()), "the buffer does not hold the runs");
        if rows == 1 || (stride == to_u64(width) && out_stride == width) {
            return self.pread(t, at, &mut out[..rows * width]);
        }
        assert!(out_stride >= width, "the runs overlap in the buffer");
        let near = stride.saturating_sub(to_u64(width)) <= CHEAP_GAP_BYTES;
        match usize::try_from(stride) {
            Ok(stride) if near && stride + width <= SPAN_BYTES => {
                self.read_near(t, at, width, stride, out, out_stride, rows)
            }
            _ => out
                .chunks_mut(out_stride)
                .take(rows)
                .zip(0..)
                .try_for_each(|(run, r)| self.pread(t, at + r * stride, &mut run[..width])),
        }
    }

    /// [`Checkpoint::read_rows`] in spans of at most [`SPAN_BYTES`].
    #[allow(clippy::too_many_arguments)]
    fn read_near(
        &self,
        t: &SourceTensor,
        mut at: u64,
        width: usize,
        stride: usize,
        out: &mut [u8],
        out_stride: usize,
        mut rows: usize,
    ) -> Result<(), SourceReadError> {
        let runs_of_a_span = (SPAN_BYTES - width) / stride.max(1) + 1;
        SPAN.with_borrow_mut(|span| {
            span.resize(SPAN_BYTES, 0);
            for part in out.chunks_mut(runs_of_a_span * out_stride) {
                let runs = runs_of_a_span.min(rows);
                if runs == 0 {
                    break;
                }
                self.pread(t, at, &mut span[..(runs - 1) * stride + width])?;
                for (r, run) in part.chunks_mut(out_stride).take(runs).enumerate() {
                    run[..width].copy_from_slice(&span[r * stride..][..width]);
                }
                at += to_u64(runs * stride);
                rows -= runs;
            }
            Ok(())
        })
    }

    /// The file and the offset in it where bytes `at..at + bytes` of a tensor lie; `None` where they
    /// leave the tensor.
    pub fn stored(&self, id: SourceId, at: u64, bytes: u64) -> Option<(&File, u64)> {
        let t = self.tensor(id);
        check_range(t, at, Some(bytes)).ok()?;
        Some((self.shard(t.shard).file(), t.offset + at))
    }

    /// Tells the kernel that `bytes` bytes at `at` of a tensor are wanted soon. What leaves the
    /// tensor is not asked for; errors do not matter.
    pub fn will_need(&self, id: SourceId, at: u64, bytes: u64) {
        let t = self.tensor(id);
        if at < t.bytes {
            self.shard(t.shard).will_need(t.offset + at, bytes.min(t.bytes - at));
        }
    }

    /// Reads from a range that lies within the tensor.
    fn pread(&self, t: &SourceTensor, at: u64, out: &mut [u8]) -> Result<(), SourceReadError> {
        let shard = self.shard(t.shard);
        let offset = t.offset + at;
        shard.file().read_exact_at(out, offset).map_err(|source| {
            let (shard_path, tensor) = (shard.path().to_owned(), t.name.clone());
            match (source.kind(), shard.file().metadata()) {
                (io::ErrorKind::UnexpectedEof, Ok(now)) => SourceReadError::Truncated {
                    shard: shard_path,
                    tensor,
                    offset,
                    wanted: to_u64(out.len()),
                    actual: now.len(),
                },
                _ => SourceReadError::Io { shard: shard_path, tensor, offset, source },
            }
        })
    }
}

thread_local! {
    /// [`SPAN_BYTES`], kept so that a strip of a matrix costs no allocation.
    static SPAN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn check_range(t: &SourceTensor, at: u64, length: Option<u64>) -> Result<(), SourceReadError> {
    let end = length.and_then(|n| at.checked_add(n));
    match end {
        Some(end) if end <= t.bytes => Ok(()),
        _ => Err(SourceReadError::OutOfRange { tensor: t.name.clone(), bytes: t.bytes, end }),
    }
}
