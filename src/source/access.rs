//! Reading tensor bytes, by `pread`.
//!
//! Never through a map: a file that shrinks under a map kills the process, a `pread` comes up
//! short and becomes a [`ReadError`].

use std::cell::RefCell;
use std::io;
use std::os::unix::fs::FileExt;

use super::checkpoint::{Checkpoint, SourceId, SourceTensor};
use super::error::ReadError;

/// Bytes of a span that is read at once and then picked apart.
const SPAN_BYTES: usize = 256 << 10;

/// Bytes between two runs that cost less to read than another system call.
const CHEAP_GAP_BYTES: u64 = 4 << 10;

impl Checkpoint {
    /// Reads bytes `at..at + out.len()` of a tensor.
    ///
    /// # Errors
    /// Where the request leaves the tensor, the shard has become shorter, or the system reports
    /// an error. What `out` holds then is not defined.
    pub fn read(&self, id: SourceId, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let t = self.tensor(id);
        check_range(t, at, Some(to_u64(out.len())))?;
        self.pread(t, at, out)
    }

    /// Reads `rows` runs of `width` bytes, the first at `at` and each `stride` bytes behind the one
    /// before; run r goes to `out[r * out_stride..][..width]`, the rest of `out` stays.
    ///
    /// Runs that lie close together are read as one span and copied from there; runs far apart
    /// take a system call each.
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
    ) -> Result<(), ReadError> {
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
        let close = stride.saturating_sub(to_u64(width)) <= CHEAP_GAP_BYTES;
        let stride_here =
            usize::try_from(stride).ok().filter(|&s| close && s + width <= SPAN_BYTES);
        let Some(stride_here) = stride_here else {
            for (r, run) in out.chunks_mut(out_stride).take(rows).enumerate() {
                self.pread(t, at + to_u64(r) * stride, &mut run[..width])?;
            }
            return Ok(());
        };
        SPAN.with_borrow_mut(|span| {
            let runs = (SPAN_BYTES - width) / stride_here.max(1) + 1;
            let mut at = at;
            let mut left = rows;
            for block in out.chunks_mut(runs * out_stride) {
                let here = runs.min(left);
                if here == 0 {
                    break;
                }
                let length = (here - 1) * stride_here + width;
                span.resize(length.max(span.len()), 0);
                self.pread(t, at, &mut span[..length])?;
                for (r, run) in block.chunks_mut(out_stride).take(here).enumerate() {
                    run[..width].copy_from_slice(&span[r * stride_here..][..width]);
                }
                at += to_u64(here) * stride;
                left -= here;
            }
            Ok(())
        })
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
    fn pread(&self, t: &SourceTensor, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let shard = self.shard(t.shard);
        let offset = t.offset + at;
        shard.file().read_exact_at(out, offset).map_err(|source| {
            let (shard_path, tensor) = (shard.path().to_owned(), t.name.clone());
            match (source.kind(), shard.file().metadata()) {
                (io::ErrorKind::UnexpectedEof, Ok(now)) => ReadError::Truncated {
                    shard: shard_path,
                    tensor,
                    offset,
                    wanted: to_u64(out.len()),
                    actual: now.len(),
                },
                _ => ReadError::Io { shard: shard_path, tensor, offset, source },
            }
        })
    }
}

thread_local! {
    /// At most [`SPAN_BYTES`], kept so that a strip of a matrix costs no allocation.
    static SPAN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn check_range(t: &SourceTensor, at: u64, length: Option<u64>) -> Result<(), ReadError> {
    let end = length.and_then(|n| at.checked_add(n));
    match end {
        Some(end) if end <= t.bytes => Ok(()),
        _ => Err(ReadError::OutOfRange { tensor: t.name.clone(), bytes: t.bytes, end }),
    }
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).expect("no address space is beyond 64 bits")
}
