//! Shows a plan: as text, as JSON, and as the summary of a mount in one line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Value, json};

use crate::mapping::{LayoutName, ResolvedMapping};
use crate::plan::{
    Body, Computed, Directory, EncodedMatrix, Facet, Origin, Plan, ScaleReading, SourceRange,
    TensorPlan, Unmapped,
};
use crate::source::{Checkpoint, printable};
use crate::tensor::{ByteSize, Float};

/// The summary that a mount reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The mapping.
    pub model: String,
    /// Layout of the source.
    pub from: LayoutName,
    /// Layout of the view.
    pub to: LayoutName,
    /// Dtype of dequantized and grouped tensors in the view.
    pub dtype: Float,
    /// Number and bytes of the source's tensors.
    pub source: (u64, u64),
    /// Number and bytes of the tensors in the root directory.
    pub view: (u64, u64),
    /// Number and bytes of the verbatim tensors in the root directory.
    pub verbatim: (u64, u64),
    /// Number of expert-parallel directories besides the root.
    pub ranks: u64,
    /// How scales of fused shards are read, and the number of pairs with shared scales.
    pub fused_scales: Option<(ScaleReading, u64)>,
    /// Schemes and blocks of quantized matrices: `fp8 128x128`.
    pub encoded: BTreeSet<String>,
    /// Numbers of tensors that `drop` rules left out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// What was done with tensors that no rule names (`kept`, `dropped`), and their number.
    pub unmapped: Option<(&'static str, u64)>,
    /// Tensors and layers that are missing and that the user allowed to be.
    pub allowed_missing: Vec<String>,
    /// Optional layers that config.json names and the source does not have.
    pub absent_layers: BTreeSet<String>,
}

/// What a summary needs, apart from tensors and directories.
pub(in crate::plan) struct SummaryParts<'a> {
    pub mapping: &'a ResolvedMapping,
    pub from: LayoutName,
    pub to: LayoutName,
    pub dtype: Float,
    pub fused: Option<(ScaleReading, u64)>,
    pub quantized: &'a [EncodedMatrix],
    pub dropped: BTreeMap<String, u64>,
    pub unmapped: Option<(Unmapped, u64)>,
    pub allowed_missing: Vec<String>,
    pub absent_layers: BTreeSet<String>,
    pub checkpoint: &'a Checkpoint,
}

fn count<T>(items: impl Iterator<Item = T>) -> u64 {
    items.fold(0, |n, _| n + 1)
}

impl Summary {
    pub(in crate::plan) fn new(
        parts: SummaryParts<'_>,
        tensors: &[TensorPlan],
        directories: &[Directory],
    ) -> Summary {
        let root: Vec<&TensorPlan> = directories
            .first()
            .map(|d| d.tensors.iter().map(|id| &tensors[id.index()]).collect())
            .unwrap_or_default();
        let totals = |keep: &dyn Fn(&TensorPlan) -> bool| {
            let kept = root.iter().filter(|t| keep(t));
            (count(kept.clone()), kept.map(|t| t.bytes()).sum())
        };
        let source = parts.checkpoint.tensors();
        let unmapped = parts.unmapped.map(|(what, n)| {
            let what = match what {
                Unmapped::Refuse => "refused",
                Unmapped::Keep => "kept",
                Unmapped::Drop => "dropped",
            };
            (what, n)
        });
        let encoded = |q: &EncodedMatrix| {
            let [rows, cols] = q.block;
            format!("{} {rows}x{cols}", q.scheme.name())
        };
        Summary {
            encoded: parts.quantized.iter().map(encoded).collect(),
            model: parts.mapping.name.clone(),
            from: parts.from,
            to: parts.to,
            dtype: parts.dtype,
            source: (count(source.iter()), source.iter().map(|t| t.bytes).sum()),
            view: totals(&|_| true),
            verbatim: totals(&TensorPlan::is_verbatim),
            ranks: count(directories.iter().skip(1)),
            fused_scales: parts.fused,
            dropped: parts.dropped,
            unmapped,
            allowed_missing: parts.allowed_missing,
            absent_layers: parts.absent_layers,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { model, from, to, .. } = self;
        let (n, bytes) = self.view;
        write!(f, "{model}, {from} -> {to}: {n} tensors, {}", ByteSize(bytes))?;
        let (verbatim, verbatim_bytes) = self.verbatim;
        write!(f, " ({verbatim} verbatim, {})", ByteSize(verbatim_bytes))?;
        if self.ranks > 0 {
            write!(f, "; {} expert-parallel directories", self.ranks)?;
        }
        if let Some((reading, pairs)) = self.fused_scales {
            match reading {
                ScaleReading::Fused => {
                    let layers = if pairs == 1 { "layer" } else { "layers" };
                    write!(f, "; K/V scales fused in {pairs} {layers}")?;
                }
                ScaleReading::Automodel => write!(f, "; K/V scales read as Automodel does")?,
            }
        }
        for scheme in &self.encoded {
            write!(f, "; quantized as {scheme}")?;
        }
        for (reason, n) in &self.dropped {
            write!(f, "; {n} tensors left out: {reason}")?;
        }
        if let Some((what, n)) = self.unmapped {
            write!(f, "; {n} tensors without a rule {what}")?;
        }
        for layer in &self.absent_layers {
            write!(f, "; not in the source: `{layer}`, which config.json names")?;
        }
        if let Some(first) = self.allowed_missing.first() {
            let more = self.allowed_missing.len() - 1;
            write!(f, "; WARNING: missing and allowed to be: `{}`", printable(first))?;
            if more > 0 {
                write!(f, " and {more} more")?;
            }
        }
        Ok(())
    }
}

impl Plan {
    /// Where the bytes of a tensor come from, in a few words.
    fn how(&self, tensor: &TensorPlan) -> String {
        match &tensor.body {
            Body::Verbatim(runs) if runs.iter().any(|r| r.origin == Origin::Original) => {
                "the original's".to_owned()
            }
            Body::Verbatim(runs) if runs.len() == 1 => "verbatim".to_owned(),
            Body::Literal(_) => "constant".to_owned(),
            Body::Encoded(encoded) => {
                let q = self.quantized(encoded.quantized);
                let what = match encoded.facet {
                    Facet::Payload => "encoded as",
                    Facet::Scale => "scales of",
                };
                format!("{what} {:?} {}x{}", q.scheme.code(), q.block[0], q.block[1])
            }
            Body::Verbatim(runs) => format!("verbatim, {} runs", runs.len()),
            Body::Computed(computed) => {
                let mut kinds: Vec<String> = Vec::new();
                for f in &computed.fragments {
                    let m = self.matrix(f.matrix);
                    let kind = match &m.scales {
                        None if m.dtype == tensor.dtype => "copied".to_owned(),
                        None => format!("cast from {}", m.dtype),
                        Some(s) => {
                            format!("decoded from {:?} {}x{}", s.code(), s.block[0], s.block[1])
                        }
                    };
                    let last = f.map.source.last().and_then(|a| a.along);
                    let turned =
                        last.is_some() && f.map.target.last().and_then(|a| a.along) != last;
                    let kind = if turned { format!("{kind}, transposed") } else { kind };
                    if !kinds.contains(&kind) {
                        kinds.push(kind);
                    }
                }
                let n = computed.fragments.len();
                let fragments = if n == 1 { String::new() } else { format!(", {n} fragments") };
                format!("{}{fragments}", kinds.join("; "))
            }
        }
    }

    fn fragment_names(&self, computed: &Computed) -> Vec<&str> {
        computed.fragments.iter().map(|f| &*self.matrix(f.matrix).name).collect()
    }

    /// The names of the matrices that a tensor is copied or computed from, sorted.
    pub fn made_of(&self, tensor: &TensorPlan) -> Vec<&str> {
        let mut names: Vec<&str> = match &tensor.body {
            Body::Verbatim(runs) => {
                let of = |r: &SourceRange| match (r.origin, &self.original) {
                    (Origin::Original, Some(original)) => &*original.tensor(r.source).name,
                    (Origin::Source | Origin::Original, _) => {
                        let at = self.matrices.partition_point(|m| m.payload < r.source);
                        &*self.matrices[at].name
                    }
                };
                runs.iter().map(of).collect()
            }
            Body::Computed(c) => self.fragment_names(c),
            Body::Encoded(e) => {
                self.fragment_names(&self.quantized(e.quantized).members[e.member].values)
            }
            Body::Literal(_) => Vec::new(),
        };
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The plan as JSON: the summary, and every tensor of the root with its sources.
    pub fn to_json(&self) -> Value {
        let s = &self.summary;
        let tensors: Vec<Value> = self
            .root()
            .map(|t| {
                let names = self.made_of(t);
                json!({
                    "name": &*t.name,
                    "dtype": t.dtype.name(),
                    "shape": t.shape.dims(),
                    "bytes": t.bytes(),
                    "verbatim": t.is_verbatim(),
                    "from": names.first().unwrap_or(&""),
                    "sources": names.len(),
                    "how": self.how(t),
                })
            })
            .collect();
        let pair = |(n, bytes): (u64, u64)| json!({ "tensors": n, "bytes": bytes });
        json!({
            "model": s.model,
            "from": s.from,
            "to": s.to,
            "dtype": s.dtype.dtype().name(),
            "source": pair(s.source),
            "view": pair(s.view),
            "verbatim": pair(s.verbatim),
            "directories": self.directories.iter().map(|d| &d.name).collect::<Vec<_>>(),
            "kv_scales": s.fused_scales.map(|(reading, pairs)| json!({ "reading": reading, "fused_pairs": pairs })),
            "dropped": s.dropped,
            "missing": s.allowed_missing,
            "unmapped": s.unmapped.map(|(what, n)| json!({ "action": what, "tensors": n })),
            "tensors": tensors,
        })
    }

    fn root(&self) -> impl Iterator<Item = &TensorPlan> {
        self.directories
            .first()
            .into_iter()
            .flat_map(|d| d.tensors.iter().map(|id| self.tensor(*id)))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for t in self.root() {
            let names = self.made_of(t);
            let (first, n) = (names.first().unwrap_or(&""), names.len());
            let more = if n > 1 { format!(" and {} more", n - 1) } else { String::new() };
            let shape = t.shape.to_string();
            let (name, first) = (printable(&t.name), printable(first));
            writeln!(f, "{name} {} {shape}\n    {} <- {first}{more}", t.dtype, self.how(t))?;
        }
        write!(f, "{}", self.summary)
    }
}
