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

mod decode;
mod encode;
mod float;
mod fp8;
mod nibble;
pub mod reference;
mod rows;
mod scheme;
mod scratch;
pub(crate) mod simd;
#[cfg(test)]
mod tests;
mod tile;
mod transpose;

pub(crate) use decode::decode;
pub use decode::decode_at;
pub use encode::encode_at;
pub(crate) use encode::{block_amax, encode, fp4_exponent, fp8_exponent, fp8_scale, int4_scale};
pub(crate) use float::{ScaleCode, f32_to_scale, scale_to_f32};
pub(crate) use scheme::{ScaleGrid, Scheme};
pub use simd::Level;
pub use tile::{Code, Orientation, Scales, Tile};
pub(crate) use transpose::copy2d;
pub use transpose::copy2d_at;
