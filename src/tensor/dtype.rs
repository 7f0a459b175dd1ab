//! Element types of tensors, with the names that safetensors headers use.

use safetensors::Dtype;
use std::fmt;

/// Element type of a stored tensor.
///
/// The names are those of a safetensors header (crate `safetensors` 0.8, `Dtype`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum DType {
    Bool,
    F4,
    F6E2M3,
    F6E3M2,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    F8E8M0,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl DType {
    const ALL: [(DType, &'static str, u32, Dtype); 20] = [
        (DType::Bool, "BOOL", 8, Dtype::BOOL),
        (DType::F4, "F4", 4, Dtype::F4),
        (DType::F6E2M3, "F6_E2M3", 6, Dtype::F6_E2M3),
        (DType::F6E3M2, "F6_E3M2", 6, Dtype::F6_E3M2),
        (DType::U8, "U8", 8, Dtype::U8),
        (DType::I8, "I8", 8, Dtype::I8),
        (DType::F8E5M2, "F8_E5M2", 8, Dtype::F8_E5M2),
        (DType::F8E4M3, "F8_E4M3", 8, Dtype::F8_E4M3),
        (DType::F8E8M0, "F8_E8M0", 8, Dtype::F8_E8M0),
        (DType::I16, "I16", 16, Dtype::I16),
        (DType::U16, "U16", 16, Dtype::U16),
        (DType::F16, "F16", 16, Dtype::F16),
        (DType::BF16, "BF16", 16, Dtype::BF16),
        (DType::I32, "I32", 32, Dtype::I32),
        (DType::U32, "U32", 32, Dtype::U32),
        (DType::F32, "F32", 32, Dtype::F32),
        (DType::C64, "C64", 64, Dtype::C64),
        (DType::F64, "F64", 64, Dtype::F64),
        (DType::I64, "I64", 64, Dtype::I64),
        (DType::U64, "U64", 64, Dtype::U64),
    ];

    /// All types, smallest first.
    pub fn all() -> impl Iterator<Item = DType> {
        Self::ALL.iter().map(|(d, ..)| *d)
    }

    /// The type that a safetensors header calls `name`, or `None` if there is no such type.
    pub fn parse(name: &str) -> Option<DType> {
        Self::ALL.iter().find(|(_, n, ..)| *n == name).map(|(d, ..)| *d)
    }

    /// The name that a safetensors header uses.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Bits of one element.
    pub fn bits(self) -> u32 {
        Self::ALL[self as usize].2
    }

    /// The type as a [`Float`], or `None` if it is not BF16, F16 or F32.
    pub fn as_float(self) -> Option<Float> {
        match self {
            DType::BF16 => Some(Float::BF16),
            DType::F16 => Some(Float::F16),
            DType::F32 => Some(Float::F32),
            DType::Bool
            | DType::F4
            | DType::F6E2M3
            | DType::F6E3M2
            | DType::U8
            | DType::I8
            | DType::F8E5M2
            | DType::F8E4M3
            | DType::F8E8M0
            | DType::I16
            | DType::U16
            | DType::I32
            | DType::U32
            | DType::C64
            | DType::F64
            | DType::I64
            | DType::U64 => None,
        }
    }
}

impl From<DType> for Dtype {
    fn from(dtype: DType) -> Dtype {
        DType::ALL[dtype as usize].3
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A float type that decoded tensors can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Float {
    BF16,
    F16,
    F32,
}

impl Float {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Float::BF16 | Float::F16 => 2,
            Float::F32 => 4,
        }
    }

    /// The same type as a [`DType`].
    pub fn dtype(self) -> DType {
        match self {
            Float::BF16 => DType::BF16,
            Float::F16 => DType::F16,
            Float::F32 => DType::F32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The crate `safetensors` has the same name and size for every dtype.
    #[test]
    fn names_and_sizes_are_those_of_safetensors() {
        for dtype in DType::all() {
            let theirs: safetensors::Dtype =
                serde_json::from_value(dtype.name().into()).expect("a name of the format");
            assert_eq!(theirs, dtype.into());
            assert_eq!(format!("{theirs:?}").replace('_', ""), format!("{dtype:?}").to_uppercase());
            assert_eq!(theirs.bitsize(), dtype.bits() as usize, "{dtype}");
            assert_eq!(DType::parse(dtype.name()), Some(dtype));
        }
        assert_eq!(DType::parse("F8"), None);
    }
}
