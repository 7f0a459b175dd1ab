//! Unusual but valid checkpoints are accepted, and their views have the same bits as those of the
//! golden checkpoints.

mod common;

use std::collections::BTreeMap;

use common::toy::{Mounted, Toy};
use common::{Tensor, golden, tensors_of, tensors_of_engine};
use mount_ckpt::{LayoutName, PlanOptions, TensorId};
use safetensors::Dtype;
use serde_json::json;

const MIMO: &str = "mimo-v2-flash";
const FLASH: &str = "deepseek-v4-flash";
const BASE: &str = "deepseek-v4-base";
const KIMI: &str = "kimi-k25-vl";
const QWEN: &str = "qwen3-vl-moe";

fn mount(toy: &Toy) -> Mounted {
    toy.mount(&PlanOptions::default(), |_| {}).unwrap_or_else(|e| panic!("{e}"))
}

fn tensors(toy: &Toy) -> BTreeMap<String, Tensor> {
    tensors_of_engine(&mount(toy).engine)
}

/// Compares names, dtypes, shapes and bytes, including the bits of NaNs.
fn assert_equal(got: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) {
    assert!(got.keys().eq(expected.keys()), "{:?}", got.keys());
    for (name, tensor) in expected {
        assert!(got[name] == *tensor, "`{name}` differs");
    }
}

/// A family and a change that must not change any bit of the view.
type Case = (&'static str, fn(&mut Toy) -> &mut Toy);

#[test]
fn equivalent_checkpoints_give_the_same_bits() {
    let cases: &[Case] = &[
        // A scale may be in another shard than its payload.
        (MIMO, |t| t.move_to("~.0.gate_proj.weight_scale_inv", 0)),
        (FLASH, |t| t.move_to("~.1.w2.scale", 2)),
        (BASE, |t| t.move_to("~.1.w2.scale", 0)),
        (KIMI, |t| t.move_to("~.1.up_proj.weight_scale", 2).move_to("~.1.up_proj.weight_shape", 1)),
        (KIMI, |t| t.each("_scale", |t, n| t.move_to(n, 2))),
        (QWEN, |t| t.move_to("~.gate_up_proj", 0)),
        // Scales may have one axis.
        (MIMO, |t| t.reshape("~.0.gate_proj.weight_scale_inv", &[4])),
        (MIMO, |t| t.reshape("model.layers.1.self_attn.q_proj.weight_scale_inv", &[12])),
        (FLASH, |t| t.reshape("~.1.w2.scale", &[480])),
        (FLASH, |t| t.reshape("layers.1.attn.wq_b.scale", &[])),
        (BASE, |t| t.reshape("~.1.w2.scale", &[4])),
        (KIMI, |t| t.reshape("~.1.up_proj.weight_scale", &[192])),
        // MTP layers may be numbered after the other layers.
        (FLASH, |t| t.rename_all("mtp.0.", "layers.4.")),
        (FLASH, |t| t.rename_all("mtp.0.", "model.layers.4.")),
        (BASE, |t| t.rename_all("mtp.0.", "layers.4.")),
        // FP4 payloads may have other dtypes, and shape tensors other shapes.
        (FLASH, |t| t.retype("~.1.w1.weight", Dtype::U8)),
        (FLASH, |t| t.retype_as("~.1.w1.weight", Dtype::F4, &[96, 160])),
        (KIMI, |t| t.reshape("~.1.up_proj.weight_shape", &[1, 2])),
        // config.json need not state the block or group size.
        (MIMO, |t| t.unset("quantization_config")),
        (KIMI, |t| t.unset("text_config.quantization_config.config_groups")),
    ];
    let mut expected: BTreeMap<&str, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (i, (family, change)) in cases.iter().enumerate() {
        let mut toy = Toy::golden(family);
        let expected = expected.entry(family).or_insert_with(|| tensors(&toy));
        change(&mut toy);
        println!("row {i}, {family}");
        assert_equal(&tensors(&toy), expected);
    }
}

/// A family, experts that become plain BF16, and the suffixes of their payload and of their scale
/// and shape tensors.
type Plain = (&'static str, &'static [&'static str], &'static str, &'static [&'static str]);

#[test]
fn plain_experts_among_quantized_ones_keep_their_values() {
    // Only the up projection of an expert, a whole expert, experts of several formats.
    let cases: &[Plain] = &[
        (MIMO, &["~.0.up_proj"], ".weight", &[".weight_scale_inv"]),
        (
            MIMO,
            &["~.2.gate_proj", "~.2.up_proj", "~.2.down_proj"],
            ".weight",
            &[".weight_scale_inv"],
        ),
        (FLASH, &["~.1.w3", "~.0.w2"], ".weight", &[".scale"]),
        (BASE, &["~.1.w1"], ".weight", &[".scale"]),
        (
            KIMI,
            &["~.1.up_proj", "~.0.down_proj"],
            ".weight_packed",
            &[".weight_scale", ".weight_shape"],
        ),
    ];
    for (family, experts, payload, parts) in cases {
        let mut toy = Toy::golden(family);
        let expected = tensors(&toy);
        let options = PlanOptions { to: Some(LayoutName::Hf), ..PlanOptions::default() };
        let plain = tensors_of_engine(&toy.mount(&options, |_| {}).unwrap().engine);
        for expert in *experts {
            toy.drop(&format!("{expert}{payload}"));
            for part in *parts {
                toy.drop(&format!("{expert}{part}"));
            }
            let name = toy.full_name(&format!("{expert}.weight"));
            let (_, shape, bytes) = &plain[&name];
            toy.add(&name, Dtype::BF16, shape).tensor(&name).bytes.clone_from(bytes);
        }
        println!("{family}");
        assert_equal(&tensors(&toy), &expected);
    }
}

#[test]
fn a_single_scale_applies_to_every_block() {
    type Forms = (&'static str, &'static str, &'static [&'static [usize]]);
    let cases: &[Forms] = &[
        (
            MIMO,
            "model.layers.1.self_attn.q_proj.weight_scale_inv",
            &[&[6, 2], &[12], &[768, 1], &[768], &[1, 1], &[1], &[]],
        ),
        (FLASH, "~.1.w2.scale", &[&[160, 3], &[480], &[160, 1], &[160], &[1, 1], &[1], &[]]),
        (BASE, "~.1.w2.scale", &[&[2, 2], &[4], &[136, 1], &[136], &[1, 1], &[1], &[]]),
        (
            KIMI,
            "~.1.up_proj.weight_scale",
            &[&[64, 3], &[192], &[64, 1], &[64], &[1, 1], &[1], &[]],
        ),
    ];
    for (family, name, forms) in cases {
        let mut toy = Toy::golden(family);
        let element = toy.tensor(name).dtype.bitsize() / 8;
        let one = toy.tensor(name).bytes[..element].to_vec();
        let views = forms.iter().map(|shape| {
            toy.reshape(name, shape);
            let n = shape.iter().product();
            toy.tensor(name).bytes = one.repeat(n);
            tensors(&toy)
        });
        let views: Vec<_> = views.collect();
        for (view, shape) in views.iter().zip(*forms) {
            println!("{family} {shape:?}");
            assert_equal(view, &views[0]);
        }
    }
}

#[test]
fn scalar_scales_of_k_and_v_are_not_read_as_fused_shards() {
    let mut toy = Toy::golden(MIMO);
    for part in ["k", "v"] {
        toy.reshape(&format!("model.layers.2.self_attn.{part}_proj.weight_scale_inv"), &[1]);
    }
    let plan = mount(&toy);
    assert_eq!(plan.engine.plan().summary.fused_scales.map(|(_, pairs)| pairs), Some(1));
}

#[test]
fn optional_tensors_may_be_absent() {
    let cases: &[(&str, &str, &str)] = &[
        (MIMO, "lm_head.weight", "lm_head.weight"),
        (FLASH, "head.weight", "lm_head.weight"),
        (QWEN, "lm_head.weight", "lm_head.weight"),
    ];
    for (family, name, of_view) in cases {
        let mut toy = Toy::golden(family);
        let mut expected = tensors(&toy);
        expected.remove(*of_view).unwrap();
        toy.drop(name).set("tie_word_embeddings", true);
        assert_equal(&tensors(&toy), &expected);
    }
    // MTP layers may be absent even if config.json states some.
    let mut toy = Toy::golden(FLASH);
    let mut expected = tensors(&toy);
    expected.retain(|name, _| !name.starts_with("mtp."));
    assert_equal(&tensors(toy.drop_all("mtp.0.")), &expected);
}

#[test]
fn mtp_depths_beyond_the_config_are_counted_and_dropped() {
    const REASON: &str = "MTP depth at or above num_nextn_predict_layers";
    for prefix in ["mtp.1.", "layers.5.", "model.layers.5."] {
        let mut toy = Toy::golden(FLASH);
        let expected = tensors(&toy);
        for name in ["attn_norm.weight", "e_proj.weight", "e_proj.scale"] {
            toy.copy(&format!("mtp.0.{name}"), &format!("{prefix}{name}"));
        }
        let mounted = mount(&toy);
        assert_eq!(mounted.engine.plan().summary.dropped, [(REASON.to_owned(), 2)].into());
        assert_equal(&tensors_of_engine(&mounted.engine), &expected);
    }
    let mut toy = Toy::golden(FLASH);
    toy.set("num_nextn_predict_layers", 0);
    let plan = mount(&toy);
    let dropped = plan.engine.plan().summary.dropped.get(REASON).copied();
    assert!(dropped.is_some_and(|n| n > 0), "{dropped:?}");
    assert!(plan.engine.plan().tensors.iter().all(|t| !t.name.starts_with("mtp.")));
}

#[test]
fn nan_scales_and_empty_tensors_are_served() {
    // A NaN scale makes its block NaN. A tensor without elements is served without bytes.
    let mut toy = Toy::golden(MIMO);
    toy.reshape("model.layers.1.input_layernorm.weight", &[0]);
    toy.tensor("~.0.gate_proj.weight_scale_inv").bytes[..4]
        .copy_from_slice(&f32::NAN.to_le_bytes());
    let view = tensors(&toy);
    assert_eq!(view["model.layers.1.input_layernorm.weight"], ("BF16".to_owned(), vec![0], vec![]));
    let (_, shape, bytes) = &view["model.layers.1.mlp.experts.gate_and_up_projs"];
    assert_eq!(shape, &[3, 136, 288]);
    let nan = |e: usize, h: usize, i: usize| {
        let at = 2 * ((e * 136 + h) * 288 + i);
        u16::from_le_bytes([bytes[at], bytes[at + 1]]) & 0x7FFF > 0x7F80
    };
    assert!(nan(0, 0, 0) && nan(0, 127, 127));
    let golden = tensors_of(&golden(MIMO).join("native.safetensors"));
    let golden = &golden["model.layers.1.mlp.experts.gate_and_up_projs"].2;
    assert_eq!(bytes[2 * 136 * 288..], golden[2 * 136 * 288..]);
}

#[test]
fn a_wrong_shape_tensor_is_an_error_at_the_first_decode() {
    let (wrong, wide) = ([64, 95], [64_i64, 96]);
    let mut toy = Toy::golden(KIMI);
    let expected = tensors(&toy);
    // The shape may be stored as two I64 instead of two I32.
    toy.retype("~.1.up_proj.weight_shape", Dtype::I64);
    toy.tensor("~.1.up_proj.weight_shape").bytes =
        wide.iter().flat_map(|n| n.to_le_bytes()).collect();
    assert_equal(&tensors(&toy), &expected);

    toy.retype("~.1.up_proj.weight_shape", Dtype::I32);
    toy.tensor("~.1.up_proj.weight_shape").bytes =
        wrong.iter().flat_map(|n: &i32| n.to_le_bytes()).collect();
    let mounted = mount(&toy);
    let plan = mounted.engine.plan();
    let mut refused = Vec::new();
    for id in (0..).map(TensorId).take(plan.tensors.len()) {
        let bytes = usize::try_from(plan.tensor(id).bytes()).unwrap();
        if let Err(error) = mounted.engine.read(id, 0, &mut vec![0; bytes]) {
            refused.push(error.to_string());
        }
    }
    let experts = "language_model.model.layers.1.mlp.experts";
    let message = format!(
        "tensor `model.{experts}.gate_and_up_projs`: `{experts}.1.up_proj.weight` is stored as \
         [64, 96], but its shape tensor says [64, 95]"
    );
    assert_eq!(refused, [message]);
}

#[test]
fn scales_of_a_stacked_release_follow_its_orientation() {
    // The FP8 release of Qwen3-VL-MoE. At this size, a 128x128 block contains a whole expert.
    let mut toy = Toy::golden(QWEN);
    toy.retype("~.gate_up_proj", Dtype::F8_E4M3);
    toy.add("~.gate_up_proj_scale_inv", Dtype::F32, &[4, 1, 1]);
    toy.tensor("~.gate_up_proj").bytes.fill(0x38);
    let scales = [1.0_f32, 2.0, 0.5, 4.0];
    toy.tensor("~.gate_up_proj_scale_inv").bytes =
        scales.iter().flat_map(|s| s.to_le_bytes()).collect();
    toy.set("quantization_config", json!({ "weight_block_size": [128, 128] }));
    let view = tensors(&toy);
    let (dtype, shape, bytes) =
        &view["model.language_model.layers.1.mlp.experts.gate_and_up_projs"];
    assert_eq!((dtype.as_str(), shape.as_slice()), ("BF16", &[4, 96, 80][..]));
    let experts: Vec<_> = bytes.chunks(2 * 96 * 80).collect();
    for (expert, scale) in experts.into_iter().zip([0x3F80_u16, 0x4000, 0x3F00, 0x4080]) {
        assert!(expert.chunks(2).all(|b| b == scale.to_le_bytes()));
    }
}
