//! The shape of a tensor, and sizes that follow from it.

use std::fmt;

use super::DType;

/// Extents of a tensor, outermost axis first; row-major, no padding.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape(Box<[u64]>);

impl Shape {
    /// A shape with these extents.
    pub fn new(dims: impl Into<Box<[u64]>>) -> Shape {
        Shape(dims.into())
    }

    /// The extents, outermost axis first.
    pub fn dims(&self) -> &[u64] {
        &self.0
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Number of elements. `None` if the product of the extents exceeds 64 bits; extents of 0 are
    /// left out of that test, so that the result does not depend on the order of the axes.
    pub fn elements(&self) -> Option<u64> {
        let n = self.0.iter().try_fold(1u64, |n, &d| n.checked_mul(d.max(1)))?;
        Some(if self.0.contains(&0) { 0 } else { n })
    }

    /// Size in bytes of a tensor of this shape; `None` on overflow or if it is not a whole number
    /// of bytes.
    pub fn bytes(&self, dtype: DType) -> Option<u64> {
        let bits = self.elements()?.checked_mul(u64::from(dtype.bits()))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// For each axis, the number of elements from one index to the next.
    ///
    /// # Panics
    /// On overflow, which cannot happen if [`Shape::elements`] is `Some`.
    pub fn strides(&self) -> Vec<u64> {
        let mut strides = vec![1; self.rank()];
        for axis in (1..self.rank()).rev() {
            strides[axis - 1] = strides[axis] * self.0[axis];
        }
        strides
    }
}

impl<const N: usize> From<[u64; N]> for Shape {
    fn from(dims: [u64; N]) -> Shape {
        Shape::new(dims)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[")?;
        for (i, d) in self.0.iter().enumerate() {
            write!(f, "{}{d}", if i == 0 { "" } else { ", " })?;
        }
        write!(f, "]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_checked() {
        assert_eq!(Shape::from([3, 4]).bytes(DType::BF16), Some(24));
        assert_eq!(Shape::from([]).bytes(DType::F32), Some(4));
        assert_eq!(Shape::from([3]).bytes(DType::F4), None);
        assert_eq!(Shape::from([4]).bytes(DType::F4), Some(2));
        assert_eq!(Shape::from([u64::MAX, 2]).bytes(DType::U8), None);
        assert_eq!(Shape::from([1 << 61]).bytes(DType::F64), None);
        assert_eq!(Shape::from([1 << 40, 0]).bytes(DType::U8), Some(0));
        assert_eq!(Shape::from([0, 1 << 40, 1 << 40]).bytes(DType::U8), None);
    }

    #[test]
    fn strides_are_row_major() {
        assert_eq!(Shape::from([2, 3, 4]).strides(), [12, 4, 1]);
    }
}
