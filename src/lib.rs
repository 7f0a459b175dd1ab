//! Mounts a Hugging Face checkpoint directory and shows it in another layout.
//!
//! The rooms, each importing only those before it:
//! `tensor`, `codec`, `source`, `mapping`, `plan`, `read`, `view`, `fuse`, `daemon`, `cli`.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod cli;
pub mod codec;
pub mod daemon;
pub mod fuse;
pub mod mapping;
pub mod plan;
pub mod read;
pub mod source;
pub mod tensor;
pub mod view;
