//! Cuts grouped tensors for expert-parallel ranks.

use crate::plan::Fragment;
use crate::plan::arrange::ViewTensor;
use crate::plan::report::{Problem, Problems};

/// Distribution of the experts (axis 0 of grouped tensors) over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertParallel {
    /// Number of ranks.
    pub size: u64,
    /// The rank whose part is the root directory; `None`: one directory for each rank.
    pub rank: Option<u64>,
}

/// Distribution of axis 1 of every grouped tensor over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShard {
    /// Number of ranks.
    pub size: u64,
    /// The rank that is shown.
    pub rank: u64,
}

/// First expert and number of experts of a rank, for `experts` over `size` ranks.
///
/// The first `experts % size` ranks have one more than the others (Automodel's formula).
pub(super) fn experts_of(experts: u64, size: u64, rank: u64) -> (u64, u64) {
    let (each, more) = (experts / size, experts % size);
    if rank < more { (rank * (each + 1), each + 1) } else { (rank * each + more, each) }
}

/// Name of a rank's directory.
pub(super) fn directory_name(rank: u64, size: u64) -> String {
    format!("ep-{rank:04}-of-{size:04}")
}

/// A rank's experts of a grouped tensor.
pub(super) fn expert_slice(
    tensor: &ViewTensor,
    size: u64,
    rank: u64,
    problems: &mut Problems,
) -> ViewTensor {
    let (start, count) = experts_of(tensor.shape[0], size, rank);
    if count == 0 {
        let what = format!("{} experts over {size} ranks", tensor.shape[0]);
        problems.explain(Problem::Indivisible, &tensor.name, what);
    }
    cut(tensor, 0, start, count)
}

/// A rank's share of axis 1 of a grouped tensor, which must divide evenly.
pub(super) fn axis_shard(
    tensor: &ViewTensor,
    shard: ExpertShard,
    problems: &mut Problems,
) -> ViewTensor {
    let extent = tensor.shape.get(1).copied().unwrap_or(0);
    if extent == 0 || !extent.is_multiple_of(shard.size) {
        let what = format!("axis 1 of {:?} into {} parts", tensor.shape, shard.size);
        problems.explain(Problem::Indivisible, &tensor.name, what);
        return cut(tensor, 0, 0, 0);
    }
    let count = extent / shard.size;
    cut(tensor, 1, shard.rank * count, count)
}

/// The part `start..start + count` of an axis.
fn cut(tensor: &ViewTensor, axis: usize, start: u64, count: u64) -> ViewTensor {
    let mut origin = vec![0; tensor.shape.len()];
    let mut shape = tensor.shape.clone();
    origin[axis] = start;
    shape[axis] = count;
    let fragments = if count == 0 {
        Vec::new()
    } else {
        let slice = |f: &Fragment| {
            let map = f.map.within(&origin, &shape)?.relative_to(&origin);
            Some(Fragment { map, matrix: f.matrix })
        };
        tensor.fragments.iter().filter_map(slice).collect()
    };
    ViewTensor { name: tensor.name.clone(), shape, fragments, ..*tensor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ranks_hold_one_expert_more() {
        let shares = |n, size| (0..size).map(|r| experts_of(n, size, r)).collect::<Vec<_>>();
        assert_eq!(shares(10, 4), [(0, 3), (3, 3), (6, 2), (8, 2)]);
        assert_eq!(shares(8, 2), [(0, 4), (4, 4)]);
        assert_eq!(shares(1, 2), [(0, 1), (1, 0)]);
    }
}
