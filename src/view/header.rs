//! Headers of safetensors files (crate `safetensors`, "Format").
//!
//! ```text
//! byte 0        8                                              8 + N, a multiple of an Alignment
//!      | N, LE  | {"__metadata__":{"format":"pt"},"a":{…}}···· | data of a | data of b | …
//!                                             padded with spaces
//! ```
//! `data_offsets` count from the first byte of the data. The JSON is compact and its keys are in
//! the order of the data. The same tensors give the same header in every mount.

use std::collections::HashMap;

use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::plan::TensorPlan;
use crate::tensor::{DType, Shape, to_u64};

/// Bytes of the length word in front of the JSON.
const LENGTH_BYTES: usize = 8;

/// The alignment of the first byte of data in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alignment {
    /// 4096 bytes: no page contains both header and data, and mapped tensors are aligned.
    Page,
    /// 2 MiB: 1 MiB FUSE requests then start on row boundaries of large tensors, and rows are
    /// decoded without an intermediate chunk. A reader of the header alone makes the kernel read 4
    /// MiB ahead; with the padding, less of that is data that has to be decoded.
    Request,
}

impl Alignment {
    /// The alignment in bytes.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Alignment::Page => 4096,
            Alignment::Request => 2 << 20,
        }
    }

    /// The alignment for a shard with `data` bytes of data: padding is at most 1.6 % of it.
    pub(super) fn of_shard(data: u64) -> Alignment {
        if data < 128 << 20 { Alignment::Page } else { Alignment::Request }
    }
}

/// Upper bound of the bytes that [`header`] adds to the entries: braces, `__metadata__`, padding.
pub(super) const OVERHEAD: u64 = 64 + (2 << 20);

/// What a header says about one tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeaderEntry<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: DType,
    pub(super) shape: &'a Shape,
    /// Bytes of the tensor's data.
    pub(super) bytes: u64,
}

impl<'a> From<&'a TensorPlan> for HeaderEntry<'a> {
    fn from(plan: &'a TensorPlan) -> HeaderEntry<'a> {
        HeaderEntry { name: &plan.name, dtype: plan.dtype, shape: &plan.shape, bytes: plan.bytes() }
    }
}

impl HeaderEntry<'_> {
    /// Upper bound of the bytes that the entry takes in a header, for any offsets.
    pub(super) fn bound(&self) -> u64 {
        // `,"":{"dtype":"F8_E4M3","shape":[],"data_offsets":[,]}` and two offsets of 20 digits; an
        // extent is 20 digits and a comma.
        const FIXED: u64 = 96;
        const EXTENT: u64 = 21;
        let extents = to_u64(self.shape.rank()).saturating_mul(EXTENT);
        json_bound(self.name).saturating_add(extents).saturating_add(FIXED)
    }
}

/// Upper bound of the bytes of `text` between the quotes of a JSON string.
fn json_bound(text: &str) -> u64 {
    let bytes = to_u64(text.len());
    let plain = text.bytes().all(|b| b >= b' ' && b != b'"' && b != b'\\');
    if plain { bytes } else { bytes.saturating_mul(6) }
}

/// The byte that pads a header.
pub(super) const PADDING: u8 = b' ';

/// The length word and JSON for a file of these tensors in this order, and the offset of its data.
/// The bytes between, up to 2 MiB, are [`PADDING`] and are not stored.
///
/// # Errors
/// If the crate `safetensors`, and so most readers, would refuse the header.
pub(super) fn header<'a>(
    entries: impl IntoIterator<Item = HeaderEntry<'a>>,
    alignment: Alignment,
) -> Result<(Vec<u8>, u64), SafeTensorError> {
    let size = |n: u64| usize::try_from(n).map_err(|_| SafeTensorError::ValidationOverflow);
    let mut start = 0;
    let mut tensors = Vec::new();
    for entry in entries {
        let end = size(entry.bytes)?.checked_add(start);
        let end = end.ok_or(SafeTensorError::ValidationOverflow)?;
        let shape =
            entry.shape.dims().iter().map(|&extent| size(extent)).collect::<Result<_, _>>()?;
        let info = TensorInfo { dtype: entry.dtype.into(), shape, data_offsets: (start, end) };
        tensors.push((entry.name.to_owned(), info));
        start = end;
    }
    // transformers refuses files without it.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), tensors)?;
    let mut out = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut out, &metadata).expect("writing to memory does not fail");
    let data_start = to_u64(out.len()).next_multiple_of(alignment.bytes());
    let length = data_start - to_u64(LENGTH_BYTES);
    out[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok((out, data_start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry<'a>(name: &'a str, dtype: DType, shape: &'a Shape) -> HeaderEntry<'a> {
        HeaderEntry { name, dtype, shape, bytes: shape.bytes(dtype).expect("small") }
    }

    /// A header with its padding.
    fn padded(entries: &[HeaderEntry<'_>], alignment: Alignment) -> Vec<u8> {
        let (mut text, start) = header(entries.iter().copied(), alignment).expect("valid");
        text.resize(usize::try_from(start).expect("small"), PADDING);
        text
    }

    #[test]
    fn the_safetensors_crate_reads_the_header() {
        let (matrix, vector, empty, scalar) =
            (Shape::from([2, 3]), Shape::from([5]), Shape::from([0, 4]), Shape::from([]));
        let entries = [
            entry("scalar", DType::I64, &scalar),
            entry("a.\"quoted\"\\\u{1}.weight", DType::F32, &matrix),
            entry("naïve", DType::BF16, &empty),
            entry("u8", DType::U8, &vector),
        ];
        let mut file = padded(&entries, Alignment::Page);
        assert_eq!(file.len(), 4096);
        assert!(file[8..].starts_with(br#"{"__metadata__":{"format":"pt"},"scalar":{"#));
        file.resize(4096 + 8 + 24 + 5, 0);
        let parsed = safetensors::SafeTensors::deserialize(&file).expect("valid");
        for e in entries {
            let view = parsed.tensor(e.name).expect("listed");
            assert_eq!(view.dtype().to_string(), e.dtype.name(), "{}", e.name);
            let dims: Vec<u64> = view.shape().iter().map(|&d| d as u64).collect();
            assert_eq!(dims, e.shape.dims(), "{}", e.name);
            assert_eq!(view.data().len() as u64, e.bytes, "{}", e.name);
        }
        let (_, meta) = safetensors::SafeTensors::read_metadata(&file).expect("valid");
        let metadata = meta.metadata().as_ref().expect("present");
        assert_eq!(metadata.get("format").map(String::as_str), Some("pt"));
    }

    #[test]
    fn a_file_of_no_tensors_is_valid() {
        let file = padded(&[], Alignment::Page);
        assert_eq!(file.len(), 4096);
        assert!(safetensors::SafeTensors::deserialize(&file).expect("valid").is_empty());
    }

    #[test]
    fn the_bound_is_never_below_the_text() {
        // A multiple of 4 elements, since four elements of 6 bits are 3 bytes.
        let big = Shape::from([u64::from(u32::MAX) - 3, 1, 1, 1]);
        for (name, dtype) in
            [("w", DType::F8E4M3), ("\u{1}\u{2}", DType::U8), ("é\"", DType::F6E2M3)]
        {
            let one = entry(name, dtype, &big);
            let text = padded(&[one], Alignment::Page);
            let json = text[8..].trim_ascii_end().len() as u64;
            let alone = json - r#"{"__metadata__":{"format":"pt"}}"#.len() as u64;
            assert!(alone <= one.bound(), "{name}: {alone} > {}", one.bound());
        }
    }

    #[test]
    fn padding_ends_at_the_alignment_for_any_length() {
        let shape = Shape::from([1]);
        for (n, alignment) in (3950..4110)
            .map(|n| (n, Alignment::Page))
            .chain([10, (1 << 20) - 80, 1 << 20].map(|n| (n, Alignment::Request)))
        {
            let name = "x".repeat(n);
            let text = padded(&[entry(&name, DType::U8, &shape)], alignment);
            assert_eq!(to_u64(text.len()) % alignment.bytes(), 0);
            let json = u64::from_le_bytes(text[..8].try_into().expect("eight bytes"));
            assert_eq!(json + 8, text.len() as u64);
            assert!(text[8..].trim_ascii_end().ends_with(b"}}"));
        }
    }
}
