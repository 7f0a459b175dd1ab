//! Large sequential reads: decoded in place, from cached source rows, and with prefetch. They must
//! give the same bytes as small reads in reverse order, which use none of these.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;

use common::{Tensor, write_checkpoint};
use mount_ckpt::{Engine, EngineOptions, Mapping, PlanOptions, TensorId};
use safetensors::Dtype;
use serde_json::{Value, json};

/// Sizes of a checkpoint's experts.
#[derive(Clone, Copy)]
struct Size {
    experts: usize,
    hidden: usize,
    intermediate: usize,
}

/// More experts than a reader must have read before the next ones are prefetched. The sizes are not
/// multiples of a block of 128, and rows are not multiples of a page in any dtype.
const MANY: Size = Size { experts: 12, hidden: 544, intermediate: 512 };

/// Experts that are larger than the limit for leading columns, 8 MiB.
const LARGE: Size = Size { experts: 2, hidden: 1120, intermediate: 2560 };

/// A family: config.json, names of gate, up and down, and the stored tensors of each: suffix,
/// dtype, and how many columns and rows of the matrix one element covers.
struct Family {
    model: &'static str,
    config: Value,
    experts: &'static str,
    names: [&'static str; 3],
    parts: &'static [(&'static str, Dtype, [usize; 2])],
}

fn families(size: Size) -> [Family; 3] {
    let Size { experts, hidden, intermediate } = size;
    let text = json!({
        "model_type": "kimi_k2", "num_hidden_layers": 1, "n_routed_experts": experts,
        "hidden_size": hidden, "moe_intermediate_size": intermediate,
    });
    [
        Family {
            model: "mimo-v2-flash",
            config: json!({
                "model_type": "mimo_v2_flash", "num_hidden_layers": 1, "hidden_size": hidden,
                "moe_intermediate_size": intermediate, "n_routed_experts": experts,
                "num_key_value_heads": 4,
                "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            }),
            experts: "model.layers.0.mlp.experts",
            names: ["gate_proj", "up_proj", "down_proj"],
            parts: &[
                (".weight", Dtype::F8_E4M3, [1, 1]),
                (".weight_scale_inv", Dtype::F32, [128, 128]),
            ],
        },
        Family {
            model: "deepseek-v4",
            config: json!({
                "model_type": "deepseek_v4", "num_hidden_layers": 1, "hidden_size": hidden,
                "moe_intermediate_size": intermediate, "n_routed_experts": experts,
                "expert_dtype": "fp4",
            }),
            experts: "layers.0.ffn.experts",
            names: ["w1", "w3", "w2"],
            parts: &[(".weight", Dtype::I8, [2, 1]), (".scale", Dtype::F8_E8M0, [32, 1])],
        },
        Family {
            model: "kimi-k25-vl",
            config: json!({"model_type": "kimi_k25", "text_config": text}),
            experts: "language_model.model.layers.0.mlp.experts",
            names: ["gate_proj", "up_proj", "down_proj"],
            parts: &[
                (".weight_packed", Dtype::I32, [8, 1]),
                (".weight_scale", Dtype::BF16, [32, 1]),
                (".weight_shape", Dtype::I32, [0, 0]),
            ],
        },
    ]
}

/// A tensor with pseudo-random codes or scales.
fn tensor(dtype: Dtype, shape: Vec<usize>, seed: usize) -> Tensor {
    let bytes = (shape.iter().product::<usize>() * dtype.bitsize()).div_ceil(8);
    let mut state = seed as u64 + 1;
    let mut random = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let bytes = (0..bytes).map(|i| match dtype {
        Dtype::F8_E8M0 => 112 + random() % 16,
        // Values around 0.01.
        Dtype::F32 if i % 4 == 3 => 0x3C,
        Dtype::BF16 if i % 2 == 1 => 0x3C,
        _ => random(),
    });
    (format!("{dtype:?}"), shape, bytes.collect())
}

fn write(family: &Family, size: Size, dir: &Path) {
    let Size { experts, hidden, intermediate } = size;
    let mut tensors = BTreeMap::new();
    for expert in 0..experts {
        for (part, name) in family.names.iter().enumerate() {
            let [rows, cols] =
                if part == 2 { [hidden, intermediate] } else { [intermediate, hidden] };
            for (suffix, dtype, [to_col, to_row]) in family.parts {
                let name = format!("{}.{expert}.{name}{suffix}", family.experts);
                let value = if *to_col == 0 {
                    let stated = [rows, cols].map(|n| u32::try_from(n).unwrap().to_le_bytes());
                    (format!("{dtype:?}"), vec![2], stated.concat())
                } else {
                    let shape = vec![rows.div_ceil(*to_row), cols.div_ceil(*to_col)];
                    tensor(*dtype, shape, 7 * expert + part)
                };
                tensors.insert(name, value);
            }
        }
    }
    write_checkpoint(dir, &family.config.to_string(), &tensors);
}

fn engine(family: &Family, dir: &Path, options: EngineOptions) -> Engine {
    let mapping = Mapping::named(family.model).unwrap();
    // The checkpoint has only experts.
    let allow_missing = vec![regex::Regex::new("").unwrap()];
    let plan = PlanOptions { allow_missing, ..PlanOptions::default() };
    common::open(&mapping, dir, &plan, options).unwrap()
}

/// Reads a tensor in pieces: forward, backward, or by several threads that take turns.
fn read(engine: &Engine, id: TensorId, first: usize, piece: usize, order: Order) -> Vec<u8> {
    let size = usize::try_from(engine.plan().tensor(id).bytes()).unwrap();
    let mut out = vec![0; size];
    let (head, rest) = out.split_at_mut(first);
    let mut pieces: Vec<(usize, &mut [u8])> = vec![(0, head)];
    pieces.extend(rest.chunks_mut(piece).enumerate().map(|(i, p)| (first + i * piece, p)));
    let read = |(at, piece): (usize, &mut [u8])| {
        engine.read(id, u64::try_from(at).unwrap(), piece).unwrap();
    };
    match order {
        Order::Forward => pieces.into_iter().for_each(read),
        Order::Backward => pieces.into_iter().rev().for_each(read),
        Order::Threads(n) => {
            let mut shares: Vec<Vec<_>> = (0..n).map(|_| Vec::new()).collect();
            pieces.into_iter().enumerate().for_each(|(i, piece)| shares[i % n].push(piece));
            thread::scope(|scope| {
                for share in shares {
                    scope.spawn(|| share.into_iter().for_each(read));
                }
            });
        }
    }
    out
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Forward,
    Backward,
    Threads(usize),
}

#[test]
fn large_and_small_reads_give_the_same_bytes() {
    const MIB: usize = 1 << 20;
    for family in families(MANY) {
        let dir = tempfile::tempdir().unwrap();
        write(&family, MANY, dir.path());
        let options = |cache_bytes, direct_io, threads| {
            engine(&family, dir.path(), EngineOptions { cache_bytes, direct_io, threads })
        };
        let small = options(64 << 20, true, 0);
        for (id, tensor) in (0..).map(TensorId).zip(&small.plan().tensors) {
            let expected = read(&small, id, 0, 40_000, Order::Backward);
            assert!(expected.iter().any(|&b| b != 0), "{}", tensor.name);
            // Cache size, direct I/O, threads; size of the first and of the other pieces; order.
            for (cache, direct_io, threads, first, piece, order) in [
                (256 << 20, false, 2, 0, MIB, Order::Forward),
                (256 << 20, false, 2, 4096, MIB, Order::Forward),
                (256 << 20, false, 1, 1001, 700_001, Order::Forward),
                (256 << 20, false, 2, 0, MIB, Order::Threads(3)),
                (256 << 20, false, 0, 0, 64 * MIB, Order::Forward),
                (1 << 20, false, 2, 4096, MIB, Order::Forward),
                (256 << 20, true, 2, 0, MIB / 4, Order::Forward),
                (256 << 20, true, 2, 0, MIB, Order::Threads(2)),
                (4 << 20, true, 2, 4096, MIB / 8, Order::Forward),
            ] {
                let engine = options(cache, direct_io, threads);
                let got = read(&engine, id, first, piece, order);
                let how = format!("{}: {first} and {piece} bytes, {order:?}", tensor.name);
                assert!(got == expected, "{how}, cache {cache}, direct_io {direct_io}");
                assert_eq!(engine.counters().errors, 0, "{how}");
            }
        }
    }
}

#[test]
fn leading_and_remaining_columns_give_the_whole_tensor() {
    for family in families(LARGE) {
        let dir = tempfile::tempdir().unwrap();
        write(&family, LARGE, dir.path());
        let options = |cache_bytes, direct_io, threads| {
            engine(&family, dir.path(), EngineOptions { cache_bytes, direct_io, threads })
        };
        let id = stacked(&options(0, true, 0), "gate");
        // With a cache of 0 bytes, no source rows are cached.
        let expected = read(&options(0, true, 0), id, 0, 64 << 20, Order::Forward);
        for (direct_io, first, order) in [
            (false, 0, Order::Forward),
            (false, 5000, Order::Forward),
            (false, 0, Order::Threads(2)),
            (true, 5000, Order::Forward),
        ] {
            let engine = options(256 << 20, direct_io, 2);
            let got = read(&engine, id, first, 1 << 20, order);
            assert!(
                got == expected,
                "{}: direct_io {direct_io}, from {first}, {order:?}",
                family.model
            );
        }
    }
}

/// The stacked tensor with `part` in its name.
fn stacked(engine: &Engine, part: &str) -> TensorId {
    let named = |t: &mount_ckpt::TensorPlan| t.name.contains(part) && t.shape.rank() == 3;
    let i = engine.plan().tensors.iter().position(named).unwrap();
    TensorId(u32::try_from(i).unwrap())
}

#[test]
fn a_sequential_reader_reads_stored_bytes_at_most_about_twice() {
    for family in families(MANY) {
        let dir = tempfile::tempdir().unwrap();
        write(&family, MANY, dir.path());
        let options = EngineOptions { cache_bytes: 256 << 20, direct_io: false, threads: 0 };
        let engine = engine(&family, dir.path(), options);
        for (id, _) in (0..).map(TensorId).zip(&engine.plan().tensors) {
            read(&engine, id, 0, 1 << 20, Order::Forward);
        }
        let stored = std::fs::metadata(dir.path().join("model.safetensors")).unwrap().len();
        let counters = engine.counters();
        // The first chunks of an expert are read separately, and their rows a second time with the
        // others.
        let read = counters.source_bytes as f64 / stored as f64;
        assert!((0.95..2.1).contains(&read), "{}: {read}", family.model);
    }
}
