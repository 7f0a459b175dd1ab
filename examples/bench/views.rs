//! Mounts against the null file system, against files on the disk, and on their own.

use std::path::Path;

use anyhow::Result;

use super::Arguments;
use super::checkpoints::Family;
use super::mounts::{Mount, Server};
use super::readers::{forget, mapped, pread, shards, warm};
use super::table::{Row, Value, compare};

pub fn rows(arguments: &Arguments, wanted: &impl Fn(&str) -> bool) -> Result<()> {
    let Arguments { data, rounds, .. } = arguments;
    for family in Family::ALL {
        let at_least = if family == Family::Qwen { 0.9 } else { 0.75 };
        for (reader, options, at_least) in [
            ("cold, mapped copy", &[][..], at_least),
            ("cold, --direct-io, pread 8 MiB x2", &["--direct-io"][..], 0.5),
        ] {
            let name = format!("{reader}: {}", family.name());
            if !wanted(&name) {
                continue;
            }
            let source = family.checkpoint(data)?;
            let rates = against_null(&source, data, options, *rounds)?;
            let against = "null file system";
            let row = Row { name, against, value: Value::Ratio { rates, at_least } };
            println!("{}", row.markdown());
        }
    }
    Ok(())
}

/// Cold reads of a view from a warm source, in turn with those of the null file system.
fn against_null(
    source: &Path,
    data: &Path,
    options: &[&str],
    rounds: usize,
) -> Result<Vec<[f64; 2]>> {
    warm(&shards(source)?)?;
    let view = Mount::new(Server::MountCkpt, source, &data.join("mnt-view"), options)?;
    let null = Mount::new(Server::Null, source, &data.join("mnt-null"), options)?;
    let read = |mount: &Mount| {
        let shards = shards(mount.at())?;
        forget(&shards)?;
        if options.contains(&"--direct-io") { pread(&shards, 2) } else { mapped(&shards) }
    };
    compare(rounds, || read(&view), || read(&null))
}
