//! Parses and validates the header of a safetensors file in one pass.
//!
//! It accepts no header that the crate `safetensors` rejects; a test compares the two. The crate's
//! own parser is not used, for three reasons: `SafeTensors::read_metadata` needs the whole file as
//! one slice, that is, a memory map of every shard; it accepts a name that occurs twice and takes
//! the last one; and `#[serde(flatten)]` makes it build a generic tree and two hash maps for each
//! header, too slow for checkpoints of 207,000 tensors.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::checkpoint::{ShardId, SourceTensor};
use super::text::Text;
use crate::tensor::{DType, Shape};

/// Largest accepted header, in bytes (`MAX_HEADER_SIZE` of the crate `safetensors`).
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most axes of a tensor: the limit of PyTorch and NumPy.
pub(super) const MAX_AXES: usize = 64;

/// Size in bytes of the header's length, with which the file starts.
pub(crate) const LENGTH_PREFIX_BYTES: u64 = 8;

/// Why a header is invalid.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The header is longer than any reader accepts.
    #[error("header too large: expected at most {MAX_HEADER_BYTES} bytes, got {bytes}")]
    TooLarge {
        /// Length that the file states, in bytes.
        bytes: u64,
    },
    /// The header is not a JSON object from its first byte on.
    #[error("header does not start with `{{`")]
    NotAnObject,
    /// The header is not UTF-8.
    #[error("header is not UTF-8: {0}")]
    NotUtf8(#[from] std::str::Utf8Error),
    /// The header is not JSON, or has the wrong structure.
    #[error("header is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A name occurs twice.
    #[error("tensor `{tensor}` occurs twice in the header")]
    Duplicate {
        /// Name of the tensor.
        tensor: Box<str>,
    },
    /// More axes than any reader accepts.
    #[error("tensor `{tensor}`: expected at most {MAX_AXES} axes, got {axes}")]
    Axes {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Number of its axes.
        axes: usize,
    },
    /// The stated position of a piece in the whole tensor is impossible.
    #[error("tensor `{tensor}`: a piece of {shape} cannot lie at {offsets:?}")]
    Piece {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Extents of the piece.
        shape: Shape,
        /// Stated index of its first element in the whole tensor.
        offsets: Vec<u64>,
    },
    /// The size by shape and dtype is not a whole number of bytes, or is 2^61 bytes or more.
    #[error("tensor `{tensor}`: {dtype} {shape} is not a whole number of bytes below 2^61")]
    Shape {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Its element type.
        dtype: DType,
        /// Its extents.
        shape: Shape,
    },
    /// The size by shape and dtype differs from the size by the offsets.
    #[error("tensor `{tensor}`: {dtype} {shape} is {expected} bytes, got offsets {actual} apart")]
    Size {
        /// Name of the tensor.
        tensor: Box<str>,
        /// Its element type.
        dtype: DType,
        /// Its extents.
        shape: Shape,
        /// Size by shape and dtype, in bytes.
        expected: u64,
        /// Size by the offsets, in bytes.
        actual: u64,
    },
    /// The bytes before a tensor belong to no tensor.
    #[error("tensor `{tensor}` leaves a hole: expected offset {expected}, got {actual}")]
    Hole {
        /// Name of the tensor after the hole.
        tensor: Box<str>,
        /// End of the preceding tensor: offset in the data section, in bytes.
        expected: u64,
        /// Start of the tensor.
        actual: u64,
    },
    /// Bytes belong to two tensors.
    #[error("tensor `{tensor}` overlaps another: expected offset {expected}, got {actual}")]
    Overlap {
        /// Name of the second tensor.
        tensor: Box<str>,
        /// End of the first tensor: offset in the data section, in bytes.
        expected: u64,
        /// Start of the tensor.
        actual: u64,
    },
}

/// Parses the text of a header. Returns its tensors, sorted by name, and the size of the data
/// section in bytes.
///
/// The offsets of the tensors are relative to the start of the file: `data_start` is added to those
/// of the header. The addition saturates, which is safe: the caller compares the end of the data
/// section with the size of the file, and no file is that large.
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
    let (mut tensors, sharding) = json.deserialize_map(HeaderVisitor { shard })?;
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

/// The key of `__metadata__` under which torch.distributed.checkpoint's HuggingFaceStorageWriter
/// states the position of each piece (`torch/distributed/checkpoint/_hf_utils.py`).
const DCP_SHARDING_KEY: &str = "DCP_SHARDING_INFO";

/// The position of one piece in its tensor.
#[derive(Deserialize)]
struct PieceInfo {
    saved_offsets: Vec<u64>,
}

/// Sets the position of every tensor that `sharding`, the value of [`DCP_SHARDING_KEY`], names.
fn place_pieces(tensors: &mut [SourceTensor], sharding: &str) -> Result<(), HeaderError> {
    let mut pieces: HashMap<String, PieceInfo> = serde_json::from_str(sharding)?;
    for tensor in tensors {
        let Some(PieceInfo { saved_offsets }) = pieces.remove(&*tensor.name) else { continue };
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

/// Checks that the tensors cover the data section without hole or overlap; returns its size.
fn check_cover(tensors: &[SourceTensor]) -> Result<u64, HeaderError> {
    let mut order: Vec<&SourceTensor> = tensors.iter().collect();
    // An empty tensor sorts before a tensor with data at the same offset.
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

/// Deserializes the header object: all tensors, with offsets relative to the data section, and the
/// value of [`DCP_SHARDING_KEY`].
struct HeaderVisitor {
    shard: ShardId,
}

impl<'de> Visitor<'de> for HeaderVisitor {
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
                sharding = map.next_value_seed(MetadataVisitor)?;
                continue;
            }
            let fields = map.next_value_seed(TensorVisitor)?;
            tensors.push(fields.into_tensor(&name, self.shard).map_err(A::Error::custom)?);
        }
        Ok((tensors, sharding))
    }
}

/// Deserializes `__metadata__`, a map of strings to strings without repeated keys, or null. Keeps
/// the value of [`DCP_SHARDING_KEY`] only.
struct MetadataVisitor;

impl<'de> DeserializeSeed<'de> for MetadataVisitor {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Option<String>, D::Error> {
        json.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for MetadataVisitor {
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
            if key == DCP_SHARDING_KEY {
                sharding = Some(value.into_owned());
            }
            if let Some(key) = keys.replace(key) {
                return Err(A::Error::custom(format!("`__metadata__` has `{key}` twice")));
            }
        }
        Ok(sharding)
    }
}

/// The fields of one tensor in a header, each `None` until it was read.
struct TensorFields<'a> {
    dtype: Option<Cow<'a, str>>,
    shape: Option<Vec<u64>>,
    offsets: Option<(u64, u64)>,
}

impl TensorFields<'_> {
    fn into_tensor(self, name: &str, shard: ShardId) -> Result<SourceTensor, String> {
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

/// Deserializes the entry of one tensor.
struct TensorVisitor;

impl<'de> DeserializeSeed<'de> for TensorVisitor {
    type Value = TensorFields<'de>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<TensorFields<'de>, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorVisitor {
    type Value = TensorFields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor: an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TensorFields<'de>, A::Error> {
        let mut fields = TensorFields { dtype: None, shape: None, offsets: None };
        while let Some(Text(key)) = map.next_key()? {
            let twice = match &*key {
                "dtype" => fields.dtype.replace(map.next_value::<Text<'_>>()?.0).is_some(),
                "shape" => fields.shape.replace(map.next_value()?).is_some(),
                "data_offsets" => fields.offsets.replace(map.next_value()?).is_some(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom(format!("`{key}` occurs twice")));
            }
        }
        Ok(fields)
    }
}
