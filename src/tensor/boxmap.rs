//! Affine maps between a box of one tensor and a box of another.
//!
//! A [`BoxMap`] says which elements of a source tensor become which elements of a target tensor.
//! Every operation of a layout is a list of such maps: rename, stack, unstack, concatenate, split,
//! slice, interleave, transpose, the rotary permutation of rows. Maps can be inverted and composed,
//! so a chain of operations becomes one list of maps, and reading needs no tree of operations.

/// Index along one axis of a tensor, as a function of the iteration index `i`:
/// `start + step * i[along]`, or always `start` if `along` is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Axis {
    /// Index for iteration index 0, in elements.
    pub start: u64,
    /// Elements from one iteration to the next; 1 if `along` is `None`.
    pub step: u64,
    /// The iteration axis that this axis depends on.
    pub along: Option<u8>,
}

impl Axis {
    /// An axis with the constant index `start`.
    pub(crate) fn fixed(start: u64) -> Axis {
        Axis { start, step: 1, along: None }
    }

    fn at(self, i: u64) -> u64 {
        self.start + self.step * i
    }
}

/// A bijection between the elements of a box of a target and a box of a source.
///
/// For every iteration index `i` below `extent`, the target element with index
/// `target[a].start + target[a].step * i[target[a].along]` on each axis `a` is the source element
/// whose index `source` gives in the same way. Exactly one target axis and exactly one source axis
/// depend on each iteration axis, and each iteration axis has an extent above 1.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct BoxMap {
    /// The axes of the target.
    pub target: Vec<Axis>,
    /// The axes of the source.
    pub source: Vec<Axis>,
    /// Extents of the iteration axes.
    pub extent: Vec<u64>,
}

impl BoxMap {
    /// The identity map of a whole tensor with these extents.
    pub(crate) fn identity(dims: &[u64]) -> BoxMap {
        BoxMap::region(&vec![0; dims.len()], dims)
    }

    /// The identity map of the box at `start` with extents `extent`.
    ///
    /// # Panics
    /// If the ranks differ.
    pub(crate) fn region(start: &[u64], extent: &[u64]) -> BoxMap {
        assert_eq!(start.len(), extent.len(), "a box has one extent for each axis");
        let mut iteration = Vec::with_capacity(extent.len());
        let axes: Vec<Axis> = start
            .iter()
            .zip(extent)
            .map(|(&start, &n)| {
                if n == 1 {
                    return Axis::fixed(start);
                }
                iteration.push(n);
                Axis { start, step: 1, along: Some(iteration.len() as u8 - 1) }
            })
            .collect();
        BoxMap { target: axes.clone(), source: axes, extent: iteration }
    }

    /// Number of elements that the map covers.
    pub(crate) fn elements(&self) -> u64 {
        self.extent.iter().product()
    }

    fn extent_of(&self, axis: Axis) -> u64 {
        axis.along.map_or(1, |k| self.extent[usize::from(k)])
    }

    /// The map with source and target exchanged.
    pub(crate) fn inverse(self) -> BoxMap {
        BoxMap { target: self.source, source: self.target, extent: self.extent }
    }

    /// Composition, `self` after `inner`: maps elements of `inner`'s source to this map's target.
    ///
    /// The source of `self` and the target of `inner` are boxes of the same tensor. The result
    /// covers the elements that both boxes share; it is `None` if they share none.
    ///
    /// # Panics
    /// If the ranks of `self.source` and `inner.target` differ.
    pub(crate) fn after(&self, inner: &BoxMap) -> Option<BoxMap> {
        assert_eq!(self.source.len(), inner.target.len(), "maps of different ranks");
        let mut outer_iter = vec![Axis::fixed(0); self.extent.len()];
        let mut inner_iter = vec![Axis::fixed(0); inner.extent.len()];
        let mut extent = Vec::with_capacity(self.extent.len());
        for (&a, &b) in self.source.iter().zip(&inner.target) {
            let common =
                intersect(a.start, a.step, self.extent_of(a), b.start, b.step, inner.extent_of(b))?;
            let along = (common.count > 1).then(|| {
                extent.push(common.count);
                extent.len() as u8 - 1
            });
            let step = |s| if along.is_some() { s } else { 1 };
            if let Some(k) = a.along {
                outer_iter[usize::from(k)] =
                    Axis { start: common.a, step: step(common.a_step), along };
            }
            if let Some(k) = b.along {
                inner_iter[usize::from(k)] =
                    Axis { start: common.b, step: step(common.b_step), along };
            }
        }
        let substitute = |axes: &[Axis], iter: &[Axis]| {
            axes.iter()
                .map(|axis| match axis.along {
                    None => *axis,
                    Some(k) => {
                        let i = iter[usize::from(k)];
                        let step = if i.along.is_some() { axis.step * i.step } else { 1 };
                        Axis { start: axis.at(i.start), step, along: i.along }
                    }
                })
                .collect()
        };
        Some(BoxMap {
            target: substitute(&self.target, &outer_iter),
            source: substitute(&inner.source, &inner_iter),
            extent,
        })
    }

    /// The map restricted to targets in the box at `start` with extents `extent`; `None` if there
    /// are none.
    pub(crate) fn within(&self, start: &[u64], extent: &[u64]) -> Option<BoxMap> {
        BoxMap::region(start, extent).after(self)
    }

    /// Subtracts `origin` from the target's indices: turns a map into a tensor into a map into the
    /// slice of that tensor that starts at `origin`.
    ///
    /// # Panics
    /// If a target index is below `origin`.
    pub(crate) fn relative_to(mut self, origin: &[u64]) -> BoxMap {
        for (axis, &o) in self.target.iter_mut().zip(origin) {
            axis.start = axis.start.checked_sub(o).expect("the target starts at or after origin");
        }
        self
    }

    /// Whether two maps have a common target element.
    pub(crate) fn overlaps(&self, other: &BoxMap) -> bool {
        self.target.iter().zip(&other.target).all(|(&a, &b)| {
            intersect(a.start, a.step, self.extent_of(a), b.start, b.step, other.extent_of(b))
                .is_some()
        })
    }

    /// First and last index on a target axis, both inclusive.
    pub(crate) fn target_span(&self, axis: usize) -> (u64, u64) {
        let a = self.target[axis];
        (a.start, a.at(self.extent_of(a) - 1))
    }

    /// Appends `next` to the end of `self` along one iteration axis if together they are one affine
    /// map; otherwise returns `next` unchanged.
    fn join(&mut self, next: BoxMap) -> Result<(), BoxMap> {
        match self.joined(&next) {
            Some(joined) => {
                *self = joined;
                Ok(())
            }
            None => Err(next),
        }
    }

    fn joined(&self, next: &BoxMap) -> Option<BoxMap> {
        // The one axis on which `b` starts after `a`; `None` if they differ on several.
        let only_shifted_axis = |a: &[Axis], b: &[Axis]| {
            let mut shifted = (0..a.len()).filter(|&i| a[i].start != b[i].start);
            let axis = shifted.next()?;
            (shifted.next().is_none() && a[axis].start < b[axis].start).then_some(axis)
        };
        let t = only_shifted_axis(&self.target, &next.target)?;
        let s = only_shifted_axis(&self.source, &next.source)?;
        let (grow, other) = (self.target[t], next.target[t]);
        // In both maps, the shifted axes of target and source must depend on one iteration axis.
        let along_of = |m: &BoxMap| match (m.target[t].along, m.source[s].along) {
            (None, None) => Some(None),
            (Some(a), Some(b)) if a == b => Some(Some(a)),
            _ => None,
        };
        let (mine, theirs) = (along_of(self)?, along_of(next)?);
        let n = self.extent_of(grow);
        let (t_step, s_step) = match mine.map(|_| self).or(theirs.map(|_| next)) {
            Some(m) => (m.target[t].step, m.source[s].step),
            None => (other.start - grow.start, next.source[s].start - self.source[s].start),
        };
        if other.start != grow.start + n * t_step
            || next.source[s].start != self.source[s].start + n * s_step
        {
            return None;
        }
        let canonical = |m: &BoxMap, k: Option<u8>| {
            let mut m = m.clone();
            let k = k.unwrap_or_else(|| {
                m.extent.push(1);
                m.extent.len() as u8 - 1
            });
            m.target[t] = Axis { start: 0, step: t_step, along: Some(k) };
            m.source[s] = Axis { start: 0, step: s_step, along: Some(k) };
            m.renumbered()
        };
        let (mut a, b) = (canonical(self, mine), canonical(next, theirs));
        let k = usize::from(a.target[t].along.expect("just set"));
        let other_n = b.extent[usize::from(b.target[t].along.expect("just set"))];
        let mut resized = b;
        resized.extent[k] = a.extent[k];
        let same = (mine.is_none() || self.target[t].step == t_step)
            && (theirs.is_none() || next.target[t].step == t_step)
            && (theirs.is_none() || next.source[s].step == s_step)
            && resized == a;
        if !same {
            return None;
        }
        a.extent[k] += other_n;
        a.target[t].start = grow.start;
        a.source[s].start = self.source[s].start;
        Some(a)
    }

    /// The same map with its iteration axes numbered in the order of the target axes.
    fn renumbered(&self) -> BoxMap {
        let mut order = vec![None; self.extent.len()];
        let mut extent = Vec::with_capacity(self.extent.len());
        for axis in &self.target {
            if let Some(k) = axis.along {
                order[usize::from(k)] = Some(extent.len() as u8);
                extent.push(self.extent[usize::from(k)]);
            }
        }
        let rename = |axes: &[Axis]| {
            axes.iter()
                .map(|a| Axis { along: a.along.and_then(|k| order[usize::from(k)]), ..*a })
                .collect()
        };
        BoxMap { target: rename(&self.target), source: rename(&self.source), extent }
    }
}

/// Joins neighbouring maps, axis by axis, into as few as that gives. The result covers the same
/// pairs of elements and is sorted by target.
///
/// `S` identifies the source tensor of a map; only maps of the same source are joined.
pub(crate) fn coalesce<S: PartialEq>(mut maps: Vec<(S, BoxMap)>) -> Vec<(S, BoxMap)> {
    let rank = maps.first().map_or(0, |(_, m)| m.target.len());
    // Innermost axis first: elements become rows, rows become planes, planes become volumes.
    for axis in (0..rank).rev() {
        let before = maps.len();
        maps.sort_by_cached_key(|(_, m)| {
            let mut starts: Vec<u64> = m.target.iter().map(|a| a.start).collect();
            let last = starts.remove(axis);
            starts.push(last);
            starts
        });
        let mut joined: Vec<(S, BoxMap)> = Vec::with_capacity(before);
        for (source, map) in maps {
            match joined.last_mut() {
                Some((s, m)) if *s == source => {
                    if let Err(map) = m.join(map) {
                        joined.push((source, map));
                    }
                }
                _ => joined.push((source, map)),
            }
        }
        maps = joined;
    }
    maps.sort_by_cached_key(|(_, m)| m.target.iter().map(|a| a.start).collect::<Vec<_>>());
    maps
}

/// Common members of two arithmetic progressions `a` and `b`. Number `n` of them, for `n < count`,
/// is member `a + a_step * n` of the first and member `b + b_step * n` of the second.
struct Intersection {
    a: u64,
    a_step: u64,
    b: u64,
    b_step: u64,
    count: u64,
}

/// Intersects the progressions `a0 + a_step * i` for `i < an` and `b0 + b_step * j` for `j < bn`.
fn intersect(a0: u64, a_step: u64, an: u64, b0: u64, b_step: u64, bn: u64) -> Option<Intersection> {
    if an == 0 || bn == 0 {
        return None;
    }
    let (a0, sa, an) = (i128::from(a0), i128::from(a_step), i128::from(an));
    let (b0, sb, bn) = (i128::from(b0), i128::from(b_step), i128::from(bn));
    let (g, x, _) = extended_gcd(sa, sb);
    let gap = b0 - a0;
    if gap % g != 0 {
        return None;
    }
    // i = x * gap / g is one solution of sa * i = gap (mod sb); solutions repeat every sb / g.
    let (i_step, j_step) = (sb / g, sa / g);
    let mut i = ((x % i_step) * ((gap / g) % i_step)).rem_euclid(i_step);
    let mut j = (a0 + sa * i - b0) / sb;
    if j < 0 {
        let skip = (-j + j_step - 1) / j_step;
        i += skip * i_step;
        j += skip * j_step;
    }
    if i >= an || j >= bn {
        return None;
    }
    let count = ((an - 1 - i) / i_step).min((bn - 1 - j) / j_step) + 1;
    let narrow = |v: i128| u64::try_from(v).expect("bounded by the extents, which are u64");
    Some(Intersection {
        a: narrow(i),
        a_step: narrow(i_step),
        b: narrow(j),
        b_step: narrow(j_step),
        count: narrow(count),
    })
}

/// `(g, x, y)` with `a * x + b * y = g`, the greatest common divisor.
fn extended_gcd(a: i128, b: i128) -> (i128, i128, i128) {
    if b == 0 {
        return (a, 1, 0);
    }
    let (g, x, y) = extended_gcd(b, a % b);
    (g, y, x - (a / b) * y)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// The map as an explicit list: target index -> source index of each element.
    fn pairs(map: &BoxMap) -> BTreeMap<Vec<u64>, Vec<u64>> {
        let mut out = BTreeMap::new();
        for n in 0..map.elements() {
            let mut rest = n;
            let mut i = vec![0; map.extent.len()];
            for k in (0..i.len()).rev() {
                i[k] = rest % map.extent[k];
                rest /= map.extent[k];
            }
            let at = |axes: &[Axis]| {
                axes.iter().map(|a| a.along.map_or(a.start, |k| a.at(i[usize::from(k)]))).collect()
            };
            assert!(out.insert(at(&map.target), at(&map.source)).is_none(), "not injective");
        }
        out
    }

    fn any_map(rank: usize) -> impl Strategy<Value = BoxMap> {
        let axes = proptest::collection::vec((0u64..6, 1u64..4, 1u64..6, 0u64..6, 1u64..4), rank);
        (axes, any::<u64>()).prop_map(move |(axes, seed)| {
            let mut extent = Vec::new();
            let (mut target, mut source) = (Vec::new(), Vec::new());
            for (t0, ts, n, s0, ss) in axes {
                if n == 1 {
                    target.push(Axis::fixed(t0));
                    source.push(Axis::fixed(s0));
                } else {
                    extent.push(n);
                    let along = Some(extent.len() as u8 - 1);
                    target.push(Axis { start: t0, step: ts, along });
                    source.push(Axis { start: s0, step: ss, along });
                }
            }
            let shift = if rank == 0 { 0 } else { (seed % rank as u64) as usize };
            source.rotate_left(shift);
            BoxMap { target, source, extent }
        })
    }

    proptest! {
        #[test]
        fn composition_composes_the_pairs(outer in any_map(3), inner in any_map(3)) {
            let (o, i) = (pairs(&outer), pairs(&inner));
            let expected: BTreeMap<_, _> =
                o.iter().filter_map(|(t, l)| Some((t.clone(), i.get(l)?.clone()))).collect();
            let got = outer.after(&inner).map(|m| pairs(&m)).unwrap_or_default();
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn inverse_swaps_the_pairs(map in any_map(3)) {
            let swapped: BTreeMap<_, _> =
                pairs(&map).into_iter().map(|(t, s)| (s, t)).collect();
            prop_assert_eq!(pairs(&map.inverse()), swapped);
        }

        #[test]
        fn maps_overlap_if_they_share_a_target(a in any_map(2), b in any_map(2)) {
            let (pa, pb) = (pairs(&a), pairs(&b));
            prop_assert_eq!(a.overlaps(&b), pa.keys().any(|t| pb.contains_key(t)));
        }

        #[test]
        fn coalescing_keeps_every_pair(
            map in any_map(3),
            cuts in proptest::collection::vec((0usize..3, 0u64..16), 0..5),
        ) {
            let mut parts = vec![map.clone()];
            for (axis, at) in cuts {
                parts = parts
                    .iter()
                    .flat_map(|m| {
                        let mut low = vec![64; 3];
                        low[axis] = at;
                        let mut start = vec![0; 3];
                        start[axis] = at;
                        [(at > 0).then(|| m.within(&[0; 3], &low)).flatten(), m.within(&start, &[64; 3])]
                    })
                    .flatten()
                    .collect();
            }
            let joined = coalesce(parts.into_iter().map(|m| ((), m)).collect());
            let mut all = BTreeMap::new();
            for (_, m) in &joined {
                for (t, s) in pairs(m) {
                    prop_assert!(all.insert(t, s).is_none());
                }
            }
            prop_assert_eq!(all, pairs(&map));
        }
    }

    #[test]
    fn stack_then_unstack_is_one_map() {
        // Four [3, 5] matrices are transposed, stacked into [4, 5, 3], and taken apart again.
        let stacked: Vec<BoxMap> = (0..4)
            .map(|e| BoxMap {
                target: vec![
                    Axis::fixed(e),
                    Axis { start: 0, step: 1, along: Some(0) },
                    Axis { start: 0, step: 1, along: Some(1) },
                ],
                source: vec![
                    Axis { start: 0, step: 1, along: Some(1) },
                    Axis { start: 0, step: 1, along: Some(0) },
                ],
                extent: vec![5, 3],
            })
            .collect();
        let whole: Vec<((), BoxMap)> = stacked
            .iter()
            .map(|m| ((), m.after(&m.clone().inverse()).expect("the same matrix")))
            .collect();
        assert_eq!(coalesce(whole), [((), BoxMap::identity(&[4, 5, 3]))]);
    }

    #[test]
    fn disjoint_boxes_do_not_overlap() {
        let low = BoxMap::region(&[0, 0], &[2, 4]);
        let high = BoxMap::region(&[2, 0], &[2, 4]);
        assert!(low.after(&high).is_none());
        assert!(!low.overlaps(&high));
    }
}
