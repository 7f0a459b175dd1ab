//! Reads the bytes of a tensor with `pread`.
//!
//! Shards are not mapped into memory. Access to a mapped file that has been truncated kills the
//! process with SIGBUS; a `pread` of it comes up short and becomes a [`SourceReadError`].

use crate::tensor::to_u64;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::checkpoint::{Checkpoint, SourceId, SourceTensor};
use super::error::SourceReadError;

/// Largest span, in bytes, that is read with one `pread` and from which rows are then copied. It
/// stays in the L2 cache; spans of 256 KiB and 1 MiB were no faster.
const SPAN_BYTES: usize = 64 << 10;

/// Gaps between rows of up to this many bytes are read and discarded, which saves a system call for
/// each row. A `pread` from the page cache takes 0.23 to 0.4 us for 64 to 256 bytes, 0.33 us for
/// 1 KiB, 0.8 to 2 us for 4 KiB: reading 2 KiB more costs about as much as one more call
/// (`cargo test --release -- --ignored --nocapture cost_of_a_run`).
const CHEAP_GAP_BYTES: u64 = 2 << 10;

impl Checkpoint {
    /// Reads bytes `at..at + out.len()` of a tensor.
    ///
    /// # Errors
    /// If the range exceeds the tensor, the shard was truncated, or the system reports an error.
    /// The contents of `out` are then unspecified.
    pub fn read(&self, id: SourceId, at: u64, out: &mut [u8]) -> Result<(), SourceReadError> {
        let t = self.tensor(id);
        check_range(t, at, Some(to_u64(out.len())))?;
        self.pread(t, at, out)
    }

    /// Reads a strip of a matrix: `rows` rows of `width` bytes, the first at byte `at` of the
    /// tensor, with a row pitch of `stride` bytes. Row `r` goes to
    /// `out[r * out_stride..][..width]`; all other bytes of `out` keep their contents.
    ///
    /// If the gaps between the rows are at most 2 KiB, rows and gaps are read in spans of up to
    /// 64 KiB. Otherwise each row takes a system call, which dominates for rows below 1 KiB:
    /// callers should ask for wide strips.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    ///
    /// # Panics
    /// If `out` is too short for the rows, or `out_stride` is below `width`.
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
        assert!(needed.is_some_and(|n| n <= out.len()), "the buffer is too short for the rows");
        if rows == 1 || (stride == to_u64(width) && out_stride == width) {
            return self.pread(t, at, &mut out[..rows * width]);
        }
        assert!(out_stride >= width, "the rows overlap in the buffer");
        let small_gaps = stride.saturating_sub(to_u64(width)) <= CHEAP_GAP_BYTES;
        match usize::try_from(stride) {
            Ok(stride) if small_gaps && stride + width <= SPAN_BYTES => {
                self.read_spans(t, at, width, stride, out, out_stride, rows)
            }
            _ => out
                .chunks_mut(out_stride)
                .take(rows)
                .zip(0..)
                .try_for_each(|(row, r)| self.pread(t, at + r * stride, &mut row[..width])),
        }
    }

    /// Does what [`Checkpoint::read_rows`] does in spans of at most [`SPAN_BYTES`], gaps included.
    #[allow(clippy::too_many_arguments)]
    fn read_spans(
        &self,
        t: &SourceTensor,
        mut at: u64,
        width: usize,
        stride: usize,
        out: &mut [u8],
        out_stride: usize,
        mut rows: usize,
    ) -> Result<(), SourceReadError> {
        let rows_per_span = (SPAN_BYTES - width) / stride.max(1) + 1;
        SPAN.with_borrow_mut(|span| {
            span.resize(SPAN_BYTES, 0);
            for out in out.chunks_mut(rows_per_span * out_stride) {
                let now = rows_per_span.min(rows);
                if now == 0 {
                    break;
                }
                self.pread(t, at, &mut span[..(now - 1) * stride + width])?;
                for (r, row) in out.chunks_mut(out_stride).take(now).enumerate() {
                    row[..width].copy_from_slice(&span[r * stride..][..width]);
                }
                at += to_u64(now * stride);
                rows -= now;
            }
            Ok(())
        })
    }

    /// The shard and the offset in it of bytes `at..at + bytes` of a tensor; `None` if the range
    /// exceeds the tensor. For callers that splice.
    pub fn file_range(&self, id: SourceId, at: u64, bytes: u64) -> Option<(&File, u64)> {
        let t = self.tensor(id);
        check_range(t, at, Some(bytes)).ok()?;
        Some((self.shard(t.shard).file(), t.offset + at))
    }

    /// Asks the kernel to read bytes `at..at + bytes` of a tensor into the page cache. The range is
    /// cut at the end of the tensor; errors are ignored.
    pub fn will_need(&self, id: SourceId, at: u64, bytes: u64) {
        let t = self.tensor(id);
        if at < t.bytes {
            self.shard(t.shard).will_need(t.offset + at, bytes.min(t.bytes - at));
        }
    }

    /// Reads a range that was checked to lie within the tensor.
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
    /// Buffer of [`SPAN_BYTES`], kept so that [`Checkpoint::read_rows`] does not allocate.
    static SPAN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn check_range(t: &SourceTensor, at: u64, length: Option<u64>) -> Result<(), SourceReadError> {
    let end = length.and_then(|n| at.checked_add(n));
    match end {
        Some(end) if end <= t.bytes => Ok(()),
        _ => Err(SourceReadError::OutOfRange { tensor: t.name.clone(), bytes: t.bytes, end }),
    }
}
