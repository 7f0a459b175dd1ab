//! The `mount-ckpt` command.

fn main() {}
