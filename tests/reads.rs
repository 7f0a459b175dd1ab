//! Any split of a read gives the same bytes, whatever is in the cache.

mod common;

use std::sync::Arc;

use common::golden;
use mount_ckpt::{
    Checkpoint, Engine, EngineOptions, LayoutName, Mapping, Plan, PlanOptions, Quantize, TensorId,
};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Folder of `tests/golden`, mapping, and whether the view is quantized.
const VIEWS: [(&str, &str, bool); 6] = [
    ("mimo-v2-flash", "mimo-v2-flash", false),
    ("mimo-v2-flash", "mimo-v2-flash", true),
    ("deepseek-v4-flash", "deepseek-v4", false),
    ("deepseek-v4-flash", "deepseek-v4", true),
    ("kimi-k25-vl", "kimi-k25-vl", false),
    ("kimi-k25-vl", "kimi-k25-vl", true),
];

fn engine((folder, model, quantized): (&str, &str, bool), cache: EngineOptions) -> Engine {
    let checkpoint = Arc::new(Checkpoint::open(&golden(folder).join("checkpoint")).unwrap());
    let mapping = Mapping::named(model).unwrap();
    let options = PlanOptions {
        to: quantized.then_some(LayoutName::Hf),
        quantize: quantized.then(Quantize::default),
        ..PlanOptions::default()
    };
    let plan = Plan::build(&checkpoint, &mapping, &options).unwrap();
    Engine::new(checkpoint, Arc::new(plan), cache)
}

fn whole(engine: &Engine, id: TensorId) -> Vec<u8> {
    let bytes = engine.plan().tensor(id).bytes();
    let mut out = vec![0; usize::try_from(bytes).unwrap()];
    engine.read(id, 0, &mut out).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..Default::default() })]
    #[test]
    fn any_split_of_a_read_gives_the_same_bytes(
        view in select(&VIEWS[..]),
        tensor in any::<Index>(),
        cuts in proptest::collection::vec(any::<Index>(), 0..12),
        backwards in any::<bool>(),
        cache_bytes in select(&[0u64, 100_000, 1 << 30][..]),
        direct_io in any::<bool>(),
    ) {
        let kept = EngineOptions { cache_bytes: 1 << 30, direct_io: true, threads: 2 };
        let reference = engine(view, kept);
        let n = reference.plan().tensors.len();
        let id = TensorId(u32::try_from(tensor.index(n)).unwrap());
        let expected = whole(&reference, id);

        let split = engine(view, EngineOptions { cache_bytes, direct_io, threads: 2 });
        let mut edges: Vec<usize> = cuts.iter().map(|i| i.index(expected.len() + 1)).collect();
        edges.extend([0, expected.len()]);
        edges.sort_unstable();
        let mut pieces: Vec<_> = edges.windows(2).map(|w| w[0]..w[1]).collect();
        if backwards {
            pieces.reverse();
        }
        let mut got = vec![0; expected.len()];
        for piece in pieces {
            let at = u64::try_from(piece.start).unwrap();
            split.read(id, at, &mut got[piece]).unwrap();
        }
        prop_assert!(got == expected, "`{}`", reference.plan().tensor(id).name);
    }
}

#[test]
fn a_read_beyond_the_end_is_refused() {
    let engine = engine(VIEWS[0], EngineOptions { cache_bytes: 0, direct_io: false, threads: 2 });
    let bytes = engine.plan().tensor(TensorId(0)).bytes();
    let error = engine.read(TensorId(0), bytes - 1, &mut [0; 2]).unwrap_err().to_string();
    assert!(error.contains(&format!("cannot read 2 bytes at {}", bytes - 1)), "{error}");
    assert!(engine.read(TensorId(0), u64::MAX, &mut [0; 2]).is_err());
    assert_eq!(engine.counters().errors, 2);
}
