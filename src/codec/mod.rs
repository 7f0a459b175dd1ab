#![doc = include_str!("README.md")]

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
pub(crate) use encode::{
    block_amax, encode, fp4_scale_e8m0, fp8_scale, fp8_scale_e8m0, int4_scale,
};
pub(crate) use float::{ScaleCode, f32_to_scale, scale_to_f32};
pub(crate) use scheme::{ScaleGrid, Scheme};
pub use simd::Level;
pub use tile::{Code, Orientation, Scales, Tile};
pub(crate) use transpose::copy2d;
pub use transpose::copy2d_at;
