//! Tests of opening and reading checkpoint directories, one file for each topic.

mod config;
mod files;
mod headers;
mod hub;
mod opening;
mod reads;
