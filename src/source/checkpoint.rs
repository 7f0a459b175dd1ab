//! Opening a checkpoint: which files are shards, and whether together they are one checkpoint.
//!
//! The shards are those that `model.safetensors.index.json` names; without an index
//! `model.safetensors`; without that all `*.safetensors` of the directory, where numbered names
//! (`model-00001-of-00004.safetensors`) must be complete. With an index:
//!
//! - other safetensors files of the directory are not part of the checkpoint;
//! - a tensor is the copy in the shard that `weight_map` names, whatever other shards hold: an
//!   overlay file replaces tensors in that way;
//! - a tensor that the index lists and its shard lacks is refused, even where another shard has it;
//! - a tensor that the index does not list is ignored, with a warning.
//!
//! Without an index a tensor in two shards is refused: which one a loader takes depends on its
//! order. Shards of torch.distributed.checkpoint are different: each process writes the part of a
//! tensor that it holds, and says where that part lies.
//!
//! NeMo Automodel saves a model in such shards, with config.json in `.hf_metadata`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::config::Config;
use super::error::{Misplaced, ShardError, ShardFailure, SourceError, StoredTwice, counted};
use super::files::{CONFIG, HostFile, SAVED, host_files};
use super::hub::partial_downloads;
use super::index::{INDEX, Index};
use super::several::Several;
use super::shard::{LFS_SIGNATURE, Shard, is_partial, link_target};
use crate::tensor::{DType, Shape};

/// File name of a checkpoint that is one shard.
const SINGLE: &str = "model.safetensors";

/// Largest index that is read, in bytes; that of 207,000 tensors has 25 million.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// Largest config.json that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 64 << 20;

/// Position of a tensor in [`Checkpoint::tensors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId(pub u32);

impl SourceId {
    /// The id of the tensor at position `i`; `None` beyond 2^32.
    pub fn new(i: usize) -> Option<SourceId> {
        u32::try_from(i).ok().map(SourceId)
    }

    /// The position as an index into a slice.
    pub fn index(self) -> usize {
        usize::try_from(self.0).expect("positions in memory are below 2^64")
    }
}

/// Position of a shard in [`Checkpoint::shards`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ShardId(pub u32);

impl ShardId {
    fn index(self) -> usize {
        usize::try_from(self.0).expect("positions in memory are below 2^64")
    }
}

/// A tensor of the checkpoint and where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTensor {
    /// Name in the checkpoint.
    pub name: Box<str>,
    /// Stored element type.
    pub dtype: DType,
    /// Stored shape; its bytes in `dtype` are `bytes`.
    pub shape: Shape,
    /// The shard that holds it.
    pub(crate) shard: ShardId,
    /// Offset of its first byte from the start of the shard, in bytes.
    pub(crate) offset: u64,
    /// Its size in bytes.
    pub(crate) bytes: u64,
    /// Where it lies within a tensor that is cut over several shards; `None`: it is the whole.
    pub(crate) piece_at: Option<Box<[u64]>>,
}

/// A checkpoint directory, opened and checked.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    tensors: Vec<SourceTensor>,
    host_files: Vec<HostFile>,
}

impl Checkpoint {
    /// Opens the checkpoint directory `dir`, reading every header but no tensor.
    ///
    /// # Errors
    /// Whatever keeps the directory from being a whole and unambiguous checkpoint.
    pub fn open(dir: &Path) -> Result<Checkpoint, SourceError> {
        let dir = directory(dir)?;
        // Where config.json and the files that go with it are.
        let mut beside = dir.clone();
        let mut raw = read_whole(&dir.join(CONFIG), MAX_CONFIG_BYTES)?;
        if raw.is_none() {
            beside = dir.join(SAVED);
            raw = read_whole(&beside.join(CONFIG), MAX_CONFIG_BYTES)?;
        }
        let Some(raw) = raw else {
            return Err(SourceError::NoConfig { within: save_below(&dir), dir });
        };
        let path = beside.join(CONFIG);
        let config = Config::parse(raw).map_err(|source| SourceError::Json { path, source })?;

        let path = dir.join(INDEX);
        let text = read_whole(&path, MAX_INDEX_BYTES)?;
        let index = text.as_deref().map(|text| Index::parse(&path, text)).transpose()?;
        let names = match &index {
            Some(index) => index.files.iter().map(|name| name.to_string()).collect(),
            None => unindexed_shards(&dir)?,
        };
        let (shards, stored) = open_shards(&dir, &names, index.is_some())?;
        let tensors = match &index {
            Some(index) => listed(&path, index, &shards, stored)?,
            None => without_index(&dir, &shards, stored)?,
        };
        let host_files = host_files(&beside)?;
        Ok(Checkpoint { dir, config, shards, tensors, host_files })
    }

    /// The directory, absolute, links resolved.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tensors, sorted by name, pieces of one tensor by their shards; a [`SourceId`] is a
    /// position here.
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// The tensor of an id.
    pub(crate) fn tensor(&self, id: SourceId) -> &SourceTensor {
        &self.tensors[id.index()]
    }

    /// The tensor that is called `name`, or a piece of it.
    pub(crate) fn find(&self, name: &str) -> Option<SourceId> {
        let i = self.tensors.binary_search_by(|t| (*t.name).cmp(name)).ok()?;
        SourceId::new(i)
    }

    /// The shards, sorted by name; a [`ShardId`] is a position here.
    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The shard of an id.
    pub(crate) fn shard(&self, id: ShardId) -> &Shard {
        &self.shards[id.index()]
    }

    /// The files that a view passes through, sorted by name.
    pub(crate) fn host_files(&self) -> &[HostFile] {
        &self.host_files
    }
}

/// A checkpoint within a directory of a training run.
fn save_below(dir: &Path) -> Option<PathBuf> {
    let places = ["consolidated", "model/consolidated", "model"];
    let is_one =
        |place: &PathBuf| place.join(CONFIG).is_file() || place.join(SAVED).join(CONFIG).is_file();
    places.iter().map(|place| dir.join(place)).find(is_one)
}

fn directory(dir: &Path) -> Result<PathBuf, SourceError> {
    let path = || dir.to_owned();
    match fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(SourceError::NotADirectory { path: path() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(SourceError::NoDirectory { path: path() });
        }
        Err(source) => return Err(SourceError::Read { path: path(), source }),
    }
    fs::canonicalize(dir).map_err(|source| SourceError::Read { path: path(), source })
}

/// The bytes of a JSON file; `None` where it is absent.
fn read_whole(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, SourceError> {
    let failed = |source| SourceError::Read { path: path.to_owned(), source };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return match link_target(path) {
                None => Ok(None),
                Some(target) => {
                    let (path, partial) = (path.to_owned(), is_partial(&target));
                    Err(SourceError::Dangling { path, target, partial })
                }
            };
        }
        Err(e) => return Err(failed(e)),
    };
    if !metadata.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    if metadata.len() > limit {
        let (path, actual) = (path.to_owned(), metadata.len());
        return Err(SourceError::TooLarge { path, limit, actual });
    }
    let bytes = fs::read(path).map_err(failed)?;
    if bytes.starts_with(LFS_SIGNATURE) {
        return Err(SourceError::LfsPointer { path: path.to_owned() });
    }
    Ok(Some(bytes))
}

/// Names of the shards of a directory without an index, sorted.
fn unindexed_shards(dir: &Path) -> Result<Vec<String>, SourceError> {
    let failed = |source| SourceError::Read { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        // A name that is not UTF-8 is no name that anything published has.
        let Ok(name) = entry.map_err(failed)?.file_name().into_string() else { continue };
        if name.ends_with(".safetensors") && !name.starts_with('.') {
            names.push(name);
        }
    }
    if names.iter().any(|name| name == SINGLE) {
        return Ok(vec![SINGLE.to_owned()]);
    }
    if names.is_empty() {
        let partial = partial_downloads(dir);
        return Err(SourceError::NoShards { dir: dir.to_owned(), partial });
    }
    let numbered: Vec<String> = names.iter().filter_map(|name| siblings(name)).flatten().collect();
    names.extend(numbered);
    names.sort();
    names.dedup();
    Ok(names)
}

/// All names of the series that `name` is one of, such as `model-00002-of-00004.safetensors`.
fn siblings(name: &str) -> Option<impl Iterator<Item = String>> {
    let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let five_digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    // A process of torch.distributed.checkpoint writes the files that it has something for.
    if prefix.strip_prefix("shard-").and_then(|rest| rest.get(..5)).is_some_and(five_digits) {
        return None;
    }
    if !five_digits(number) || !five_digits(total) || number == "00000" {
        return None;
    }
    let count: u32 = total.parse().ok()?;
    let (prefix, total) = (prefix.to_owned(), total.to_owned());
    Some((1..=count).map(move |n| format!("{prefix}-{n:05}-of-{total}.safetensors")))
}

type Opened = Result<(Shard, Vec<SourceTensor>), ShardError>;

/// Opens all shards; gives their tensors sorted by name, those of one name by their shard.
fn open_shards(
    dir: &Path,
    names: &[String],
    indexed: bool,
) -> Result<(Vec<Shard>, Vec<SourceTensor>), SourceError> {
    let mut shards = Vec::with_capacity(names.len());
    let mut parts = Vec::with_capacity(names.len());
    let mut failures = Several::default();
    for (opened, name) in open_all(dir, names).into_iter().zip(names) {
        match opened {
            Ok((shard, tensors)) => {
                shards.push(shard);
                parts.push(tensors);
            }
            Err(error) => failures.extend([ShardFailure { name: name.clone(), error }]),
        }
    }
    if !failures.is_empty() {
        let other = if indexed { whole_series(dir, names) } else { None };
        let (dir, partial) = (dir.to_owned(), partial_downloads(dir));
        return Err(SourceError::Shards { dir, total: names.len(), failures, partial, other });
    }
    let mut tensors = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    parts.into_iter().for_each(|part| tensors.extend(part));
    if u32::try_from(tensors.len()).is_err() {
        let (dir, count) = (dir.to_owned(), tensors.len());
        return Err(SourceError::TooManyTensors { dir, count });
    }
    // The parts are sorted: a stable sort finds the runs and merges them.
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((shards, tensors))
}

/// A shard of a series that is complete by its names, `model-{n}-of-00004.safetensors`, although an
/// index names others.
fn whole_series(dir: &Path, listed: &[String]) -> Option<String> {
    let there: BTreeSet<String> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !listed.contains(name))
        .collect();
    let whole = |name: &&String| {
        siblings(name).is_some_and(|mut all| all.all(|sibling| there.contains(&sibling)))
    };
    there.iter().find(whole).cloned()
}

/// The tensors as they are, where those of one name are pieces of one tensor.
fn without_index(
    dir: &Path,
    shards: &[Shard],
    tensors: Vec<SourceTensor>,
) -> Result<Vec<SourceTensor>, SourceError> {
    let twice: Several<StoredTwice> = tensors
        .windows(2)
        .filter(|pair| pair[0].name == pair[1].name)
        .filter(|pair| pair.iter().any(|tensor| tensor.piece_at.is_none()))
        .map(|pair| StoredTwice {
            tensor: pair[0].name.to_string(),
            shards: [0, 1].map(|i| shards[pair[i].shard.index()].name().to_owned()),
        })
        .collect();
    if twice.is_empty() {
        Ok(tensors)
    } else {
        Err(SourceError::StoredTwice { dir: dir.to_owned(), tensors: twice })
    }
}

/// Opens the shards on some threads; the results are in the order of `names`.
fn open_all(dir: &Path, names: &[String]) -> Vec<Opened> {
    // More than there are cores: on a cold disk each of them waits for its header.
    let threads = thread::available_parallelism().map_or(4, usize::from).clamp(4, 16);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(name) = names.get(i) else { return done };
            let id = ShardId(u32::try_from(i).expect("an index names fewer than 2^32 files"));
            done.push((i, Shard::open(dir, name, id)));
        }
    };
    let mut done: Vec<(usize, Opened)> = thread::scope(|scope| {
        let workers: Vec<_> = (1..threads.min(names.len())).map(|_| scope.spawn(work)).collect();
        let mut done = work();
        for worker in workers {
            done.extend(worker.join().expect("opening a shard does not panic"));
        }
        done
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, opened)| opened).collect()
}

/// The stored tensors that the index at `path` lists, each from the shard that it names.
fn listed(
    path: &Path,
    index: &Index<'_>,
    shards: &[Shard],
    stored: Vec<SourceTensor>,
) -> Result<Vec<SourceTensor>, SourceError> {
    let name_of = |id: ShardId| shards[id.index()].name().to_owned();
    let mut tensors: Vec<SourceTensor> = Vec::with_capacity(index.tensors.len());
    let mut missing = Several::default();
    let mut unlisted = Several::default();
    let mut listed = index.tensors.iter().peekable();
    let mut copies = stored.into_iter().peekable();
    while let Some(first) = copies.peek().map(|t| t.name.clone()) {
        while let Some((name, file)) = listed.next_if(|(name, _)| **name < *first) {
            missing.extend([Misplaced::new(name, shards[*file].name(), None)]);
        }
        let wanted = listed.next_if(|(name, _)| **name == *first);
        let mut elsewhere = None;
        let mut found = false;
        while let Some(copy) = copies.next_if(|t| t.name == first) {
            match wanted {
                None => unlisted.extend([format!("`{first}` in `{}`", name_of(copy.shard))]),
                Some((_, file)) if *file == copy.shard.index() => {
                    found = true;
                    tensors.push(copy);
                }
                Some(_) => elsewhere = Some(name_of(copy.shard)),
            }
        }
        if let (Some((name, file)), false) = (wanted, found) {
            missing.extend([Misplaced::new(name, shards[*file].name(), elsewhere)]);
        }
    }
    missing.extend(listed.map(|(name, file)| Misplaced::new(name, shards[*file].name(), None)));
    if !missing.is_empty() {
        return Err(SourceError::MissingTensors { index: path.to_owned(), tensors: missing });
    }
    if !unlisted.is_empty() {
        let n = counted(unlisted.count, "tensor");
        tracing::warn!("`{}` does not list {n}, ignored: {unlisted}", path.display());
    }
    Ok(tensors)
}
