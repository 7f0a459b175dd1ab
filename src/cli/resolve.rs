//! Turns parsed arguments into requests ([`super::request`]): merges `-o` into the long options, fills in
//! defaults that depend on the machine, and refuses combinations of options that clap cannot check.

use super::args::{Cli, EngineArgs, KernelArgs, LogArgs, MountArgs, ViewArgs};
use super::memory;
use super::mount_words::{MountWords, WordError};
use super::request::{MappingChoice, MountRequest, ViewRequest};
use crate::mapping::LayoutName;
use crate::mount::MountOptions;
use crate::mount::log::LogOptions;
use crate::plan::{ExpertParallel, ExpertShard, PlanOptions, Quantize};
use crate::read::EngineOptions;
use crate::view::ViewOptions;
use clap::{CommandFactory, FromArgMatches};
use fuser::{MountOption, SessionACL};
use std::ffi::OsString;
use std::path::Path;
use tracing::Level;

/// A combination of options that is refused, with exit code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum UsageError {
    /// An option that has no meaning without another.
    #[error("`{option}` needs `{needs}`")]
    Needs {
        /// The option that was given.
        option: &'static str,
        /// The option that it needs.
        needs: &'static str,
    },
    /// A rank that is not below the number of ranks.
    #[error("`{option}` has to be below {size}, got {rank}")]
    Rank {
        /// The option that was given.
        option: &'static str,
        /// The number of ranks.
        size: u64,
        /// The rank that was given.
        rank: u64,
    },
}

/// Parses the command line of a mount again, with the long options of its `-o` inserted.
///
/// They are inserted before all other arguments. Of an option that is given twice the last one counts,
/// so a long option on the command line wins over the same one in `-o`.
///
/// # Errors
/// `-o` has an unknown option, or clap refuses the value of one.
pub(super) fn with_mount_words(
    argv: &[OsString],
    args: MountArgs,
) -> Result<(MountArgs, MountWords), clap::Error> {
    let usage = |error: WordError| {
        Cli::command().error(clap::error::ErrorKind::UnknownArgument, error.to_string())
    };
    let words = MountWords::parse(&args.options).map_err(usage)?;
    if words.long.is_empty() {
        return Ok((args, words));
    }
    let (program, rest) = argv.split_first().map_or((None, argv), |(p, rest)| (Some(p), rest));
    let program = program.cloned().unwrap_or_default();
    let expanded =
        [program].into_iter().chain(words.long.iter().map(OsString::from)).chain(rest.to_vec());
    let cli = Cli::from_arg_matches(&Cli::command().try_get_matches_from(expanded)?)?;
    Ok((cli.mount, words))
}

/// The request of a mount.
///
/// # Errors
/// Options that cannot be combined.
pub(super) fn mount(args: MountArgs, words: MountWords) -> Result<MountRequest, UsageError> {
    let kernel = &args.kernel;
    // clap requires both, so the defaults are never used.
    let (src, at) = (args.src.unwrap_or_default(), args.at.unwrap_or_default());
    let mut view = view(&src, &args.view)?;
    view.files.uid = kernel.uid.unwrap_or(view.files.uid);
    view.files.gid = kernel.gid.unwrap_or(view.files.gid);
    (view.files.file_mode, view.files.dir_mode) = (kernel.file_mode, kernel.dir_mode);
    let mut engine = engine(&args.engine);
    engine.direct_io = kernel.direct_io;
    Ok(MountRequest {
        at,
        nonempty: words.nonempty,
        foreground: args.foreground,
        view,
        engine,
        mount: mount_options(kernel, words, engine.threads),
        log: log(&args.log, Level::INFO),
    })
}

/// The request of a view of the checkpoint `src`.
///
/// # Errors
/// Options that cannot be combined.
pub(super) fn view(src: &Path, args: &ViewArgs) -> Result<ViewRequest, UsageError> {
    let mapping = match (&args.mapping, args.model.as_str()) {
        (Some(file), _) => MappingChoice::File(file.clone()),
        (None, "auto") => MappingChoice::Auto,
        (None, name) => MappingChoice::Named(name.to_owned()),
    };
    let needs = |option, needs| Err(UsageError::Needs { option, needs });
    if args.scales_from.is_some() && !args.quantize {
        return needs("--scales-from", "--quantize checkpoint");
    }
    if args.quantize && args.to.is_some_and(|to| to != LayoutName::Hf) {
        return needs("--quantize checkpoint", "--to hf");
    }
    let below = |option, rank: Option<u64>, size: Option<u64>| match (rank, size) {
        (Some(rank), Some(size)) if rank >= size => Err(UsageError::Rank { option, size, rank }),
        _ => Ok(()),
    };
    below("--ep-rank", args.ep_rank, args.ep_size)?;
    below("--ep-shard-rank", args.ep_shard_rank, args.ep_shard_size)?;
    let ranks = args.ep_size.map(|size| ExpertParallel { size, rank: args.ep_rank });
    let shard = args.ep_shard_size.zip(args.ep_shard_rank);
    Ok(ViewRequest {
        src: src.to_owned(),
        mapping,
        plan: PlanOptions {
            to: args.to,
            dtype: args.dtype,
            scale_reading: args.kv_scales,
            unmapped: args.unmapped,
            allow_missing: args.allow_missing.clone(),
            include: args.include.clone(),
            exclude: args.exclude.clone(),
            expert_parallel: ranks,
            expert_shard: shard.map(|(size, rank)| ExpertShard { size, rank }),
            quantize: args
                .quantize
                .then_some(Quantize { original: None, scale_dtype: Some(args.scale_dtype) }),
        },
        scales_from: args.scales_from.clone(),
        files: ViewOptions { shard_size: args.shard_size.0, ..ViewOptions::default() },
    })
}

/// The options of the engine. The cache is the default one, or smaller where memory is short.
pub(super) fn engine(args: &EngineArgs) -> EngineOptions {
    let default = EngineOptions::default();
    let cache_bytes = args.cache_size.map(|size| size.0);
    EngineOptions {
        cache_bytes: cache_bytes.unwrap_or_else(|| cache_within(memory::limit(), &default)),
        threads: args.threads.map_or(default.threads, usize::from),
        ..default
    }
}

/// Size of the cache in bytes by default: that of `default`, or a quarter of `memory` if that is less.
fn cache_within(memory: Option<u64>, default: &EngineOptions) -> u64 {
    memory.map_or(default.cache_bytes, |memory| default.cache_bytes.min(memory / 4))
}

fn mount_options(args: &KernelArgs, words: MountWords, threads: usize) -> MountOptions {
    let acl = match (args.allow_other, args.allow_root || args.auto_unmount) {
        (true, _) => SessionACL::All,
        (false, true) => SessionACL::RootAndOwner,
        (false, false) => SessionACL::Owner,
    };
    let mut extra = words.kernel;
    if args.auto_unmount {
        extra.push(MountOption::AutoUnmount);
    }
    MountOptions {
        threads,
        read_ahead: args.read_ahead.0,
        direct_io: args.direct_io,
        acl,
        fs_name: words.fs_name,
        extra,
    }
}

/// The options of the log. `default` is the level without `--log-level`.
pub(super) fn log(args: &LogArgs, default: Level) -> LogOptions {
    let level = args.log_level.unwrap_or(default);
    LogOptions { level, file: args.log_file.clone(), json: args.log_format }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{ScaleReading, Unmapped};
    use crate::tensor::Float;
    use clap::Parser;
    use regex::Regex;
    use std::path::PathBuf;

    fn request(line: &str) -> Result<MountRequest, String> {
        let argv: Vec<OsString> =
            ["mount-ckpt"].into_iter().chain(line.split(' ')).map(OsString::from).collect();
        let cli = Cli::try_parse_from(&argv).map_err(|e| e.to_string())?;
        let (args, words) = with_mount_words(&argv, cli.mount).map_err(|e| e.to_string())?;
        mount(args, words).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_are_those_of_the_manual() {
        let request = request("src mnt --cache-size 1GiB --threads 3").unwrap();
        let MountRequest { view, engine, mount, log, .. } = &request;
        assert_eq!((view.src.to_str(), request.at.to_str()), (Some("src"), Some("mnt")));
        assert!(!request.foreground && !request.nonempty);
        assert_eq!(view.mapping, MappingChoice::Auto);
        assert_eq!((view.plan.to, view.plan.dtype), (None, Float::BF16));
        assert!(view.plan.quantize.is_none() && view.scales_from.is_none());
        assert_eq!(view.plan.scale_reading, ScaleReading::Fused);
        assert_eq!((view.plan.expert_parallel, view.plan.expert_shard), (None, None));
        assert_eq!((view.plan.include.len(), view.plan.exclude.len()), (0, 0));
        assert_eq!((view.plan.unmapped, view.files.shard_size), (Unmapped::Refuse, 5_000_000_000));
        assert_eq!((engine.cache_bytes, engine.threads, engine.direct_io), (1 << 30, 3, false));
        assert_eq!((mount.threads, mount.read_ahead, mount.direct_io), (3, 4 << 20, false));
        assert_eq!((mount.acl, mount.extra.len()), (SessionACL::Owner, 0));
        assert_eq!((view.files.file_mode, view.files.dir_mode), (0o444, 0o555));
        assert_eq!((log.level, log.json), (Level::INFO, false));
    }

    #[test]
    fn the_default_cache_is_at_most_a_quarter_of_memory() {
        let default = EngineOptions { cache_bytes: 1 << 30, ..EngineOptions::default() };
        let table = [
            (None, 1 << 30),
            (Some(64 << 30), 1 << 30),
            (Some(4 << 30), 1 << 30),
            (Some(2 << 30), 512 << 20),
            (Some(0), 0),
        ];
        for (memory, cache) in table {
            assert_eq!(cache_within(memory, &default), cache, "{memory:?}");
        }
    }

    #[test]
    fn every_option_reaches_its_request() {
        let line = "-f src mnt --to=hf --dtype f16 --quantize checkpoint --scales-from s \
                    --scale-dtype f16 --kv-scales automodel --ep-size 8 --ep-rank 7 --ep-shard-size 2 \
                    --ep-shard-rank 1 --include a --include b --exclude c --unmapped keep --shard-size \
                    1MiB --model m --read-ahead 0 --direct-io --allow-other --uid 5 --gid 6 --file-mode \
                    640 --dir-mode 0750 --log-level trace --log-file l --log-format json"
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        let request = request(&line).unwrap();
        let MountRequest { view, engine, mount, log, .. } = &request;
        assert!(request.foreground);
        assert_eq!(view.mapping, MappingChoice::Named("m".to_owned()));
        assert_eq!((view.plan.to, view.plan.dtype), (Some(LayoutName::Hf), Float::F16));
        assert_eq!(view.scales_from, Some(PathBuf::from("s")));
        let quantize = view.plan.quantize.as_ref().unwrap();
        assert_eq!((quantize.original.is_none(), quantize.scale_dtype), (true, Some(Float::F16)));
        assert_eq!(view.plan.scale_reading, ScaleReading::Automodel);
        assert_eq!(view.plan.expert_parallel, Some(ExpertParallel { size: 8, rank: Some(7) }));
        assert_eq!(view.plan.expert_shard, Some(ExpertShard { size: 2, rank: 1 }));
        assert_eq!((view.plan.include.len(), view.plan.exclude.len()), (2, 1));
        assert_eq!((view.plan.unmapped, view.files.shard_size), (Unmapped::Keep, 1 << 20));
        assert_eq!((mount.read_ahead, mount.direct_io, engine.direct_io), (0, true, true));
        assert_eq!((mount.acl, view.files.uid, view.files.gid), (SessionACL::All, 5, 6));
        assert_eq!((view.files.file_mode, view.files.dir_mode), (0o640, 0o750));
        assert_eq!((log.level, log.json), (Level::TRACE, true));
        assert_eq!(log.file, Some(PathBuf::from("l")));
    }

    #[test]
    fn options_after_o_and_long_options_are_merged() {
        let request =
            request("-o to=hf,dtype=f32,include=a --dtype f16 src mnt -o include=b,nonempty");
        let request = request.unwrap();
        assert_eq!(request.view.plan.to, Some(LayoutName::Hf));
        assert_eq!(request.view.plan.dtype, Float::F16, "the command line beats -o");
        let include: Vec<_> = request.view.plan.include.iter().map(Regex::as_str).collect();
        assert_eq!(include, ["a", "b"]);
        assert!(request.nonempty);
        assert_eq!((request.view.src.to_str(), request.at.to_str()), (Some("src"), Some("mnt")));
    }

    #[test]
    fn allow_and_auto_unmount_options_set_the_access() {
        let auto = || vec![MountOption::AutoUnmount];
        let table = [
            ("src mnt", SessionACL::Owner, vec![]),
            ("src mnt --allow-root", SessionACL::RootAndOwner, vec![]),
            ("src mnt -o allow_other", SessionACL::All, vec![]),
            ("src mnt --auto-unmount", SessionACL::RootAndOwner, auto()),
            ("src mnt --auto-unmount -o allow_other", SessionACL::All, auto()),
            ("src mnt -o noexec", SessionACL::Owner, vec![MountOption::NoExec]),
        ];
        for (line, acl, extra) in table {
            let kernel = request(line).unwrap().mount;
            assert_eq!((kernel.acl, kernel.extra), (acl, extra), "{line}");
        }
    }

    #[test]
    fn conflicting_and_invalid_options_are_refused() {
        let table = [
            ("src mnt --ep-rank 1", "required arguments were not provided:\n  --ep-size <N>"),
            ("src mnt --ep-size 0", "'0' for '--ep-size <N>': 0 is not in 1.."),
            ("src mnt --ep-size 8 --ep-rank 8", "`--ep-rank` has to be below 8, got 8"),
            ("src mnt --ep-shard-size 2", "not provided:\n  --ep-shard-rank <R>"),
            ("src mnt --ep-shard-rank 2", "not provided:\n  --ep-shard-size <N>"),
            ("src mnt --scales-from x", "`--scales-from` needs `--quantize checkpoint`"),
            (
                "src mnt --quantize checkpoint --to native",
                "`--quantize checkpoint` needs `--to hf`",
            ),
            (
                "src mnt --model m --mapping f",
                "'--model <NAME>' cannot be used with '--mapping <FILE>'",
            ),
            ("src mnt --shard-size 0", "'--shard-size <SIZE>': expected at least 1 byte"),
            ("src mnt --include (", "'(' for '--include <RE>': unclosed group"),
            ("src mnt --exclude a)(b", "'a)(b' for '--exclude <RE>': unopened group"),
            ("src mnt --shard-size 5XB", "expected one of the units"),
            ("src mnt --file-mode 888", "expected octal permission bits"),
            ("src mnt --to hg", "possible values: native, transformers, hf"),
            ("src mnt --threads 0", "number would be zero"),
            ("src mnt -o bogus", "`-o` has no option `bogus`"),
            ("-o to src mnt", "`-o to` needs a value"),
            ("src mnt -o direct_io=1", "unexpected value '1' for '--direct-io'"),
            ("src mnt -o rw", "a view is read-only"),
            ("src", "the following required arguments were not provided"),
            ("--json src mnt", "unexpected argument '--json'"),
        ];
        for (line, message) in table {
            let error = request(line).unwrap_err();
            assert!(error.contains(message), "{line}: {error}");
        }
    }
}
