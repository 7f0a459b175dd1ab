//! After any single change of a golden checkpoint, opening it gives an error message, or a view
//! whose tensors can be read or give an error. It never panics.

mod common;

use common::toy::Toy;
use mount_ckpt::{ExpertParallel, LayoutName, PlanOptions, Quantize, TensorId};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::RngSeed;
use safetensors::Dtype;

const FAMILIES: [&str; 5] =
    ["mimo-v2-flash", "deepseek-v4-flash", "deepseek-v4-base", "kimi-k25-vl", "qwen3-vl-moe"];

#[derive(Clone, Debug)]
enum Change {
    Drop,
    /// Replaces a part of the name.
    Rename(&'static str, &'static str),
    /// Adds a copy under another name.
    Copy(&'static str, &'static str),
    Reshape(Vec<usize>),
    /// Changes the shape along one axis.
    Axis(AxisChange, Index),
    Retype(Dtype),
    /// Replaces an integer of config.json.
    Config(Index, u64),
}

#[derive(Clone, Copy, Debug)]
enum AxisChange {
    Swap,
    More,
    Less,
    Empty,
    Insert,
    Flatten,
    None,
}

fn any_dtype() -> impl Strategy<Value = Dtype> {
    use Dtype::*;
    select(vec![
        BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, I16, U16, F16, BF16, I32,
        U32, F32, C64, F64, I64, U64,
    ])
}

fn any_change() -> impl Strategy<Value = Change> {
    let renames = vec![
        (".1.", ".2."),
        (".0.", ".1."),
        (".2.", ".9"),
        ("weight", "bias"),
        ("model", "models"),
        ("mtp.0.", "layers.3."),
        ("_scale_inv", ""),
        ("_packed", ""),
        ("scale", "weight"),
        ("gate", "up"),
        ("k_proj", "v_proj"),
        ("experts", "expert"),
    ];
    let axis = select(vec![
        AxisChange::Swap,
        AxisChange::More,
        AxisChange::Less,
        AxisChange::Empty,
        AxisChange::Insert,
        AxisChange::Flatten,
        AxisChange::None,
    ]);
    let number = prop_oneof![0_u64..6, select(vec![127_u64, 1 << 32, 1 << 60, u64::MAX])];
    prop_oneof![
        2 => Just(Change::Drop),
        3 => select(renames.clone()).prop_map(|(a, b)| Change::Rename(a, b)),
        2 => select(renames).prop_map(|(a, b)| Change::Copy(a, b)),
        2 => prop::collection::vec(0_usize..40, 0..5).prop_map(Change::Reshape),
        6 => (axis, any::<Index>()).prop_map(|(a, i)| Change::Axis(a, i)),
        5 => any_dtype().prop_map(Change::Retype),
        2 => (any::<Index>(), number).prop_map(|(i, n)| Change::Config(i, n)),
    ]
}

fn changed_shape(mut shape: Vec<usize>, change: AxisChange, at: Index) -> Vec<usize> {
    let axes = shape.len();
    let axis = if axes == 0 { 0 } else { at.index(axes) };
    match change {
        AxisChange::Insert => shape.insert(axis, 1),
        AxisChange::Flatten => shape = vec![shape.iter().product()],
        AxisChange::None => shape.clear(),
        _ if axes == 0 => {}
        AxisChange::Swap => shape.swap(axis, axes - 1),
        AxisChange::More => shape[axis] += 1,
        AxisChange::Less => shape[axis] -= shape[axis].min(1),
        AxisChange::Empty => shape[axis] = 0,
    }
    shape
}

/// Dotted keys of all integers of config.json.
fn integers(value: &serde_json::Value, key: &str, out: &mut Vec<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        if value.is_u64() {
            out.push(key);
        } else {
            integers(value, &key, out);
        }
    }
}

fn apply(toy: &mut Toy, which: Index, change: Change) {
    let name = toy.tensors.keys().nth(which.index(toy.tensors.len())).unwrap().clone();
    let tensor = toy.tensor(&name).clone();
    // safetensors cannot store tensors that do not end at a byte boundary.
    let whole = |dtype: Dtype, shape: &[usize]| {
        (shape.iter().product::<usize>() * dtype.bitsize()).is_multiple_of(8)
    };
    match change {
        Change::Drop => {
            toy.tensors.remove(&name);
        }
        Change::Rename(from, to) => {
            toy.tensors.remove(&name);
            toy.tensors.insert(name.replace(from, to), tensor);
        }
        Change::Copy(from, to) => {
            toy.tensors.insert(name.replace(from, to), tensor);
        }
        Change::Reshape(shape) => {
            toy.reshape(&name, &shape);
        }
        Change::Axis(change, at) => {
            toy.reshape(&name, &changed_shape(tensor.shape, change, at));
        }
        Change::Retype(dtype) => {
            if whole(dtype, &tensor.shape) {
                toy.retype(&name, dtype);
            }
        }
        Change::Config(at, n) => {
            let mut keys = Vec::new();
            integers(&toy.config, "", &mut keys);
            toy.set(&keys[at.index(keys.len())], n);
        }
    }
}

/// Opens an engine, and reads all tensors.
fn read_all(toy: &Toy, options: &PlanOptions) {
    match toy.mount(options, |_| {}) {
        Ok(mounted) => {
            let plan = mounted.engine.plan();
            for id in (0..).map(TensorId).take(plan.tensors.len()) {
                let bytes = usize::try_from(plan.tensor(id).bytes()).unwrap();
                // An error is allowed, a panic is not.
                let _ = mounted.engine.read(id, 0, &mut vec![0; bytes]);
            }
            let _ = plan.to_string();
        }
        Err(message) => assert!(!message.is_empty() && message.len() < 5000, "{message}"),
    }
}

/// The same 96 changes in every run. `MUTATIONS=N` tries N random ones instead.
fn config() -> ProptestConfig {
    let others = std::env::var("MUTATIONS").ok().and_then(|n| n.parse().ok());
    let rng_seed = if others.is_some() { RngSeed::Random } else { RngSeed::Fixed(1) };
    let cases = others.unwrap_or(96);
    ProptestConfig { failure_persistence: None, cases, rng_seed, ..Default::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn one_change_of_a_checkpoint_never_panics(
        family in select(FAMILIES.to_vec()),
        which in any::<Index>(),
        change in any_change(),
        to in select(vec![LayoutName::Hf, LayoutName::Native, LayoutName::Transformers]),
        ranks in prop::option::weighted(0.2, 1_u64..4),
    ) {
        let mut toy = Toy::golden(family);
        apply(&mut toy, which, change);
        let expert_parallel = ranks.map(|size| ExpertParallel { size, rank: None });
        read_all(&toy, &PlanOptions { to: Some(to), expert_parallel, ..PlanOptions::default() });
    }

    #[test]
    fn one_change_of_a_native_checkpoint_never_panics(
        family in select(FAMILIES.to_vec()),
        which in any::<Index>(),
        change in any_change(),
        quantize in any::<bool>(),
    ) {
        let mut toy = Toy::native(family);
        apply(&mut toy, which, change);
        let quantize = quantize.then(Quantize::default);
        read_all(&toy, &PlanOptions { quantize, ..PlanOptions::default() });
    }
}
