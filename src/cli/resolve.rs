//! From what was typed to values that are checked: defaults filled in, options that belong together
//! seen together, regular expressions compiled.

use super::args::{Cli, EngineArgs, KernelArgs, LogArgs, MountArgs, ViewArgs};
use super::choices::{LayoutChoice, LogFormat, LogLevel, QuantizeChoice};
use super::memory;
use super::mount_words::{MountWords, WordError};
use super::request::{
    EngineOptions, ExpertParallel, ExpertShard, KernelOptions, MappingChoice, MountRequest,
    PlanOptions, Quantize,
};
use super::size::Size;
use crate::daemon::log::LogOptions;
use clap::{CommandFactory, FromArgMatches};
use fuser::{MountOption, SessionACL};
use regex::Regex;
use std::ffi::OsString;

/// Options that do not go together, or a value that cannot be. Exit code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    /// Fits no other.
    #[error("{0}")]
    Word(#[from] WordError),
    /// An option that means nothing without another.
    #[error("`{option}` needs `{needs}`")]
    Needs {
        /// The option that was given.
        option: &'static str,
        /// What it needs beside it.
        needs: &'static str,
    },
    /// A count of 0.
    #[error("`{0}` has to be at least 1")]
    Zero(&'static str),
    /// A rank that is not below its size.
    #[error("`{option}` has to be below {size}, got {rank}")]
    Rank {
        /// The option that was given.
        option: &'static str,
        /// The number of ranks.
        size: u32,
        /// The rank that was given.
        rank: u32,
    },
    /// `--model` beside `--mapping`.
    #[error("`--model` and `--mapping` both name a mapping: give one of them")]
    TwoMappings,
    /// A regular expression that is none.
    #[error("`{option} {pattern}` is not a regular expression: {why}")]
    Pattern {
        /// The option that was given.
        option: &'static str,
        /// Its value.
        pattern: String,
        /// What the parser said, on one line.
        why: String,
    },
}

/// Parses a command line of the default command again, with the long options of its `-o` in it.
///
/// They go first, so that the same option on the command line comes later and wins.
///
/// # Errors
/// Where a word of `-o` is unknown, or clap refuses what it is worth.
pub fn with_mount_words(
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

/// The default command.
///
/// # Errors
/// Where options do not go together.
pub fn mount(args: MountArgs, words: MountWords) -> Result<MountRequest, UsageError> {
    let plan = plan(&args.view)?;
    Ok(MountRequest {
        // clap has seen to both.
        src: args.src.unwrap_or_default(),
        at: args.at.unwrap_or_default(),
        nonempty: words.nonempty,
        foreground: args.foreground,
        plan,
        engine: engine(&args.engine),
        kernel: kernel(&args.kernel, words),
        log: log(&args.log, LogLevel::Info),
    })
}

/// What the view is.
///
/// # Errors
/// Where options do not go together.
pub fn plan(args: &ViewArgs) -> Result<PlanOptions, UsageError> {
    let mapping = match (&args.mapping, args.model.as_str()) {
        (None, "auto") => MappingChoice::Auto,
        (None, name) => MappingChoice::Named(name.to_owned()),
        (Some(file), "auto") => MappingChoice::File(file.clone()),
        (Some(_), _) => return Err(UsageError::TwoMappings),
    };
    let quantize = match args.quantize {
        QuantizeChoice::None if args.scales_from.is_some() => {
            let needs = "--quantize checkpoint";
            return Err(UsageError::Needs { option: "--scales-from", needs });
        }
        QuantizeChoice::None => None,
        QuantizeChoice::Checkpoint if args.to.is_some_and(|to| to != LayoutChoice::Hf) => {
            return Err(UsageError::Needs { option: "--quantize checkpoint", needs: "--to hf" });
        }
        QuantizeChoice::Checkpoint => {
            let scales_from = args.scales_from.clone();
            Some(Quantize { scales_from, scale_dtype: args.scale_dtype })
        }
    };
    let expert_parallel = expert_parallel(args.ep_size, args.ep_rank)?;
    let expert_shard = expert_shard(args.ep_shard_size, args.ep_shard_rank)?;
    if args.shard_size == Size(0) {
        return Err(UsageError::Zero("--shard-size"));
    }
    Ok(PlanOptions {
        mapping,
        to: args.to,
        dtype: args.dtype,
        quantize,
        kv_scales: args.kv_scales,
        expert_parallel,
        expert_shard,
        include: patterns("--include", &args.include)?,
        exclude: patterns("--exclude", &args.exclude)?,
        allow_missing: patterns("--allow-missing", &args.allow_missing)?,
        unmapped: args.unmapped,
        shard_size: args.shard_size.0,
    })
}

fn expert_parallel(
    size: Option<u32>,
    rank: Option<u32>,
) -> Result<Option<ExpertParallel>, UsageError> {
    match (size, rank) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(UsageError::Needs { option: "--ep-rank", needs: "--ep-size" }),
        (Some(0), _) => Err(UsageError::Zero("--ep-size")),
        (Some(size), Some(rank)) if rank >= size => {
            Err(UsageError::Rank { option: "--ep-rank", size, rank })
        }
        (Some(size), rank) => Ok(Some(ExpertParallel { size, rank })),
    }
}

fn expert_shard(size: Option<u32>, rank: Option<u32>) -> Result<Option<ExpertShard>, UsageError> {
    let (size_option, rank_option) = ("--ep-shard-size", "--ep-shard-rank");
    match (size, rank) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(UsageError::Needs { option: rank_option, needs: size_option }),
        (Some(_), None) => Err(UsageError::Needs { option: size_option, needs: rank_option }),
        (Some(0), _) => Err(UsageError::Zero(size_option)),
        (Some(size), Some(rank)) if rank >= size => {
            Err(UsageError::Rank { option: rank_option, size, rank })
        }
        (Some(size), Some(rank)) => Ok(Some(ExpertShard { size, rank })),
    }
}

fn patterns(option: &'static str, patterns: &[String]) -> Result<Vec<Regex>, UsageError> {
    let compile = |pattern: &String| {
        // Alone first: a pattern that only parses inside the group would not mean what it says.
        Regex::new(pattern).and_then(|_| Regex::new(&format!("^(?:{pattern})"))).map_err(|error| {
            let why = error.to_string();
            let why = why.lines().last().unwrap_or_default();
            let why = why.strip_prefix("error: ").unwrap_or(why).to_owned();
            UsageError::Pattern { option, pattern: pattern.clone(), why }
        })
    };
    patterns.iter().map(compile).collect()
}

/// How the view is computed.
pub fn engine(args: &EngineArgs) -> EngineOptions {
    let cache_size = args.cache_size.map_or_else(|| default_cache(memory::limit()), |size| size.0);
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    EngineOptions { cache_size, threads: args.threads.map_or_else(cores, usize::from) }
}

/// 1 GiB, or a quarter of the memory where that is less.
fn default_cache(memory: Option<u64>) -> u64 {
    const MOST: u64 = 1 << 30;
    memory.map_or(MOST, |memory| MOST.min(memory / 4))
}

fn kernel(args: &KernelArgs, words: MountWords) -> KernelOptions {
    let acl = match (args.allow_other, args.allow_root || args.auto_unmount) {
        (true, _) => SessionACL::All,
        (false, true) => SessionACL::RootAndOwner,
        (false, false) => SessionACL::Owner,
    };
    let mut extra = words.kernel;
    if args.auto_unmount {
        extra.push(MountOption::AutoUnmount);
    }
    KernelOptions {
        read_ahead: args.read_ahead.0,
        direct_io: args.direct_io,
        acl,
        uid: args.uid.unwrap_or_else(|| nix::unistd::geteuid().as_raw()),
        gid: args.gid.unwrap_or_else(|| nix::unistd::getegid().as_raw()),
        file_mode: args.file_mode,
        dir_mode: args.dir_mode,
        fs_name: words.fs_name,
        extra,
    }
}

/// What is logged, `level` and above where nothing is said.
pub fn log(args: &LogArgs, level: LogLevel) -> LogOptions {
    let level = match args.log_level.unwrap_or(level) {
        LogLevel::Error => tracing::Level::ERROR,
        LogLevel::Warn => tracing::Level::WARN,
        LogLevel::Info => tracing::Level::INFO,
        LogLevel::Debug => tracing::Level::DEBUG,
        LogLevel::Trace => tracing::Level::TRACE,
    };
    let json = args.log_format == LogFormat::Json;
    LogOptions { level, file: args.log_file.clone(), json }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::choices::{FloatChoice, KvScalesChoice, ScaleFloatChoice, UnmappedChoice};
    use clap::Parser;
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
        let MountRequest { plan, engine, kernel, log, .. } = &request;
        assert_eq!((request.src.to_str(), request.at.to_str()), (Some("src"), Some("mnt")));
        assert!(!request.foreground && !request.nonempty);
        assert_eq!(plan.mapping, MappingChoice::Auto);
        assert_eq!((plan.to, plan.dtype), (None, FloatChoice::Bf16));
        assert_eq!((&plan.quantize, plan.kv_scales), (&None, KvScalesChoice::Fused));
        assert_eq!((plan.expert_parallel, plan.expert_shard), (None, None));
        assert_eq!((plan.include.len(), plan.exclude.len()), (0, 0));
        assert_eq!((plan.unmapped, plan.shard_size), (UnmappedChoice::Refuse, 5_000_000_000));
        assert_eq!(engine, &EngineOptions { cache_size: 1 << 30, threads: 3 });
        assert_eq!((kernel.read_ahead, kernel.direct_io), (4 << 20, false));
        assert_eq!((kernel.acl, kernel.extra.len()), (SessionACL::Owner, 0));
        assert_eq!((kernel.file_mode, kernel.dir_mode), (0o444, 0o555));
        assert_eq!((log.level, log.json), (tracing::Level::INFO, false));
    }

    #[test]
    fn a_quarter_of_little_memory_is_the_cache() {
        let table = [
            (None, 1 << 30),
            (Some(64 << 30), 1 << 30),
            (Some(4 << 30), 1 << 30),
            (Some(2 << 30), 512 << 20),
            (Some(0), 0),
        ];
        for (memory, cache) in table {
            assert_eq!(default_cache(memory), cache, "{memory:?}");
        }
    }

    #[test]
    fn every_option_arrives() {
        let line = "-f src mnt --to=hf --dtype f16 --quantize checkpoint --scales-from s \
                    --scale-dtype f16 --kv-scales automodel --ep-size 8 --ep-rank 7 --ep-shard-size 2 \
                    --ep-shard-rank 1 --include a --include b --exclude c --unmapped keep --shard-size \
                    1MiB --model m --read-ahead 0 --direct-io --allow-other --uid 5 --gid 6 --file-mode \
                    640 --dir-mode 0750 --log-level trace --log-file l --log-format json"
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        let request = request(&line).unwrap();
        let MountRequest { plan, kernel, log, .. } = &request;
        assert!(request.foreground);
        assert_eq!(plan.mapping, MappingChoice::Named("m".to_owned()));
        assert_eq!((plan.to, plan.dtype), (Some(LayoutChoice::Hf), FloatChoice::F16));
        let scales_from = Some(PathBuf::from("s"));
        let quantize = Quantize { scales_from, scale_dtype: ScaleFloatChoice::F16 };
        assert_eq!(plan.quantize, Some(quantize));
        assert_eq!(plan.kv_scales, KvScalesChoice::Automodel);
        assert_eq!(plan.expert_parallel, Some(ExpertParallel { size: 8, rank: Some(7) }));
        assert_eq!(plan.expert_shard, Some(ExpertShard { size: 2, rank: 1 }));
        assert_eq!((plan.include.len(), plan.exclude.len()), (2, 1));
        assert_eq!((plan.unmapped, plan.shard_size), (UnmappedChoice::Keep, 1 << 20));
        assert_eq!((kernel.read_ahead, kernel.direct_io), (0, true));
        assert_eq!((kernel.acl, kernel.uid, kernel.gid), (SessionACL::All, 5, 6));
        assert_eq!((kernel.file_mode, kernel.dir_mode), (0o640, 0o750));
        assert_eq!((log.level, log.json), (tracing::Level::TRACE, true));
        assert_eq!(log.file, Some(PathBuf::from("l")));
    }

    #[test]
    fn words_and_long_options_are_one_set() {
        let request =
            request("-o to=hf,dtype=f32,include=a --dtype f16 src mnt -o include=b,nonempty");
        let request = request.unwrap();
        assert_eq!(request.plan.to, Some(LayoutChoice::Hf));
        assert_eq!(request.plan.dtype, FloatChoice::F16, "the command line beats -o");
        let include: Vec<_> = request.plan.include.iter().map(Regex::as_str).collect();
        assert_eq!(include, ["^(?:a)", "^(?:b)"]);
        assert!(request.nonempty);
        assert_eq!((request.src.to_str(), request.at.to_str()), (Some("src"), Some("mnt")));
    }

    #[test]
    fn access_follows_the_options() {
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
            let kernel = request(line).unwrap().kernel;
            assert_eq!((kernel.acl, kernel.extra), (acl, extra), "{line}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let table = [
            ("src mnt --ep-rank 1", "`--ep-rank` needs `--ep-size`"),
            ("src mnt --ep-size 0", "`--ep-size` has to be at least 1"),
            ("src mnt --ep-size 8 --ep-rank 8", "`--ep-rank` has to be below 8, got 8"),
            ("src mnt --ep-shard-size 2", "`--ep-shard-size` needs `--ep-shard-rank`"),
            ("src mnt --ep-shard-rank 2", "`--ep-shard-rank` needs `--ep-shard-size`"),
            ("src mnt --scales-from x", "`--scales-from` needs `--quantize checkpoint`"),
            (
                "src mnt --quantize checkpoint --to native",
                "`--quantize checkpoint` needs `--to hf`",
            ),
            ("src mnt --model m --mapping f", "both name a mapping"),
            ("src mnt --shard-size 0", "`--shard-size` has to be at least 1"),
            ("src mnt --include (", "`--include (` is not a regular expression: unclosed group"),
            ("src mnt --exclude a)(b", "is not a regular expression"),
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
