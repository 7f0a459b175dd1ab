//! The `mount-ckpt` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    mount_ckpt::run_command(std::env::args_os())
}
