//! Synthetic shards: which tensors are in which file, and at which offset.
//!
//! Pure arithmetic over names and sizes. Tensors fill shards in the order of the plan. Within a
//! shard they are sorted by the largest power of two that divides their size, in descending order.
//! Without any gap, each tensor then starts at a multiple of its own power of two, up to the
//! alignment of the data: elements are aligned, and tensors of whole mebibytes start where FUSE
//! requests start.

use safetensors::SafeTensorError;

use crate::tensor::to_u64;
use std::cmp::Reverse;
use std::ops::Range;

use crate::plan::TensorId;
use crate::source::MAX_HEADER_BYTES;

use super::header::{self, Alignment, HeaderEntry};

/// Splits tensors, in their order, into shards of at most `shard_size` bytes of data.
///
/// A larger tensor gets its own shard. A shard also ends where its header would become larger than
/// readers accept.
pub(super) fn split_into_shards<'a>(
    entries: impl IntoIterator<Item = HeaderEntry<'a>>,
    shard_size: u64,
) -> Vec<Range<usize>> {
    let mut shards: Vec<Range<usize>> = Vec::new();
    let (mut data, mut text) = (0u64, 0u64);
    for (i, entry) in entries.into_iter().enumerate() {
        let (more_data, more_text) =
            (data.saturating_add(entry.bytes), text.saturating_add(entry.bound()));
        match shards.last_mut() {
            Some(shard) if more_data <= shard_size && more_text <= MAX_HEADER_BYTES => {
                shard.end = i + 1;
                (data, text) = (more_data, more_text);
            }
            _ => {
                shards.push(i..i + 1);
                (data, text) = (entry.bytes, header::OVERHEAD.saturating_add(entry.bound()));
            }
        }
    }
    shards
}

/// One safetensors file of the view: a header, then the bytes of the tensors without gaps.
#[derive(Debug)]
pub(super) struct ViewShard {
    /// Length word and JSON, without the padding.
    header: Box<[u8]>,
    /// Offset of the first tensor, in bytes.
    data_start: u64,
    tensors: Box<[TensorId]>,
    /// Offset of the end of each tensor, in bytes.
    ends: Box<[u64]>,
}

impl ViewShard {
    /// A shard of these tensors.
    ///
    /// # Errors
    /// If they do not fit into one safetensors file.
    pub(super) fn new(
        mut tensors: Vec<(TensorId, HeaderEntry<'_>)>,
    ) -> Result<ViewShard, SafeTensorError> {
        let data = tensors.iter().fold(0u64, |sum, (_, e)| sum.saturating_add(e.bytes));
        let alignment = Alignment::of_shard(data);
        let most = alignment.bytes().trailing_zeros();
        tensors.sort_by_key(|(_, e)| Reverse(e.bytes.trailing_zeros().min(most)));
        ViewShard::with_alignment(&tensors, alignment)
    }

    /// A file of one tensor.
    ///
    /// It is built for each request, so its header is a page, whatever the size of the tensor.
    ///
    /// # Errors
    /// If it does not fit into a safetensors file.
    pub(super) fn of_one(
        tensor: TensorId,
        entry: HeaderEntry<'_>,
    ) -> Result<ViewShard, SafeTensorError> {
        ViewShard::with_alignment(&[(tensor, entry)], Alignment::Page)
    }

    fn with_alignment(
        tensors: &[(TensorId, HeaderEntry<'_>)],
        alignment: Alignment,
    ) -> Result<ViewShard, SafeTensorError> {
        let (header, data_start) = header::header(tensors.iter().map(|(_, e)| *e), alignment)?;
        let mut end = data_start;
        let mut ends = Vec::with_capacity(tensors.len());
        for (_, entry) in tensors {
            end = end.checked_add(entry.bytes).ok_or(SafeTensorError::ValidationOverflow)?;
            ends.push(end);
        }
        let tensors = tensors.iter().map(|(id, _)| *id).collect();
        let (header, ends) = (header.into_boxed_slice(), ends.into_boxed_slice());
        Ok(ViewShard { header, data_start, tensors, ends })
    }

    /// Size of the file, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(self.data_start)
    }

    /// Position of the tensor that contains byte `at` of the file, or of the first one after it.
    fn index_at(&self, at: u64) -> usize {
        self.ends.partition_point(|&end| end <= at)
    }

    /// Offset in the file where tensor `i` starts; for the position after the last, where that
    /// ends.
    fn start(&self, i: usize) -> u64 {
        if i == 0 { self.data_start } else { self.ends[i - 1] }
    }

    /// The tensor that contains all of the file's bytes `at..at + len`, their offset in the tensor,
    /// and their number: less than `len` only at the end of the file. `None` if no single tensor
    /// does.
    pub(super) fn within(&self, at: u64, len: usize) -> Option<(TensorId, u64, usize)> {
        let i = self.index_at(at);
        let (start, end) = (self.start(i), *self.ends.get(i)?);
        let n = clamp(end - at, len);
        (at >= start && (n == len || end == self.size())).then(|| (self.tensors[i], at - start, n))
    }

    /// Reads bytes of the file from offset `at` into `out` and returns how many.
    ///
    /// `fetch(tensor, at, out)` fills `out` with the bytes of a tensor from offset `at`.
    ///
    /// # Errors
    /// The first error of `fetch`.
    pub(super) fn read<E>(
        &self,
        at: u64,
        out: &mut [u8],
        mut fetch: impl FnMut(TensorId, u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut done = copy_from(&self.header, at, out);
        let padding = clamp(
            self.data_start.saturating_sub(at.saturating_add(to_u64(done))),
            out.len() - done,
        );
        out[done..done + padding].fill(header::PADDING);
        done += padding;
        let mut at = at.saturating_add(to_u64(done));
        let mut i = self.index_at(at);
        while done < out.len() && i < self.ends.len() {
            let start = self.start(i);
            let n = clamp(self.ends[i] - at, out.len() - done);
            if n > 0 {
                fetch(self.tensors[i], at - start, &mut out[done..done + n])?;
            }
            done += n;
            at += to_u64(n);
            i += 1;
        }
        Ok(done)
    }
}

/// Copies bytes of `from` from offset `at` on into `out` and returns how many.
pub(super) fn copy_from(from: &[u8], at: u64, out: &mut [u8]) -> usize {
    let Some(rest) = usize::try_from(at).ok().and_then(|at| from.get(at..)) else { return 0 };
    let n = rest.len().min(out.len());
    out[..n].copy_from_slice(&rest[..n]);
    n
}

fn clamp(bytes: u64, most: usize) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX).min(most)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tensor::{DType, Shape};

    const DTYPES: [DType; 5] = [DType::U8, DType::F32, DType::BF16, DType::I64, DType::F4];

    struct Tensor {
        name: String,
        dtype: DType,
        shape: Shape,
    }

    impl Tensor {
        fn entry(&self) -> HeaderEntry<'_> {
            let bytes = self.shape.bytes(self.dtype).expect("small");
            HeaderEntry { name: &self.name, dtype: self.dtype, shape: &self.shape, bytes }
        }
    }

    fn tensors(of: &[(DType, u64)]) -> Vec<Tensor> {
        of.iter()
            .enumerate()
            .map(|(i, &(dtype, n))| Tensor { name: format!("t.{i}"), dtype, shape: [n].into() })
            .collect()
    }

    fn shard(tensors: &[Tensor]) -> ViewShard {
        let ids = (0..).map(TensorId);
        ViewShard::new(ids.zip(tensors.iter().map(Tensor::entry)).collect()).expect("small")
    }

    /// Byte `at` of tensor `id`.
    fn byte(id: TensorId, at: u64) -> u8 {
        (at.wrapping_mul(31) + u64::from(id.0) * 7 + 1).to_le_bytes()[0]
    }

    fn fetch(id: TensorId, at: u64, out: &mut [u8]) -> Result<(), TensorId> {
        assert!(!out.is_empty(), "an empty read reached the engine");
        out.iter_mut().zip(at..).for_each(|(b, at)| *b = byte(id, at));
        Ok(())
    }

    #[test]
    fn shards_fill_in_order_up_to_their_size() {
        // Tensor sizes, maximum shard size, number of tensors in each shard.
        for (sizes, shard_size, expected) in [
            (vec![], 10, vec![]),
            (vec![4, 4, 2], 10, vec![3]),
            (vec![4, 4, 3], 10, vec![2, 1]),
            (vec![11, 1, 12, 13, 1, 1], 10, vec![1, 1, 1, 1, 2]),
            (vec![0, 10, 0, 0, 1], 10, vec![4, 1]),
            (vec![u64::MAX >> 4, u64::MAX >> 4], u64::MAX, vec![2]),
        ] {
            let tensors = tensors(&sizes.iter().map(|&n| (DType::U8, n)).collect::<Vec<_>>());
            let shards = split_into_shards(tensors.iter().map(Tensor::entry), shard_size);
            let lengths: Vec<usize> = shards.iter().map(ExactSizeIterator::len).collect();
            assert_eq!(lengths, expected, "{sizes:?} into {shard_size}");
            assert!(shards.into_iter().flatten().eq(0..sizes.len()), "{sizes:?}");
        }
    }

    #[test]
    fn a_shard_ends_before_its_header_is_too_large() {
        // A name with a character to escape is counted as six bytes for each: three fill 90 MB.
        let name = format!("\"{}", "n".repeat(4_999_999));
        let tensors: Vec<Tensor> = (0..5)
            .map(|_| Tensor { name: name.clone(), dtype: DType::U8, shape: [1].into() })
            .collect();
        assert_eq!(split_into_shards(tensors.iter().map(Tensor::entry), 100), [0..3, 3..5]);
    }

    #[test]
    fn tensors_are_aligned_to_their_size_without_gaps() {
        let tensors = tensors(&[
            (DType::U8, 3),
            (DType::BF16, 5),
            (DType::F4, 6),
            (DType::F32, 1),
            (DType::U8, 1),
            (DType::I64, 2),
            (DType::BF16, 0),
        ]);
        let shard = shard(&tensors);
        // Sizes 0, 16, 4, 10, 3, 3 and 1: by the largest power of two that divides them; ties keep
        // their order.
        assert_eq!(*shard.tensors, [6, 5, 3, 1, 0, 2, 4].map(TensorId));
        let mut at = 4096u64;
        for (id, &end) in shard.tensors.iter().zip(&shard.ends) {
            let tensor = tensors[id.0 as usize].entry();
            assert!(
                at.trailing_zeros() >= tensor.bytes.trailing_zeros().min(12),
                "{}",
                tensor.name
            );
            assert_eq!(at % u64::from(tensor.dtype.bits().div_ceil(8)), 0, "{}", tensor.name);
            assert_eq!(end, at + tensor.bytes, "{}", tensor.name);
            at = end;
        }
        assert_eq!(shard.size(), 4096 + 3 + 10 + 3 + 4 + 1 + 16);
    }

    #[test]
    fn a_size_that_overflows_is_refused() {
        let of = |bytes: u64, n: usize| {
            let tensors = tensors(&vec![(DType::U8, bytes); n]);
            let entries = (0..).map(TensorId).zip(tensors.iter().map(Tensor::entry)).collect();
            ViewShard::new(entries).map(|shard| shard.size())
        };
        const LARGE: u64 = 1 << 60;
        assert_eq!(of(LARGE, 15).expect("below 2^64 bytes"), 15 * LARGE + (2 << 20));
        assert!(of(LARGE, 16).is_err(), "2^64 bytes");
    }

    #[test]
    fn reads_past_the_end_are_short() {
        let shard = shard(&tensors(&[(DType::U8, 10)]));
        let mut out = [0; 8];
        for (at, n) in [(4096, 8), (4098, 8), (4099, 7), (4105, 1), (4106, 0), (u64::MAX, 0)] {
            assert_eq!(shard.read(at, &mut out, fetch), Ok(n), "at {at}");
        }
        assert_eq!(shard.read(4095, &mut [], fetch), Ok(0));
    }

    #[test]
    fn within_finds_ranges_of_a_single_tensor() {
        let shard = shard(&tensors(&[(DType::U8, 16), (DType::U8, 10)]));
        let (a, b) = (TensorId(0), TensorId(1));
        for (at, len, expected) in [
            (4095, 4, None),
            (4096, 16, Some((a, 0, 16))),
            (4100, 12, Some((a, 4, 12))),
            (4100, 13, None),
            (4112, 10, Some((b, 0, 10))),
            (4115, 100, Some((b, 3, 7))),
            (4122, 1, None),
            (u64::MAX, 1, None),
        ] {
            assert_eq!(shard.within(at, len), expected, "{len} at {at}");
        }
    }

    #[test]
    fn an_error_names_the_tensor_that_failed() {
        let shard = shard(&tensors(&[(DType::U8, 10), (DType::U8, 10)]));
        let broken = |id: TensorId, at, out: &mut [u8]| {
            if id == TensorId(1) { Err(id) } else { fetch(id, at, out) }
        };
        let mut out = [0; 8];
        assert_eq!(shard.read(4096, &mut out, broken), Ok(8));
        assert_eq!(shard.read(4100, &mut out, broken), Err(TensorId(1)));
    }

    proptest! {
        #[test]
        fn any_split_of_a_read_is_the_whole_file(
            of in proptest::collection::vec((0..DTYPES.len(), 0u64..6), 0..12),
            cuts in proptest::collection::vec(0u64..4300, 0..12),
        ) {
            // Even extents, so that F4 fills whole bytes.
            let of: Vec<_> = of.into_iter().map(|(d, n)| (DTYPES[d], 2 * n)).collect();
            let tensors = tensors(&of);
            let shard = shard(&tensors);
            let mut expected = shard.header.to_vec();
            expected.resize(shard.data_start as usize, header::PADDING);
            for id in &shard.tensors {
                let n = tensors[id.0 as usize].entry().bytes;
                expected.extend((0..n).map(|at| byte(*id, at)));
            }
            prop_assert_eq!(to_u64(expected.len()), shard.size());
            let mut cuts: Vec<u64> = cuts.into_iter().map(|c| c.min(shard.size())).collect();
            cuts.extend([0, shard.size()]);
            cuts.sort_unstable();
            let mut got = Vec::new();
            for pair in cuts.windows(2) {
                let mut out = vec![0; (pair[1] - pair[0]) as usize];
                let n = shard.read(pair[0], &mut out, fetch).expect("nothing is broken");
                prop_assert_eq!(n, out.len());
                got.extend(out);
            }
            prop_assert_eq!(got, expected);
        }
    }
}
