//! The header of a safetensors file, checked in one pass.
//!
//! Not the crate `safetensors`' parser, although every header that is accepted here is accepted
//! there (a test compares the two). `SafeTensors::read_metadata` wants the whole file as one slice,
//! which would need a map of every shard; it lets a repeated name through (the last one wins);
//! and `#[serde(flatten)]` makes it build a generic tree and two hash maps for each header, where
//! 207,000 names are to be read in a fraction of a second. Rules and limits are the crate's.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::checkpoint::{ShardId, SourceTensor};
use super::text::Text;
use crate::tensor::{DType, Shape};

/// Largest header in bytes (crate `safetensors`, `MAX_HEADER_SIZE`).
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most axes of a tensor: what PyTorch and NumPy take.
pub(super) const MAX_AXES: usize = 64;

/// Bytes of the length that stands before a header.
pub(crate) const LENGTH_BYTES: u64 = 8;

/// Why a header is refused.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The length is beyond what any reader accepts.
    #[error("header too large: expected at most {MAX_HEADER_BYTES} bytes, got {bytes}")]
    TooLarge {
        /// Length that the file gives, in bytes.
        bytes: u64,
    },
    /// The header is not a JSON object from its first byte on.
    #[error("header does not start with `{{`")]
    NotAnObject,
    /// The header is not UTF-8.
    #[error("header is not UTF-8: {0}")]
    NotUtf8(#[from] std::str::Utf8Error),
    /// The header is not the JSON that it should be.
    #[error("header is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A name occurs twice.
    #[error("tensor `{tensor}` occurs twice in the header")]
    Duplicate {
        /// Name of the tensor.
        tensor: Box<str>,
    },
    /// More axes than any reader takes.
    #[error("tensor `{tensor}`: expected at most {MAX_AXES} axes, got {axes}")]
    Axes {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Number of its axes.
        axes: usize,
    },
    /// A place within the whole tensor that the piece cannot have.
    #[error("tensor `{tensor}`: a piece of {shape} cannot lie at {offsets:?}")]
    Piece {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Extents of the piece.
        shape: Shape,
        /// Its first element within the whole tensor.
        offsets: Vec<u64>,
    },
    /// Shape times dtype is not a number of bytes, or one of 2^61 or more.
    #[error("tensor `{tensor}`: {dtype} {shape} is not a whole number of bytes below 2^61")]
    Shape {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Its element type.
        dtype: DType,
        /// Its extents.
        shape: Shape,
    },
    /// Shape times dtype and the offsets disagree.
    #[error("tensor `{tensor}`: {dtype} {shape} is {expected} bytes, got offsets {actual} apart")]
    Size {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Its element type.
        dtype: DType,
        /// Its extents.
        shape: Shape,
        /// Bytes by shape and dtype.
        expected: u64,
        /// Bytes by the offsets.
        actual: u64,
    },
    /// Bytes before a tensor belong to none.
    #[error("tensor `{tensor}` leaves a hole: expected offset {expected}, got {actual}")]
    Hole {
        /// Name of the tensor behind the hole.
        tensor: Box<str>,
        /// End of the tensor before, in bytes of the data section.
        expected: u64,
        /// Start of the tensor.
        actual: u64,
    },
    /// Bytes belong to two tensors.
    #[error("tensor `{tensor}` overlaps another: expected offset {expected}, got {actual}")]
    Overlap {
        /// Name of the second tensor.
        tensor: Box<str>,
        /// End of the tensor before, in bytes of the data section.
        expected: u64,
        /// Start of the tensor.
        actual: u64,
    },
}

/// Tensors of a header sorted by name, and the bytes of the data section that they cover.
///
/// Offsets are absolute: `data_start` is added to those of the header. The caller has checked that
/// the data section, as long as it says, fits a `u64` behind `data_start`; where it does not, the
/// offsets saturate and the sizes that are compared next disagree.
pub(super) fn parse(
    header: &[u8],
    data_start: u64,
    shard: ShardId,
) -> Result<(Vec<SourceTensor>, u64), HeaderError> {
    if header.first() != Some(&b'{') {
        return Err(HeaderError::NotAnObject);
    }
    let text = std::str::from_utf8(header)?;
    let mut json = serde_json::Deserializer::from_str(text);
    let (mut tensors, sharding) = json.deserialize_map(Header { shard })?;
    json.end()?;
    if let Some(sharding) = sharding {
        place_pieces(&mut tensors, &sharding)?;
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(HeaderError::Duplicate { tensor: pair[0].name.clone() });
    }
    let data_bytes = check_cover(&tensors)?;
    for tensor in &mut tensors {
        check_size(tensor)?;
        tensor.offset = tensor.offset.saturating_add(data_start);
    }
    Ok((tensors, data_bytes))
}

/// The key of `__metadata__` under which torch.distributed.checkpoint's HuggingFaceStorageWriter says
/// which part of a tensor the file holds (`torch/distributed/checkpoint/_hf_utils.py`).
const SHARDING: &str = "DCP_SHARDING_INFO";

/// What it says of one tensor.
#[derive(Deserialize)]
struct Sharding {
    saved_offsets: Vec<u64>,
}

/// Notes for each tensor where in the whole tensor it lies.
fn place_pieces(tensors: &mut [SourceTensor], sharding: &str) -> Result<(), HeaderError> {
    let mut offsets: HashMap<String, Sharding> = serde_json::from_str(sharding)?;
    for tensor in tensors {
        let Some(Sharding { saved_offsets }) = offsets.remove(&*tensor.name) else { continue };
        let dims = tensor.shape.dims();
        let ends = saved_offsets.iter().zip(dims).map(|(start, n)| start.checked_add(*n));
        if saved_offsets.len() != dims.len() || ends.into_iter().any(|end| end.is_none()) {
            let (tensor, shape) = (tensor.name.clone(), tensor.shape.clone());
            return Err(HeaderError::Piece { tensor, shape, offsets: saved_offsets });
        }
        tensor.piece_at = Some(saved_offsets.into());
    }
    Ok(())
}

/// Checks that the tensors follow each other without hole or overlap; gives the end of the last.
fn check_cover(tensors: &[SourceTensor]) -> Result<u64, HeaderError> {
    let mut order: Vec<&SourceTensor> = tensors.iter().collect();
    // Empty tensors come before the one that starts where they do.
    order.sort_by_key(|t| (t.offset, t.bytes));
    let mut expected = 0;
    for t in order {
        if t.offset > expected {
            let (tensor, actual) = (t.name.clone(), t.offset);
            return Err(HeaderError::Hole { tensor, expected, actual });
        }
        if t.offset < expected {
            let (tensor, actual) = (t.name.clone(), t.offset);
            return Err(HeaderError::Overlap { tensor, expected, actual });
        }
        expected = t.offset + t.bytes;
    }
    Ok(expected)
}

fn check_size(t: &SourceTensor) -> Result<(), HeaderError> {
    if t.shape.rank() > MAX_AXES {
        return Err(HeaderError::Axes { tensor: t.name.clone(), axes: t.shape.rank() });
    }
    let Some(expected) = t.shape.bytes(t.dtype) else {
        let (tensor, shape) = (t.name.clone(), t.shape.clone());
        return Err(HeaderError::Shape { tensor, dtype: t.dtype, shape });
    };
    if expected != t.bytes {
        return Err(HeaderError::Size {
            tensor: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            expected,
            actual: t.bytes,
        });
    }
    Ok(())
}

/// The object of all tensors. Offsets come out relative to the data section.
struct Header {
    shard: ShardId,
}

impl<'de> Visitor<'de> for Header {
    type Value = (Vec<SourceTensor>, Option<String>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that maps tensor names to dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tensors = Vec::new();
        let mut sharding = None;
        let mut metadata = false;
        while let Some(Text(name)) = map.next_key()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut metadata, true) {
                    return Err(A::Error::custom("`__metadata__` occurs twice"));
                }
                sharding = map.next_value_seed(Metadata)?;
                continue;
            }
            let entry = map.next_value_seed(Entry)?;
            tensors.push(entry.named(&name, self.shard).map_err(A::Error::custom)?);
        }
        Ok((tensors, sharding))
    }
}

/// `__metadata__`: strings to strings, no key twice, or null; [`SHARDING`] is kept of it.
struct Metadata;

impl<'de> DeserializeSeed<'de> for Metadata {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Option<String>, D::Error> {
        json.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Metadata {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`__metadata__` to map strings to strings")
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Option<String>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, json: D) -> Result<Option<String>, D::Error> {
        json.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<String>, A::Error> {
        let mut keys = HashSet::new();
        let mut sharding = None;
        while let Some((Text(key), Text(value))) = map.next_entry()? {
            if key == SHARDING {
                sharding = Some(value.into_owned());
            }
            if let Some(key) = keys.replace(key) {
                return Err(A::Error::custom(format!("`__metadata__` has `{key}` twice")));
            }
        }
        Ok(sharding)
    }
}

/// What a header says of one tensor, each part still to be missed.
struct Parts<'a> {
    dtype: Option<Cow<'a, str>>,
    shape: Option<Vec<u64>>,
    offsets: Option<(u64, u64)>,
}

impl Parts<'_> {
    fn named(self, name: &str, shard: ShardId) -> Result<SourceTensor, String> {
        let missing = |key| format!("tensor `{name}` has no `{key}`");
        let dtype = self.dtype.ok_or_else(|| missing("dtype"))?;
        let dtype = DType::parse(&dtype)
            .ok_or_else(|| format!("tensor `{name}` has the unknown dtype `{dtype}`"))?;
        let shape = Shape::new(self.shape.ok_or_else(|| missing("shape"))?);
        let (start, end) = self.offsets.ok_or_else(|| missing("data_offsets"))?;
        let bytes = end.checked_sub(start).ok_or_else(|| {
            format!("tensor `{name}` ends before it starts: data_offsets [{start}, {end}]")
        })?;
        let piece_at = None;
        Ok(SourceTensor { name: name.into(), dtype, shape, shard, offset: start, bytes, piece_at })
    }
}

struct Entry;

impl<'de> DeserializeSeed<'de> for Entry {
    type Value = Parts<'de>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Parts<'de>, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entry {
    type Value = Parts<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor: an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parts<'de>, A::Error> {
        let mut parts = Parts { dtype: None, shape: None, offsets: None };
        while let Some(Text(key)) = map.next_key()? {
            let twice = match &*key {
                "dtype" => parts.dtype.replace(map.next_value::<Text<'_>>()?.0).is_some(),
                "shape" => parts.shape.replace(map.next_value()?).is_some(),
                "data_offsets" => parts.offsets.replace(map.next_value()?).is_some(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom(format!("`{key}` occurs twice")));
            }
        }
        Ok(parts)
    }
}
