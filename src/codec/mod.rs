//! Decoders and encoders of quantized matrices, casts and 2-D transposes.
//!
//! What the bytes mean: every decoded element is `round(f32(code) * f32(scale))`, one `f32`
//! multiplication and one rounding (nearest, ties to even) to the output type. Overflow becomes an
//! infinity, a NaN stays a NaN, subnormal numbers are kept. Encoding is `code(x / scale)`, one
//! `f32` division and one rounding. Both are bit-exact against PyTorch on a CPU.
//!
//! [`reference`](mod@reference) states that contract one element at a time. The rest computes the
//! same bits fast: table look-up and loops that the compiler vectorises, and [`simd`] kernels that
//! are chosen at run time by [`Level`].
//!
//! Nothing here reads a file or knows a tensor's name, and nothing allocates but the scratch memory
//! of a thread (304 KiB, at its first decode).
//!
//! ```
//! use mount_ckpt::codec::{Code, Orientation, Scales, Tile, decode};
//! use mount_ckpt::tensor::Float;
//!
//! // A [2, 3] E4M3 matrix (1, 2, 4 above -1, -2, -4) under one scale, decoded transposed.
//! let tile = Tile {
//!     code: Code::E4M3,
//!     bytes: &[0x38, 0x40, 0x48, 0xb8, 0xc0, 0xc8],
//!     stride: 3,
//!     rows: 2,
//!     cols: 3,
//!     scales: Some(Scales { values: &[0.5], stride: 1, block: [128, 128], phase: [0, 0] }),
//! };
//! let mut out = [0; 3 * 2 * 4];
//! decode(&tile, Float::F32, Orientation::Transposed, &mut out, 8);
//! let values: Vec<f32> = out.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
//! assert_eq!(values, [0.5, -0.5, 1.0, -1.0, 2.0, -2.0]);
//! ```

mod decode;
mod encode;
mod float;
mod fp8;
mod nibble;
pub mod reference;
mod rows;
mod scheme;
mod scratch;
pub mod simd;
#[cfg(test)]
mod tests;
mod tile;
mod transpose;

pub use decode::{decode, decode_at};
pub use encode::{
    block_amax, encode, encode_at, fp4_exponent, fp8_exponent, fp8_scale, int4_scale,
};
pub use float::{ScaleCode, f32_to_scale, scale_to_f32};
pub use scheme::{ScaleGrid, Scheme};
pub use simd::Level;
pub use tile::{Code, Orientation, Scales, Tile};
pub use transpose::{copy2d, copy2d_at};
