//! A user's own mapping file for a model unlike the shipped ones. It uses every operation and every
//! kind of row.

mod common;

use std::collections::BTreeMap;

use common::{
    Tensor, Zeros, assert_same, config_of_view, engine_of, tensors_of_engine, write_checkpoint,
};
use mount_ckpt::{ExpertParallel, LayoutName, Mapping, PlanOptions, Quantize};

const MAPPING: &str = r#"
name = "own"
title = "A model of one's own"

[[alias]]
from = "backbone.layers.{l}.{r}"
to = "layers.{l}.{r}"

[[encoding]]
scheme = "int4"
matrix = "{r}.weight"
payload = "{r}.weight_packed"
scale = "{r}.weight_scale"
shape = "{r}.weight_shape"
block = [1, 8]
quantizes = ["layers.{l}.dense.weight"]
scale-dtype = "F16"
when = { key = "release", is = "int4" }

[quantization]
within = "text_config"
value = { quant_method = "compressed-tensors" }

# Gate and up alternate.
[[native.rule]]
hf = ["layers.{l:depth}.moe.{e:experts}.gate", "layers.{l:depth}.moe.{e:experts}.up"]
to = "layers.{l}.experts"
ops = ["transpose", { interleave = 1 }, { stack = "e" }]
grouped = true

[[native.rule]]
same = "layers.{l:depth}.moe_bias"
hf-shape = ["experts", "2*inner|inner_size=2"]
expert-axis = true

[[native.rule]]
scope = { hf = "layers.{l:depth}.", to = "layers.{l}." }
use = "layer"

[[native.rule]]
scope = { hf = "layers.{k+depth:extra=0}.", to = "mtp.{k}." }
use = "layer"

[[native.rule]]
hf = "layers.{k+depth+extra=0}.{r}"
drop = "more MTP layers than the config has"

# Rotary halves, apart for q, k and v.
[[transformers.rule]]
hf = "layers.{l:depth}.qkv"
to = ["layers.{l}.q", "layers.{l}.k", "layers.{l}.v"]
ops = [{ split = 0 }, { rotary = 0, heads = "heads", of = [0, 1] }]

[[transformers.rule]]
hf = ["layers.{l:depth}.moe.{e:experts}.gate", "layers.{l:depth}.moe.{e:experts}.up"]
to = "layers.{l}.experts"
ops = [{ stack = "e" }, { concat = 1 }]
grouped = true

[[transformers.rule]]
same = ["layers.{l:depth}.moe_bias", "layers.{l:depth}.dense.weight"]

[[transformers.rule]]
hf = "layers.{k+depth}.{r}"
drop = "no MTP"

[[set.layer]]
same = ["qkv", "dense.weight"]
"#;

const CONFIG: &str =
    r#"{"release": "int4", "depth": 1, "experts": 2, "text_config": {"extra": 1, "heads": 1}}"#;

type Tensors = BTreeMap<String, Tensor>;

/// Consecutive numbers from `start`.
fn ramp(shape: &[usize], start: u16) -> Tensor {
    let count = u16::try_from(shape.iter().product::<usize>()).unwrap();
    let bytes = (start..start + count).flat_map(|n| f32::from(n).to_le_bytes()).collect();
    ("F32".to_owned(), shape.to_vec(), bytes)
}

fn numbers((dtype, _, bytes): &Tensor) -> Vec<f32> {
    match dtype.as_str() {
        "F32" => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        "BF16" => bytes
            .chunks(2)
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b.try_into().unwrap())) << 16))
            .collect(),
        other => panic!("{other}"),
    }
}

fn published() -> Tensors {
    let mut tensors = Tensors::new();
    let mut add = |name: &str, tensor| tensors.insert(name.to_owned(), tensor);
    add("backbone.layers.0.qkv", ramp(&[12, 1], 0));
    add("layers.0.moe.0.gate", ramp(&[2, 3], 0));
    add("layers.0.moe.0.up", ramp(&[2, 3], 10));
    add("layers.0.moe.1.gate", ramp(&[2, 3], 20));
    add("layers.0.moe.1.up", ramp(&[2, 3], 30));
    add("layers.0.moe_bias", ramp(&[2, 4], 0));
    // Codes 0 to 7 are the values -8 to -1; the scale is 1.
    let packed = 0x7654_3210_u32.to_le_bytes().to_vec();
    add("layers.0.dense.weight_packed", ("I32".to_owned(), vec![1, 1], packed));
    let scale = 0x3C00_u16.to_le_bytes().to_vec();
    add("layers.0.dense.weight_scale", ("F16".to_owned(), vec![1, 1], scale));
    let shape = [1_i32, 8].into_iter().flat_map(i32::to_le_bytes).collect();
    add("layers.0.dense.weight_shape", ("I32".to_owned(), vec![2], shape));
    add("layers.1.qkv", ramp(&[12, 1], 0));
    add("layers.2.qkv", ramp(&[12, 1], 0));
    tensors
}

fn view(tensors: &Tensors, options: &PlanOptions) -> (LayoutName, serde_json::Value, Tensors) {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), CONFIG, tensors);
    let engine = engine_of(&Mapping::parse("own", MAPPING).unwrap(), dir.path(), options);
    let (from, tensors) = (engine.plan().summary.from, tensors_of_engine(&engine));
    (from, config_of_view(engine), tensors)
}

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

#[test]
fn layouts_follow_the_mapping_file() {
    let dense: &[f32] = &[-8., -7., -6., -5., -4., -3., -2., -1.];
    let native: [(&str, &[usize], &[f32]); 5] = [
        ("layers.0.dense.weight", &[1, 8], dense),
        (
            "layers.0.experts",
            &[2, 3, 4],
            &[
                0., 10., 3., 13., 1., 11., 4., 14., 2., 12., 5., 15., 20., 30., 23., 33., 21., 31.,
                24., 34., 22., 32., 25., 35.,
            ],
        ),
        ("layers.0.moe_bias", &[2, 4], &[0., 1., 2., 3., 4., 5., 6., 7.]),
        ("layers.0.qkv", &[12, 1], &[0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.]),
        ("mtp.0.qkv", &[12, 1], &[0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.]),
    ];
    let transformers: [(&str, &[usize], &[f32]); 6] = [
        native[0],
        (
            "layers.0.experts",
            &[2, 4, 3],
            &[
                0., 1., 2., 3., 4., 5., 10., 11., 12., 13., 14., 15., 20., 21., 22., 23., 24., 25.,
                30., 31., 32., 33., 34., 35.,
            ],
        ),
        ("layers.0.k", &[4, 1], &[4., 6., 5., 7.]),
        native[2],
        ("layers.0.q", &[4, 1], &[0., 2., 1., 3.]),
        ("layers.0.v", &[4, 1], &[8., 9., 10., 11.]),
    ];
    for (layout, expected) in
        [(LayoutName::Native, &native[..]), (LayoutName::Transformers, &transformers[..])]
    {
        let (_, _, got) = view(&published(), &to(layout));
        let got: Vec<_> =
            got.iter().map(|(n, t)| (n.as_str(), t.1.as_slice(), numbers(t))).collect();
        let expected: Vec<_> = expected.iter().map(|(n, s, v)| (*n, *s, v.to_vec())).collect();
        assert_eq!(got, expected, "{layout}");
    }
}

#[test]
fn every_layout_converts_to_every_other() {
    let (_, _, hf) = view(&published(), &to(LayoutName::Hf));
    let names: Vec<_> = hf.keys().map(String::as_str).collect();
    assert_eq!(names[..2], ["layers.0.dense.weight", "layers.0.moe.0.gate"]);
    let (_, _, native) = view(&published(), &to(LayoutName::Native));
    let (_, _, transformers) = view(&published(), &to(LayoutName::Transformers));
    for (from, layout) in [(LayoutName::Native, &native), (LayoutName::Transformers, &transformers)]
    {
        let (found, _, back) = view(layout, &PlanOptions::default());
        assert_eq!(found, from);
        let kept: Vec<_> = back.keys().cloned().collect();
        let expected: Tensors = hf.clone().into_iter().filter(|(n, _)| kept.contains(n)).collect();
        // Compare values, since the experts were cast.
        for (name, tensor) in &back {
            assert_eq!(numbers(tensor), numbers(&expected[name]), "{name}");
        }
        // Layers beyond those in config.json are dropped; `transformers` also drops MTP.
        assert_eq!(hf.len() - back.len(), if from == LayoutName::Native { 1 } else { 2 });
    }
    let (_, _, across) = view(&native, &to(LayoutName::Transformers));
    assert_same(&across, &transformers, Zeros::Signed);
}

#[test]
fn experts_and_their_biases_are_sliced_by_rank() {
    let options = PlanOptions {
        expert_parallel: Some(ExpertParallel { size: 2, rank: Some(1) }),
        ..to(LayoutName::Native)
    };
    let (_, _, got) = view(&published(), &options);
    let bias = &got["layers.0.moe_bias"];
    assert_eq!((&*bias.0, &*bias.1, numbers(bias)), ("F32", &[1, 4][..], vec![4., 5., 6., 7.]));
    let experts = &got["layers.0.experts"];
    assert_eq!((&*experts.0, &*experts.1, numbers(experts)[0]), ("BF16", &[1, 3, 4][..], 20.));
}

#[test]
fn quantizing_follows_the_mapping_file() {
    let (_, _, native) = view(&published(), &to(LayoutName::Native));
    let options = PlanOptions {
        quantize: Some(Quantize { original: None, scale_dtype: None }),
        ..to(LayoutName::Hf)
    };
    let (_, config, got) = view(&native, &options);
    let listed: Vec<_> = got
        .iter()
        .filter(|(n, _)| n.contains("dense"))
        .map(|(n, (dtype, shape, _))| (n.as_str(), dtype.as_str(), shape.as_slice()))
        .collect();
    let expected: [(&str, &str, &[usize]); 3] = [
        ("layers.0.dense.weight_packed", "I32", &[1, 1]),
        ("layers.0.dense.weight_scale", "F16", &[1, 1]),
        ("layers.0.dense.weight_shape", "I32", &[2]),
    ];
    assert_eq!(listed, expected);
    let stated = &config["text_config"]["quantization_config"];
    assert_eq!(stated, &serde_json::json!({ "quant_method": "compressed-tensors" }));
}
