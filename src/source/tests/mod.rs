//! Tests of the room as a whole, by what is on the disk.

mod config;
mod files;
mod headers;
mod hub;
mod opening;
mod reads;
