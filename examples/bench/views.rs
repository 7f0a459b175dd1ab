//! The rows that measure mounts: relative to the null file system, relative to ordinary files, and
//! absolute numbers.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::checkpoints::{Family, HOST_FILE, sparse_kimi};
use super::mounts::{Mount, Server};
use super::readers::{forget, mapped, pread, shards, warm};
use super::table::{Row, Value, compare};

/// The settings of a run.
pub struct Bench<'a> {
    pub data: &'a Path,
    pub rounds: usize,
    pub python: Option<&'a Path>,
}

/// A row: its name, its baseline, and the function that measures it.
type Entry<'a> = (String, &'static str, Box<dyn Fn() -> Result<Value> + 'a>);

const DIRECT: &[&str] = &["--direct-io"];

impl Bench<'_> {
    /// Measures the rows for which `wanted` is true, and prints each of them.
    pub fn run(&self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        for (name, against, measure) in self.entries() {
            if wanted(&name) {
                let value = measure()?;
                println!("{}", Row { name, against, value }.markdown());
            }
        }
        Ok(())
    }

    fn entries(&self) -> Vec<Entry<'_>> {
        const NULL: &str = "null file system";
        let mut entries: Vec<Entry<'_>> = Vec::new();
        let mut add = |name: String, against, measure: Box<dyn Fn() -> Result<Value>>| {
            entries.push((name, against, measure));
        };
        for family in Family::ALL {
            let at_least = if family == Family::Qwen { 0.9 } else { 0.75 };
            let name = format!("cold mapped copy: {}", family.name());
            add(name, NULL, Box::new(move || self.cold(family, &[], at_least)));
        }
        for family in Family::ALL {
            let name = format!("cold pread 8 MiB x2, --direct-io: {}", family.name());
            add(name, NULL, Box::new(move || self.cold(family, DIRECT, 0.5)));
        }
        for (reader, read) in [
            ("mapped copy", mapped as fn(&[PathBuf]) -> Result<u64>),
            ("pread 8 MiB", |paths| pread(paths, 1)),
        ] {
            let name = format!("warm read, {reader}");
            add(name, "native page cache", Box::new(move || self.warm(read)));
        }
        add("host file, as root".to_owned(), "native", Box::new(|| self.host_file()));
        add(
            "whole native view by Python safetensors".to_owned(),
            "Automodel's `from_hf`",
            Box::new(|| self.automodel()),
        );
        for (how, options) in [("mapped copy", &[][..]), ("pread 8 MiB x2, --direct-io", DIRECT)] {
            for family in [Family::Mimo, Family::DeepSeek, Family::Kimi] {
                let at_least = if family == Family::Mimo { 1.5 } else { 2.5 };
                let name = format!("cold disk, {how}: {}", family.name());
                let against = "converted BF16 file, cold disk";
                add(name, against, Box::new(move || self.disk(family, options, at_least)));
            }
        }
        add("mount of Kimi's 208,215 tensors".to_owned(), "", Box::new(|| self.mount_time()));
        add("memory of that mount".to_owned(), "", Box::new(|| self.mount_memory()));
        for (how, options) in [("its directory", true), ("slices of the whole", false)] {
            let name = format!("source bytes of a rank of 8 to its share, {how}");
            add(name, "", Box::new(move || self.rank(options)));
        }
        add("4 KiB at a random offset".to_owned(), "", Box::new(|| self.random()));
        for (how, options) in [("", &[][..]), (", --direct-io", DIRECT)] {
            let name = format!("anonymous memory above --cache-size, 8 readers{how}");
            add(name, "", Box::new(move || self.memory(options)));
        }
        entries
    }

    fn mount(&self, server: Server, source: &Path, options: &[&str]) -> Result<Mount> {
        let at = match server {
            Server::MountCkpt => "mnt-view",
            Server::Null => "mnt-null",
        };
        Mount::new(server, source, &self.data.join(at), options)
    }

    /// The checkpoint of a family, after all its bytes were read into the page cache.
    fn warm_source(&self, family: Family) -> Result<PathBuf> {
        let source = family.checkpoint(self.data)?;
        warm(&shards(&source)?)?;
        Ok(source)
    }

    /// A view and the null file system, read with nothing of them in the page cache. The source is
    /// in the page cache.
    fn cold(&self, family: Family, options: &[&str], at_least: f64) -> Result<Value> {
        let source = self.warm_source(family)?;
        let view = self.mount(Server::MountCkpt, &source, options)?;
        let null = self.mount(Server::Null, &source, options)?;
        let read = |mount: &Mount| {
            let shards = shards(mount.at())?;
            forget(&shards)?;
            read_once(options, &shards)
        };
        let rates = compare(self.rounds, || read(&view), || read(&null))?;
        Ok(Value::Ratio { rates, at_least })
    }

    /// A view and the checkpoint itself, which is as large, read from the page cache.
    fn warm(&self, read: impl Fn(&[PathBuf]) -> Result<u64>) -> Result<Value> {
        let source = self.warm_source(Family::Qwen)?;
        let view = self.mount(Server::MountCkpt, &source, &[])?;
        let (shown, stored) = (shards(view.at())?, shards(&source)?);
        let rates = compare(self.rounds, || read(&shown), || read(&stored))?;
        Ok(Value::Ratio { rates, at_least: 0.9 })
    }

    fn host_file(&self) -> Result<Value> {
        let source = Family::Mimo.checkpoint(self.data)?;
        let view = self.mount(Server::MountCkpt, &source, &[])?;
        let [shown, stored] = [view.at(), &source].map(|dir| [dir.join(HOST_FILE)]);
        let rates = compare(self.rounds, || pread(&shown, 1), || pread(&stored, 1))?;
        Ok(Value::Ratio { rates, at_least: 0.95 })
    }

    fn automodel(&self) -> Result<Value> {
        let Some(python) = self.python else {
            let why = "needs --python: torch, safetensors and nemo-automodel 0.7.0";
            return Ok(Value::Missing(why.to_owned()));
        };
        let source = self.warm_source(Family::Mimo)?;
        let view = self.mount(Server::MountCkpt, &source, &[])?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/bench/automodel.py");
        let output = Command::new(python)
            .args([&script, &source, view.at()])
            .arg(self.rounds.to_string())
            .output()
            .with_context(|| format!("cannot run `{}`", python.display()))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`{}`: {stderr}", script.display());
        let rates: Vec<[f64; 2]> = serde_json::from_slice(&output.stdout)?;
        let rates = rates.iter().map(|pair| pair.map(|rate| rate / 1e9)).collect();
        Ok(Value::Ratio { rates, at_least: 20.0 })
    }

    /// A view and a copy of the view on the same disk, read by the same reader. Neither the view
    /// nor its source nor the copy is in the page cache.
    fn disk(&self, family: Family, options: &[&str], at_least: f64) -> Result<Value> {
        let source = family.checkpoint(self.data)?;
        let view = self.mount(Server::MountCkpt, &source, options)?;
        let (shown, stored) = (shards(view.at())?, shards(&source)?);
        let converted = self.data.join("converted");
        fs::create_dir_all(&converted)?;
        let copies: Vec<PathBuf> =
            (0..shown.len()).map(|i| converted.join(i.to_string())).collect();
        for (from, to) in shown.iter().zip(&copies) {
            fs::copy(from, to)?;
            File::open(to)?.sync_all()?;
        }
        let cold = |files: &[PathBuf], read: &[PathBuf]| {
            forget(files)?;
            read_once(options, read)
        };
        let all = [shown.clone(), stored].concat();
        let rates = compare(self.rounds, || cold(&all, &shown), || cold(&copies, &copies));
        fs::remove_dir_all(&converted)?;
        Ok(Value::Ratio { rates: rates?, at_least })
    }

    fn mount_time(&self) -> Result<Value> {
        let source = sparse_kimi(self.data)?;
        let took = || Ok(self.mount(Server::MountCkpt, &source, &[])?.took.as_secs_f64());
        let measured: Vec<f64> = (0..=self.rounds).map(|_| took()).collect::<Result<_>>()?;
        Ok(Value::Number { measured: measured[1..].to_vec(), at_most: 1.0, unit: "s" })
    }

    fn mount_memory(&self) -> Result<Value> {
        let mount = self.mount(Server::MountCkpt, &sparse_kimi(self.data)?, &[])?;
        let measured = vec![mebibytes(mount.memory("VmRSS")?)];
        Ok(Value::Number { measured, at_most: 250.0, unit: "MiB" })
    }

    /// Bytes that the process reads from the source while one of 8 ranks reads its experts, divided
    /// by the payload bytes of these experts. The rank reads its own directory, or slices of the
    /// tensors of all experts.
    fn rank(&self, directory: bool) -> Result<Value> {
        const RANKS: u64 = 8;
        let family = Family::Mimo;
        let source = self.warm_source(family)?;
        let mut measured = Vec::new();
        for _ in 0..self.rounds {
            let options: &[&str] = if directory { &["--ep-size", "8"] } else { &[] };
            let mount = self.mount(Server::MountCkpt, &source, options)?;
            // Of 42 experts, ranks 0 and 1 have 6 and the others 5.
            let (rank, experts) = (4, 5);
            let before = mount.counter("source_bytes")?;
            if directory {
                mapped(&shards(&mount.at().join(format!("ep-{rank:04}-of-{RANKS:04}")))?)?;
            } else {
                let first = rank * (family.experts() / RANKS) + family.experts() % RANKS;
                read_slices(&shards(mount.at())?, first, experts)?;
            }
            let source_bytes = mount.counter("source_bytes")? - before;
            let share = experts * family.stored_expert_bytes();
            measured.push(source_bytes as f64 / share as f64);
        }
        Ok(Value::Number { measured, at_most: 1.1, unit: "times" })
    }

    /// Milliseconds for a read of one page of which nothing is cached.
    fn random(&self) -> Result<Value> {
        const READS: u64 = 200;
        let source = self.warm_source(Family::Mimo)?;
        let view = self.mount(Server::MountCkpt, &source, &[])?;
        let shown = shards(view.at())?;
        let file = File::open(&shown[0])?;
        let pages = file.metadata()?.len() / 4096;
        let mut page = [0; 4096];
        let mut measured = Vec::new();
        for i in 1..=READS {
            // Multiples of an odd number modulo the number of pages: far apart from each other.
            let at = i * ((pages * 618 / 1000) | 1) % pages * 4096;
            let start = Instant::now();
            file.read_exact_at(&mut page, at)?;
            measured.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(Value::Number { measured, at_most: 1.5, unit: "ms" })
    }

    /// The largest amount of anonymous memory of the process while 8 threads read a view to its
    /// end.
    fn memory(&self, options: &[&str]) -> Result<Value> {
        const CACHE: u64 = 256 << 20;
        let source = self.warm_source(Family::Mimo)?;
        let options = [&["--cache-size", "256MiB"], options].concat();
        let view = self.mount(Server::MountCkpt, &source, &options)?;
        let done = AtomicBool::new(false);
        let shards = shards(view.at())?;
        let most = thread::scope(|scope| -> Result<u64> {
            let watch = scope.spawn(|| -> Result<u64> {
                let mut most = 0;
                while !done.load(Ordering::Relaxed) {
                    most = most.max(view.memory("RssAnon")?);
                    thread::sleep(Duration::from_millis(10));
                }
                Ok(most)
            });
            let read = pread(&shards, 8);
            done.store(true, Ordering::Relaxed);
            let most = watch.join().expect("no panic")?;
            read.map(|_| most)
        })?;
        let measured = vec![mebibytes(most) - mebibytes(CACHE)];
        Ok(Value::Number { measured, at_most: 128.0, unit: "MiB" })
    }
}

/// Reads files: with `--direct-io` by two threads with `pread`, otherwise through a memory map.
fn read_once(options: &[&str], paths: &[PathBuf]) -> Result<u64> {
    if options == DIRECT { pread(paths, 2) } else { mapped(paths) }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Reads experts `first..first + count` of every stacked tensor of some shards, through a memory
/// map.
fn read_slices(paths: &[PathBuf], first: u64, count: u64) -> Result<()> {
    for path in paths {
        let file = File::open(path)?;
        // SAFETY: the files are the bench's own, and nothing changes them while it runs.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        let tensors = safetensors::SafeTensors::deserialize(&map)?;
        for (_, tensor) in tensors.iter().filter(|(_, t)| t.shape().len() == 3) {
            let each = tensor.data().len() / tensor.shape()[0];
            let (first, count) = (usize::try_from(first)?, usize::try_from(count)?);
            let mut buffer = vec![1; 8 << 20];
            for piece in tensor.data()[first * each..][..count * each].chunks(8 << 20) {
                std::hint::black_box(&mut buffer)[..piece.len()].copy_from_slice(piece);
            }
        }
    }
    Ok(())
}
