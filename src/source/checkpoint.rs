//! Opens a checkpoint directory: finds its shards and checks that together they are one complete,
//! unambiguous checkpoint.
//!
//! The shards are the files that `model.safetensors.index.json` names; without an index, the file
//! `model.safetensors`; without that, all `*.safetensors` files of the directory. In the last case
//! numbered names (`model-00001-of-00004.safetensors`) must be complete.
//!
//! With an index:
//!
//! - safetensors files that it does not name are not part of the checkpoint;
//! - a tensor is taken from the shard that `weight_map` names, even if other shards also have it.
//!   Overlay files replace tensors in this way;
//! - a tensor that is listed but not in its shard is an error, even if another shard has it;
//! - a tensor that is in a shard but not listed is ignored with a warning.
//!
//! Without an index, a tensor in two shards is an error, because loaders differ in which one they
//! take. The exception are shards of torch.distributed.checkpoint: there each process writes its
//! piece of a tensor and says where in the tensor the piece belongs. NeMo Automodel saves models in
//! such shards and puts config.json into the subdirectory `.hf_metadata`.

use rayon::ThreadPoolBuilder;
use rayon::iter::{IndexedParallelIterator, IntoParallelRefIterator, ParallelIterator};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::config::Config;
use super::error::{
    DuplicateTensor, MissingTensor, ShardError, ShardFailure, SourceError, counted,
};
use super::files::{AUTOMODEL_METADATA_DIR, CONFIG, HostFile, host_files};
use super::first_few::FirstFew;
use super::hub::partial_downloads;
use super::index::{INDEX, Index};
use super::shard::{LFS_SIGNATURE, Shard, is_partial, link_target};
use crate::tensor::{DType, Shape};

/// File name of the shard of a checkpoint with a single shard.
const SINGLE_SHARD: &str = "model.safetensors";

/// Largest index that is read, in bytes. An index of 207,000 tensors has 25 million.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// Largest config.json that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 64 << 20;

/// Position of a tensor in [`Checkpoint::tensors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId(pub u32);

impl SourceId {
    /// The id of the tensor at position `i`; `None` if `i` is 2^32 or more.
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

/// A tensor of the checkpoint, and where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTensor {
    /// Name in the checkpoint.
    pub name: Box<str>,
    /// Stored element type.
    pub dtype: DType,
    /// Stored shape. Shape and dtype give the size `bytes`.
    pub shape: Shape,
    /// The shard that contains it.
    pub(crate) shard: ShardId,
    /// Offset of its first byte from the start of the shard, in bytes.
    pub(crate) offset: u64,
    /// Its size in bytes.
    pub(crate) bytes: u64,
    /// For a piece of a tensor that several shards hold: index of its first element in the whole
    /// tensor. `None` for a whole tensor.
    pub(crate) piece_at: Option<Box<[u64]>>,
}

/// An opened checkpoint directory: config.json, the checked headers of all shards, and the open
/// shards.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    tensors: Vec<SourceTensor>,
    host_files: Vec<HostFile>,
}

impl Checkpoint {
    /// Opens the checkpoint directory `dir`. Reads all headers, but no tensor data.
    ///
    /// # Errors
    /// If the directory is not a complete and unambiguous checkpoint.
    pub fn open(dir: &Path) -> Result<Checkpoint, SourceError> {
        let dir = directory(dir)?;
        // The directory of config.json and the tokenizer.
        let mut config_dir = dir.clone();
        let mut raw = read_json_file(&dir.join(CONFIG), MAX_CONFIG_BYTES)?;
        if raw.is_none() {
            config_dir = dir.join(AUTOMODEL_METADATA_DIR);
            raw = read_json_file(&config_dir.join(CONFIG), MAX_CONFIG_BYTES)?;
        }
        let Some(raw) = raw else {
            return Err(SourceError::NoConfig { within: find_nested_checkpoint(&dir), dir });
        };
        let path = config_dir.join(CONFIG);
        let config = Config::parse(raw).map_err(|source| SourceError::Json { path, source })?;

        let path = dir.join(INDEX);
        let text = read_json_file(&path, MAX_INDEX_BYTES)?;
        let index = text.as_deref().map(|text| Index::parse(&path, text)).transpose()?;
        let names = match &index {
            Some(index) => index.files.iter().map(|name| name.to_string()).collect(),
            None => shards_without_index(&dir)?,
        };
        let (shards, tensors) = open_shards(&dir, &names, index.is_some())?;
        let tensors = match &index {
            Some(index) => select_listed(&path, index, &shards, tensors)?,
            None => reject_duplicates(&dir, &shards, tensors)?,
        };
        let host_files = host_files(&config_dir)?;
        Ok(Checkpoint { dir, config, shards, tensors, host_files })
    }

    /// The checkpoint directory: absolute, symlinks resolved.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The parsed config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tensors, sorted by name; pieces of the same tensor are sorted by their shards. A
    /// `SourceId` is a position in this list.
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// The tensor with this id.
    pub(crate) fn tensor(&self, id: SourceId) -> &SourceTensor {
        &self.tensors[id.index()]
    }

    /// The id of the tensor `name`, or of one of its pieces; `None` if there is no such tensor.
    pub(crate) fn find(&self, name: &str) -> Option<SourceId> {
        let i = self.tensors.binary_search_by(|t| (*t.name).cmp(name)).ok()?;
        SourceId::new(i)
    }

    /// The shards, sorted by name. A [`ShardId`] is a position in this list.
    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The shard with this id.
    pub(crate) fn shard(&self, id: ShardId) -> &Shard {
        &self.shards[id.index()]
    }

    /// The files beside the shards that a view passes through, sorted by name.
    pub(crate) fn host_files(&self) -> &[HostFile] {
        &self.host_files
    }
}

/// The checkpoint in the output directory of a training run, for a hint in the error message.
fn find_nested_checkpoint(dir: &Path) -> Option<PathBuf> {
    let places = ["consolidated", "model/consolidated", "model"];
    let has_config = |place: &PathBuf| {
        place.join(CONFIG).is_file() || place.join(AUTOMODEL_METADATA_DIR).join(CONFIG).is_file()
    };
    places.iter().map(|place| dir.join(place)).find(has_config)
}

/// The real path of the directory `dir`.
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

/// The contents of a JSON file of at most `limit` bytes; `None` if there is no such file.
fn read_json_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, SourceError> {
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

/// Names of the shards of a directory without an index, sorted. Adds the missing names of a
/// numbered series, so that opening them fails.
fn shards_without_index(dir: &Path) -> Result<Vec<String>, SourceError> {
    let failed = |source| SourceError::Read { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        // Published checkpoints have no names that are not UTF-8.
        let Ok(name) = entry.map_err(failed)?.file_name().into_string() else { continue };
        if name.ends_with(".safetensors") && !name.starts_with('.') {
            names.push(name);
        }
    }
    if names.iter().any(|name| name == SINGLE_SHARD) {
        return Ok(vec![SINGLE_SHARD.to_owned()]);
    }
    if names.is_empty() {
        let partial = partial_downloads(dir);
        return Err(SourceError::NoShards { dir: dir.to_owned(), partial });
    }
    let numbered: Vec<String> =
        names.iter().filter_map(|name| numbered_series(name)).flatten().collect();
    names.extend(numbered);
    names.sort();
    names.dedup();
    Ok(names)
}

/// All names of the numbered series that `name` belongs to: for `model-00002-of-00004.safetensors`,
/// the names with numbers 1 to 4. `None` if the name has no such number.
fn numbered_series(name: &str) -> Option<impl Iterator<Item = String>> {
    let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let five_digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    // Processes of torch.distributed.checkpoint write no file where they have no data, so their
    // series (`shard-00001-model-00002-of-00004.safetensors`) need not be complete.
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

type OpenResult = Result<(Shard, Vec<SourceTensor>), ShardError>;

/// Opens all shards. Returns them with their tensors, sorted by name and then by shard.
fn open_shards(
    dir: &Path,
    names: &[String],
    indexed: bool,
) -> Result<(Vec<Shard>, Vec<SourceTensor>), SourceError> {
    let mut shards = Vec::with_capacity(names.len());
    let mut parts = Vec::with_capacity(names.len());
    let mut failures = FirstFew::default();
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
        let other = if indexed { other_complete_series(dir, names) } else { None };
        let (dir, partial) = (dir.to_owned(), partial_downloads(dir));
        return Err(SourceError::Shards { dir, total: names.len(), failures, partial, other });
    }
    let mut tensors = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    parts.into_iter().for_each(|part| tensors.extend(part));
    if u32::try_from(tensors.len()).is_err() {
        let (dir, count) = (dir.to_owned(), tensors.len());
        return Err(SourceError::TooManyTensors { dir, count });
    }
    // The tensors of each shard are sorted already: the stable sort only merges them.
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((shards, tensors))
}

/// A shard of a complete numbered series that the index does not name: a sign that the index is out
/// of date.
fn other_complete_series(dir: &Path, listed: &[String]) -> Option<String> {
    let there: BTreeSet<String> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !listed.contains(name))
        .collect();
    let whole = |name: &&String| {
        numbered_series(name).is_some_and(|mut all| all.all(|sibling| there.contains(&sibling)))
    };
    there.iter().find(whole).cloned()
}

/// Returns the tensors unchanged. Fails if two of them share a name and are not pieces of one
/// tensor.
fn reject_duplicates(
    dir: &Path,
    shards: &[Shard],
    tensors: Vec<SourceTensor>,
) -> Result<Vec<SourceTensor>, SourceError> {
    let twice: FirstFew<DuplicateTensor> = tensors
        .windows(2)
        .filter(|pair| pair[0].name == pair[1].name)
        .filter(|pair| pair.iter().any(|tensor| tensor.piece_at.is_none()))
        .map(|pair| DuplicateTensor {
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

/// Opens the shards on 4 to 16 threads; the results are in the order of `names`.
fn open_all(dir: &Path, names: &[String]) -> Vec<OpenResult> {
    // At least 4, also on fewer cores: with a cold page cache the threads wait for the disk.
    let threads = std::thread::available_parallelism().map_or(4, usize::from).clamp(4, 16);
    let open = |(i, name): (usize, &String)| {
        let id = ShardId(u32::try_from(i).expect("an index names fewer than 2^32 files"));
        Shard::open(dir, name, id)
    };
    match ThreadPoolBuilder::new().num_threads(threads.min(names.len())).build() {
        Ok(pool) => pool.install(|| names.par_iter().enumerate().map(open).collect()),
        // The process may have no more threads.
        Err(_) => names.iter().enumerate().map(open).collect(),
    }
}

/// The tensors that the index at `path` lists, each from the shard that the index names.
/// `in_shards` is sorted by name.
fn select_listed(
    path: &Path,
    index: &Index<'_>,
    shards: &[Shard],
    in_shards: Vec<SourceTensor>,
) -> Result<Vec<SourceTensor>, SourceError> {
    let name_of = |id: ShardId| shards[id.index()].name().to_owned();
    let mut tensors: Vec<SourceTensor> = Vec::with_capacity(index.tensors.len());
    let mut missing = FirstFew::default();
    let mut unlisted = FirstFew::default();
    let mut listed = index.tensors.iter().peekable();
    let mut copies = in_shards.into_iter().peekable();
    while let Some(first) = copies.peek().map(|t| t.name.clone()) {
        while let Some((name, file)) = listed.next_if(|(name, _)| **name < *first) {
            missing.extend([MissingTensor::new(name, shards[*file].name(), None)]);
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
            missing.extend([MissingTensor::new(name, shards[*file].name(), elsewhere)]);
        }
    }
    missing.extend(listed.map(|(name, file)| MissingTensor::new(name, shards[*file].name(), None)));
    if !missing.is_empty() {
        return Err(SourceError::MissingTensors { index: path.to_owned(), tensors: missing });
    }
    if !unlisted.is_empty() {
        let n = counted(unlisted.count, "tensor");
        tracing::warn!("`{}` does not list {n}, ignored: {unlisted}", path.display());
    }
    Ok(tensors)
}
