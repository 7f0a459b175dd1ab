//! The `mount-ckpt` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    mount_ckpt::cli::main(std::env::args_os())
}
