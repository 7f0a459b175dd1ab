//! State shared by foreground reads and prefetch threads: the caches, the reader history, counters.
//!
//! It copies verbatim runs, and decodes part of a plane (of an expert) either into a cached chunk
//! or directly into the caller's buffer.

use crate::tensor::{to_u64, to_usize};
use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ReadError;
use super::box_copy::transposes;
use super::buffer::Buffer;
use super::cache::{Cache, CacheRequest, Outcome, SharedBuffer};
use super::counters::{Counters, add};
use super::decode::{ChunkDecoder, DecodeError};
use super::encode::ChunkEncoder;
use super::engine::EngineOptions;
use super::history::ReaderHistory;
use super::source_rows::{MAX_SOURCE_ROW_BYTES, SourceRows, SourceWidth};
use crate::plan::{
    Body, ChunkBox, Computed, Encoded, Grid, MatrixId, Origin, Plan, SourceRange, TensorId,
    TensorPlan,
};
use crate::source::{Checkpoint, SourceId, SourceReadError};

/// Work for the prefetch threads.
pub(super) enum PrefetchJob {
    /// Decode a chunk of a tensor into the chunk cache.
    Chunk(TensorId, u64, SourceWidth),
    /// Read the source rows of a plane of a tensor into the source-row cache.
    SourceRows(TensorId, u64),
}

/// State shared by foreground reads and prefetch threads.
pub(super) struct Shared {
    pub checkpoint: Arc<Checkpoint>,
    pub plan: Arc<Plan>,
    /// Decoded chunks, by tensor and position in its grid.
    pub chunks: Cache<(TensorId, u64), ReadError>,
    pub direct_io: bool,
    pub source_rows: SourceRows,
    pub history: ReaderHistory,
    pub counters: Counters,
    /// For each matrix, whether [`Shared::first_touch`] has been done.
    touched: Box<[AtomicBool]>,
}

thread_local! {
    /// Whole rows, decoded for a read that needs only a part of them.
    static PARTIAL_ROWS: RefCell<Buffer> = RefCell::default();
}

/// The body of a tensor that is decoded or encoded in chunks.
#[derive(Clone, Copy)]
pub(super) enum ChunkedBody<'a> {
    Computed(&'a Computed),
    Encoded(&'a Encoded),
}

impl<'a> ChunkedBody<'a> {
    fn of(body: &'a Body) -> Option<ChunkedBody<'a>> {
        match body {
            Body::Computed(computed) => Some(ChunkedBody::Computed(computed)),
            Body::Encoded(encoded) => Some(ChunkedBody::Encoded(encoded)),
            Body::Verbatim(_) | Body::Literal(_) => None,
        }
    }

    /// How the tensor is cut into planes and chunks.
    pub(super) fn grid(self) -> &'a Grid {
        match self {
            ChunkedBody::Computed(computed) => &computed.grid,
            ChunkedBody::Encoded(encoded) => &encoded.grid,
        }
    }
}

/// Where in a plane a read starts, and how it reads the source.
#[derive(Clone, Copy)]
pub(super) struct PlaneRead {
    pub plane: u64,
    /// First byte, relative to the plane.
    pub at: u64,
    /// How much of each source row to read and cache.
    pub source_width: SourceWidth,
}

impl Shared {
    /// Empty caches. The source rows get a quarter of the budget, up to
    /// [`MAX_SOURCE_ROW_BYTES`]; the chunks get the rest.
    pub(super) fn new(
        checkpoint: Arc<Checkpoint>,
        plan: Arc<Plan>,
        options: EngineOptions,
    ) -> Shared {
        let touched = plan.matrices.iter().map(|_| AtomicBool::new(false)).collect();
        let source_row_bytes = (options.cache_bytes / 4).min(MAX_SOURCE_ROW_BYTES);
        Shared {
            checkpoint,
            plan,
            chunks: Cache::new(options.cache_bytes - source_row_bytes, Buffer::new),
            direct_io: options.direct_io,
            source_rows: SourceRows::new(source_row_bytes),
            history: ReaderHistory::default(),
            counters: Counters::default(),
            touched,
        }
    }

    /// Runs a prefetch job. Errors are ignored: the reader meets them again and reports them.
    pub(super) fn run(&self, job: &PrefetchJob) {
        match *job {
            PrefetchJob::Chunk(id, chunk, source_width) => {
                let tensor = self.plan.tensor(id);
                // A reader that was faster has already decoded the chunk itself.
                if let Some(body) = ChunkedBody::of(&tensor.body)
                    && !self.history.has_passed(id, body.grid().extent(chunk).0)
                    && !self.chunks.contains(&(id, chunk))
                {
                    let _ = self.chunk(id, tensor, body, chunk, source_width);
                }
            }
            PrefetchJob::SourceRows(id, plane) => {
                let tensor = self.plan.tensor(id);
                if let Body::Computed(computed) = &tensor.body {
                    let _ = self.prefetch_source_rows(tensor, computed, plane);
                }
            }
        }
    }

    /// Copies bytes from `at` on of a tensor that consists of `runs` of source bytes.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn read_verbatim(
        &self,
        tensor: &TensorPlan,
        runs: &[SourceRange],
        at: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut at = at;
        let mut left = out;
        for run in runs_from(runs, at) {
            if left.is_empty() {
                break;
            }
            let skip = at - run.at;
            let here = usize::try_from(run.bytes - skip).map_or(left.len(), |n| n.min(left.len()));
            let (now, later) = left.split_at_mut(here);
            self.checkpoint_of(run.origin)
                .read(run.source, run.offset + skip, now)
                .map_err(|e| read_error(tensor, e))?;
            let n = to_u64(here);
            self.counters.add_verbatim(n);
            at += n;
            left = later;
        }
        Ok(())
    }

    /// The source file and the offset in it where bytes `at..at + bytes` of a tensor that consists
    /// of `runs` are stored; `None` if they are not in one run.
    pub(super) fn verbatim_location(
        &self,
        runs: &[SourceRange],
        at: u64,
        bytes: u64,
    ) -> Option<(&File, u64)> {
        let run = runs_from(runs, at).first()?;
        let skip = at - run.at;
        let checkpoint = self.checkpoint_of(run.origin);
        (bytes <= run.bytes - skip)
            .then(|| checkpoint.file_range(run.source, run.offset + skip, bytes))
            .flatten()
    }

    fn checkpoint_of(&self, origin: Origin) -> &Checkpoint {
        match (origin, &self.plan.original) {
            (Origin::Original, Some(original)) => original,
            (Origin::Source | Origin::Original, _) => &self.checkpoint,
        }
    }

    /// Decodes bytes of a plane into `out`, without the chunk cache; returns how many: `out.len()`.
    ///
    /// Where `out` begins or ends within a row, the rows are decoded into a buffer of the thread
    /// and copied from there.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn decode_in_place(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        read: PlaneRead,
        out: &mut [u8],
    ) -> Result<usize, ReadError> {
        let Grid { row_bytes, rows, .. } = computed.grid;
        let end = read.at + to_u64(out.len());
        // A byte holds two 4-bit codes: in a transposed tensor rows are columns of codes, so that
        // the first row has to be even.
        let first = (read.at / row_bytes) & !1;
        let rows = end.div_ceil(row_bytes).min(rows) - first;
        let chunk = ChunkBox { plane: read.plane, row: first, rows };
        add(&self.counters.decoded_bytes, rows * row_bytes);
        let decoder = self.decoder(read.source_width);
        if read.at == first * row_bytes && end == (first + rows) * row_bytes {
            self.decode(tensor, computed, chunk, decoder, out)?;
            return Ok(out.len());
        }
        let skip = read.at % row_bytes;
        let one_row = skip + to_u64(out.len()) <= row_bytes;
        let decoder =
            ChunkDecoder { bytes: one_row.then(|| (skip, skip + to_u64(out.len()))), ..decoder };
        PARTIAL_ROWS.with_borrow_mut(|buffer| {
            let bytes = to_usize(rows * row_bytes);
            buffer.grow(bytes);
            let buffer = &mut buffer[..bytes];
            self.decode(tensor, computed, chunk, decoder, buffer)?;
            out.copy_from_slice(&buffer[to_usize(read.at - first * row_bytes)..][..out.len()]);
            Ok(out.len())
        })
    }

    /// Copies from the chunk that contains the first byte of a read; returns how many bytes it
    /// copied.
    ///
    /// The chunk is decoded if it is not cached. What was copied counts as consumed, except for
    /// small reads with direct I/O, which may come again: the kernel keeps no pages of them.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn copy_from_chunk(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        body: ChunkedBody<'_>,
        read: PlaneRead,
        out: &mut [u8],
        large: bool,
    ) -> Result<usize, ReadError> {
        let grid = body.grid();
        let at = read.plane * grid.rows * grid.row_bytes + read.at;
        let chunk = grid.chunk_at(at);
        let (bytes, outcome) = self.chunk(id, tensor, body, chunk, read.source_width)?;
        match outcome {
            Outcome::Hit => add(&self.counters.chunk_hits, 1),
            Outcome::Waited => add(&self.counters.chunk_waits, 1),
            Outcome::Miss => add(&self.counters.chunk_misses, 1),
        }
        let skip = to_usize(at - grid.extent(chunk).0);
        let n = (bytes.len() - skip).min(out.len());
        out[..n].copy_from_slice(&bytes[skip..skip + n]);
        drop(bytes);
        if large || !self.direct_io {
            self.chunks.consume(&(id, chunk), to_u64(n));
        }
        Ok(n)
    }

    /// Returns a chunk from the cache; decodes or encodes it if it is absent.
    fn chunk(
        &self,
        id: TensorId,
        tensor: &TensorPlan,
        body: ChunkedBody<'_>,
        chunk: u64,
        source_width: SourceWidth,
    ) -> Result<(SharedBuffer, Outcome), ReadError> {
        let grid = body.grid();
        let bytes = grid.extent(chunk).1;
        let request = CacheRequest { key: (id, chunk), len: to_usize(bytes), remaining: bytes };
        let chunk = grid.chunk_box(chunk);
        self.chunks.get(request, ReadError::Abandoned, |buffer| {
            add(&self.counters.decoded_bytes, bytes);
            match body {
                ChunkedBody::Computed(computed) => {
                    self.decode(tensor, computed, chunk, self.decoder(source_width), buffer)
                }
                ChunkedBody::Encoded(encoded) => {
                    self.encode(tensor, encoded, chunk, source_width, buffer)
                }
            }
        })
    }

    fn decode(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        chunk: ChunkBox,
        decoder: ChunkDecoder<'_>,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        self.touch_plane(tensor, computed, chunk.plane)?;
        decoder
            .fill(computed, |id| self.plan.matrix(id), &tensor.shape, tensor.dtype, chunk, out)
            .map_err(|e| read_error(tensor, e))
    }

    fn encode(
        &self,
        tensor: &TensorPlan,
        encoded: &Encoded,
        chunk: ChunkBox,
        source_width: SourceWidth,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        let quantized = self.plan.quantized(encoded.quantized);
        for member in &quantized.members {
            for fragment in &member.values.fragments {
                self.touch(tensor, fragment.matrix, transposes(&fragment.map))?;
            }
        }
        let encoder = ChunkEncoder {
            decoder: self.decoder(source_width),
            original: self.plan.original.as_deref(),
            matrix_of: |id| self.plan.matrix(id),
            quantized,
        };
        encoder.fill(encoded, chunk, out).map_err(|e| read_error(tensor, e))
    }

    fn decoder(&self, source_width: SourceWidth) -> ChunkDecoder<'_> {
        ChunkDecoder {
            checkpoint: &self.checkpoint,
            counters: &self.counters,
            source_rows: &self.source_rows,
            source_width,
            bytes: None,
        }
    }

    /// Reads the source rows of a transposed plane into the cache.
    fn prefetch_source_rows(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        plane: u64,
    ) -> Result<(), ReadError> {
        self.touch_plane(tensor, computed, plane)?;
        let (decoder, matrix_of) =
            (self.decoder(SourceWidth::WholeRows), |id| self.plan.matrix(id));
        decoder
            .prefetch_plane(computed, matrix_of, &tensor.shape, plane)
            .map_err(|e| read_error(tensor, e))
    }

    /// Drops the source rows of a transposed plane from the cache.
    pub(super) fn release_source_rows(&self, tensor: &TensorPlan, computed: &Computed, plane: u64) {
        let matrix_of = |id| self.plan.matrix(id);
        self.decoder(SourceWidth::Strip).release_plane(computed, matrix_of, &tensor.shape, plane);
    }

    /// [`Shared::touch`] for every matrix of a plane.
    fn touch_plane(
        &self,
        tensor: &TensorPlan,
        computed: &Computed,
        plane: u64,
    ) -> Result<(), ReadError> {
        let fragments = computed.fragments_of(plane);
        fragments.iter().try_for_each(|f| self.touch(tensor, f.matrix, transposes(&f.map)))
    }

    /// Does [`Shared::first_touch`] for a matrix unless it was done before. Threads that come at
    /// the same time may each do it, which is harmless; after an error the next read does it again.
    fn touch(&self, tensor: &TensorPlan, id: MatrixId, transposed: bool) -> Result<(), ReadError> {
        let touched = &self.touched[id.index()];
        if !touched.load(Ordering::Acquire) {
            self.first_touch(tensor, id, transposed)?;
            touched.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Before a matrix is decoded for the first time: checks its shape tensor, if it has one,
    /// against its payload, and asks the kernel to read the payload if it will be read in narrow
    /// strips.
    fn first_touch(
        &self,
        tensor: &TensorPlan,
        id: MatrixId,
        transposed: bool,
    ) -> Result<(), ReadError> {
        let matrix = self.plan.matrix(id);
        if let Some(shape_tensor) = matrix.shape_tensor {
            let got = self.stated_shape(shape_tensor).map_err(|e| read_error(tensor, e))?;
            let dims = matrix.shape.dims();
            let same = dims.len() == 2 && (0..2).all(|i| u64::try_from(got[i]) == Ok(dims[i]));
            if !same {
                return Err(ReadError::StatedShape {
                    tensor: tensor.name.clone(),
                    matrix: matrix.name.clone(),
                    expected: matrix.shape.to_string(),
                    got,
                });
            }
        }
        // A larger payload holds the experts of a whole layer, more than one strip needs.
        let bytes = self.checkpoint.tensor(matrix.payload).bytes;
        if transposed && bytes <= MAX_SOURCE_ROW_BYTES {
            self.checkpoint.will_need(matrix.payload, 0, bytes);
        }
        Ok(())
    }

    /// The two integers of a shape tensor. The planner has checked that they are I32 or I64.
    fn stated_shape(&self, id: SourceId) -> Result<[i64; 2], SourceReadError> {
        let mut bytes = [0; 16];
        let size = usize::try_from(self.checkpoint.tensor(id).bytes).map_or(16, |n| n.min(16));
        self.checkpoint.read(id, 0, &mut bytes[..size])?;
        let width = size / 2;
        Ok([0, 1].map(|i| {
            let number = &bytes[i * width..(i + 1) * width];
            let negative = number.last().is_some_and(|b| b & 0x80 != 0);
            let mut wide = [if negative { 0xFF } else { 0 }; 8];
            wide[..width].copy_from_slice(number);
            i64::from_le_bytes(wide)
        }))
    }
}

/// The runs from the one that contains byte `at` of their tensor.
fn runs_from(runs: &[SourceRange], at: u64) -> &[SourceRange] {
    &runs[runs.partition_point(|r| r.at + r.bytes <= at)..]
}

fn read_error(tensor: &TensorPlan, error: impl Into<DecodeError>) -> ReadError {
    match error.into() {
        DecodeError::Source(source) => ReadError::Source { tensor: tensor.name.clone(), source },
        DecodeError::Abandoned => ReadError::Abandoned,
    }
}
