//! From grouped layouts back to the published layout, plain and quantized.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::toy::Toy;
use common::{
    Tensor, Zeros, assert_same, config_of_view, engine, golden, tensors_of, tensors_of_dir,
    tensors_of_engine, write_checkpoint,
};
use half::{bf16, f16};
use mount_ckpt::{Checkpoint, Float, LayoutName, PlanOptions, Quantize};

type Tensors = BTreeMap<String, Tensor>;

/// Folder of `tests/golden` and name of the mapping.
const FAMILIES: [(&str, &str); 5] = [
    ("mimo-v2-flash", "mimo-v2-flash"),
    ("deepseek-v4-flash", "deepseek-v4"),
    ("deepseek-v4-base", "deepseek-v4"),
    ("kimi-k25-vl", "kimi-k25-vl"),
    ("qwen3-vl-moe", "qwen3-vl-moe"),
];

/// Writes tensors as a checkpoint of one file.
fn write(dir: &Path, config: &[u8], tensors: &Tensors) {
    std::fs::create_dir_all(dir).unwrap();
    write_checkpoint(dir, str::from_utf8(config).unwrap(), tensors);
}

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

fn quantized(original: Option<&Path>) -> PlanOptions {
    let original = original.map(|dir| Arc::new(Checkpoint::open(dir).unwrap()));
    PlanOptions { quantize: Some(Quantize { original, scale_dtype: None }), ..to(LayoutName::Hf) }
}

fn config_of(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("config.json")).unwrap()
}

/// A view of `source`, written as a checkpoint to `dir`.
fn write_view(model: &str, source: &Path, options: &PlanOptions, dir: PathBuf) -> PathBuf {
    let view = tensors_of_engine(&engine(model, source, options));
    write(&dir, &config_of(source), &view);
    dir
}

/// A golden checkpoint without values that a round trip cannot restore: MiMo's expert 0, which has
/// NaN codes and codes that do not decode to a normal BF16 number, and the F32 bias of Kimi, which
/// the native layout rounds.
fn restorable(folder: &str, dir: &Path) -> PathBuf {
    let source = golden(folder).join("checkpoint");
    let mut tensors = tensors_of_dir(&source);
    if folder == "mimo-v2-flash" {
        for part in ["gate_proj", "up_proj", "down_proj"] {
            for suffix in ["weight", "weight_scale_inv"] {
                let name = |e| format!("model.layers.1.mlp.experts.{e}.{part}.{suffix}");
                let good = tensors[&name(1)].clone();
                tensors.insert(name(0), good);
            }
        }
    }
    for (name, (_, _, bytes)) in &mut tensors {
        if folder == "kimi-k25-vl" && name.ends_with("e_score_correction_bias") {
            for value in bytes.chunks_mut(4) {
                value[..2].fill(0);
            }
        }
    }
    let out = dir.join("checkpoint");
    write(&out, &config_of(&source), &tensors);
    out
}

#[test]
fn every_layout_converts_to_every_other() {
    for (folder, model) in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = restorable(folder, dir.path());
        let layouts = [LayoutName::Hf, LayoutName::Native, LayoutName::Transformers];
        let direct: BTreeMap<_, _> = layouts
            .map(|layout| {
                let dir = dir.path().join(layout.as_str());
                (layout, write_view(model, &checkpoint, &to(layout), dir))
            })
            .into();
        for from in layouts {
            for target in layouts {
                let engine = engine(model, &direct[&from], &to(target));
                assert_eq!(engine.plan().summary.from, from, "{folder}");
                let got = tensors_of_engine(&engine);
                let mut expected = tensors_of_dir(&direct[&target]);
                // The `transformers` layout has no MTP layers, so they cannot be restored from it.
                expected
                    .retain(|name, _| got.contains_key(name) || from != LayoutName::Transformers);
                assert!(got.len() > 20, "{folder}: {from} -> {target}");
                assert_same_values(&got, &expected);
            }
        }
    }
}

/// As [`assert_same`], but a BF16 tensor may equal an F32 tensor: the native layout of Kimi casts
/// all floats.
fn assert_same_values(got: &Tensors, expected: &Tensors) {
    let widened = |tensors: &Tensors, others: &Tensors| -> Tensors {
        let widen = |(name, tensor): (&String, &Tensor)| {
            let (dtype, shape, bytes) = tensor;
            if dtype != "BF16" || others.get(name).is_none_or(|other| other.0 == "BF16") {
                return (name.clone(), tensor.clone());
            }
            let wide = |b: &[u8]| bf16::from_le_bytes([b[0], b[1]]).to_f32().to_le_bytes();
            let bytes = bytes.chunks(2).flat_map(wide).collect();
            (name.clone(), ("F32".to_owned(), shape.clone(), bytes))
        };
        tensors.iter().map(widen).collect()
    };
    assert_same(&widened(got, expected), &widened(expected, got), Zeros::Signed);
}

#[test]
fn quantizing_with_the_scales_of_the_original_restores_its_bytes() {
    for (folder, model) in FAMILIES {
        for dtype in [Float::BF16, Float::F32] {
            let dir = tempfile::tempdir().unwrap();
            let checkpoint = restorable(folder, dir.path());
            let native = PlanOptions { dtype, ..to(LayoutName::Native) };
            let native = write_view(model, &checkpoint, &native, dir.path().join("native"));
            let engine = engine(model, &native, &quantized(Some(&checkpoint)));
            let (got, expected) = (tensors_of_engine(&engine), tensors_of_dir(&checkpoint));
            assert!(got.keys().eq(expected.keys()), "{folder}");
            for (name, tensor) in &expected {
                assert!(
                    got[name] == *tensor,
                    "{folder} by {dtype:?}: `{name}` is not the original's"
                );
            }
        }
    }
}

#[test]
fn only_codes_that_bf16_cannot_represent_change_in_a_round_trip() {
    let folder = "mimo-v2-flash";
    let checkpoint = golden(folder).join("checkpoint");
    let dir = tempfile::tempdir().unwrap();
    let native =
        write_view(folder, &checkpoint, &to(LayoutName::Native), dir.path().join("native"));
    let values = tensors_of_engine(&engine(folder, &checkpoint, &to(LayoutName::Hf)));
    let back = tensors_of_engine(&engine(folder, &native, &quantized(Some(&checkpoint))));
    let mut differ = 0;
    for (name, (_, _, bytes)) in &tensors_of_dir(&checkpoint) {
        for (i, (got, expected)) in back[name].2.iter().zip(bytes).enumerate() {
            if got == expected {
                continue;
            }
            let value = bf16::from_le_bytes([values[name].2[2 * i], values[name].2[2 * i + 1]]);
            // A zero with any other code is from a scale that is 0, or so small that the value is 0
            // in BF16.
            let restorable = value.is_normal() || (value.to_f32() == 0.0 && expected & 0x7F == 0);
            assert!(!restorable, "`{name}` byte {i}: {expected:#x} came back as {got:#x}");
            differ += 1;
        }
    }
    assert!(differ > 0, "the golden checkpoint has codes that BF16 cannot represent");
}

#[test]
fn int4_quantization_equals_the_reference() {
    let native = golden("kimi-k25-vl");
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        &config_of(&native.join("checkpoint")),
        &tensors_of(&native.join("native.safetensors")),
    );
    let options = PlanOptions {
        quantize: Some(Quantize { original: None, scale_dtype: Some(Float::F16) }),
        ..to(LayoutName::Hf)
    };
    let mut got = tensors_of_engine(&engine("kimi-k25-vl", dir.path(), &options));
    let expected = tensors_of(&native.join("hf.int4.safetensors"));
    for (name, (dtype, _, bytes)) in &mut got {
        // Published checkpoints have I32 here, the reference writes I64.
        if name.ends_with(".weight_shape") {
            assert_eq!(dtype, "I32", "{name}");
            *bytes = bytes.chunks(4).flat_map(|b| [b, &[0; 4]].concat()).collect();
            "I64".clone_into(dtype);
        }
        // Published checkpoints have F32 here. The values are those that the native layout rounded
        // to BF16.
        if name.ends_with(".e_score_correction_bias") {
            assert_eq!(dtype, "F32", "{name}");
            *bytes = bytes.chunks(4).flat_map(|b| [b[2], b[3]]).collect();
            "BF16".clone_into(dtype);
        }
    }
    assert_same(&got, &expected, Zeros::Signed);
}

#[test]
fn fp8_quantization_equals_pytorch() {
    for (folder, model) in [("mimo-v2-flash", "mimo-v2-flash"), ("deepseek-v4-base", "deepseek-v4")]
    {
        let native = golden(folder);
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &config_of(&native.join("checkpoint")),
            &tensors_of(&native.join("native.safetensors")),
        );
        let got = tensors_of_engine(&engine(model, dir.path(), &quantized(None)));
        let expected = tensors_of(&native.join("hf.fp8.safetensors"));
        let fp8 = |tensors: &Tensors| -> Vec<String> {
            tensors.iter().filter(|(_, (d, ..))| d == "F8_E4M3").map(|(n, _)| n.clone()).collect()
        };
        assert_eq!(fp8(&got), fp8(&expected), "{folder}");
        let mut got: Tensors =
            got.into_iter().filter(|(name, _)| expected.contains_key(name)).collect();
        let mut expected = expected;
        for tensors in [&mut got, &mut expected] {
            for (dtype, _, bytes) in tensors.values_mut() {
                if dtype == "F8_E4M3" {
                    // Both NaN codes are equal.
                    bytes.iter_mut().filter(|b| **b & 0x7F == 0x7F).for_each(|b| *b = 0x7F);
                }
            }
        }
        assert_same(&got, &expected, Zeros::Signed);
    }
}

#[test]
fn the_summary_names_the_schemes_that_were_written() {
    for (family, schemes) in [
        ("mimo-v2-flash", "fp8 128x128"),
        ("deepseek-v4-flash", "fp4 1x32; quantized as fp8 128x128"),
        ("kimi-k25-vl", "int4 1x32"),
        ("gpt-oss", "mxfp4 1x32"),
    ] {
        let native = Toy::in_layout(family, LayoutName::Native);
        let mounted = native.mount(&quantized(None), |_| {}).unwrap();
        let summary = mounted.engine.plan().summary.to_string();
        assert!(summary.ends_with(&format!("; quantized as {schemes}")), "{summary}");
    }
}

#[test]
fn a_second_round_trip_equals_the_first() {
    for (folder, model) in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let checkpoint = restorable(folder, dir.path());
        let native = to(LayoutName::Native);
        let first = write_view(model, &checkpoint, &native, at("native-1"));
        let first = write_view(model, &first, &quantized(None), at("hf-1"));
        let second = write_view(model, &first, &native, at("native-2"));
        let second = write_view(model, &second, &quantized(None), at("hf-2"));
        let (first, second) = (tensors_of_dir(&first), tensors_of_dir(&second));
        assert!(first.keys().eq(second.keys()), "{folder}");
        for (name, tensor) in &first {
            assert!(
                second[name] == *tensor,
                "{folder}: `{name}` differs after a second round trip"
            );
        }
    }
}

/// Half the distance between codes at `x`, in units of the scale.
fn half_step(code: &str, x: f32) -> f32 {
    let exponent = x.abs().max(f32::MIN_POSITIVE).log2().floor();
    match code {
        // A mantissa of 3 bits; below 2^-6, steps of 2^-9.
        "F8_E4M3" => (exponent.max(-6.0) - 4.0).exp2(),
        // Values 0, 0.5, 1, 1.5, 2, 3, 4, 6. The scale is a power of two of at least amax / 6.
        "I8" => (exponent.clamp(0.0, 2.0) - 2.0).exp2(),
        // Integers; -8 to 7.
        "I32" => 0.5,
        other => panic!("no codes of {other}"),
    }
}

#[test]
fn quantization_error_is_at_most_half_a_step() {
    for (folder, model, scale) in [
        ("mimo-v2-flash", "mimo-v2-flash", "weight_scale_inv"),
        ("deepseek-v4-flash", "deepseek-v4", "scale"),
        ("kimi-k25-vl", "kimi-k25-vl", "weight_scale"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = restorable(folder, dir.path());
        let f32s = PlanOptions { dtype: Float::F32, ..to(LayoutName::Hf) };
        let before = tensors_of_engine(&engine(model, &checkpoint, &f32s));
        let back = write_view(model, &checkpoint, &quantized(None), dir.path().join("back"));
        let stored = tensors_of_dir(&back);
        let after = tensors_of_engine(&engine(model, &back, &f32s));
        let number = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
        let mut checked = 0;
        for (name, (_, shape, bytes)) in &before {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let payload = stored.get(name).or(stored.get(&format!("{name}_packed")));
            let Some((scale_dtype, scale_shape, scales)) = stored.get(&format!("{module}.{scale}"))
            else {
                continue;
            };
            if name.contains("k_proj") || name.contains("v_proj") {
                continue; // Their grid is not plain; PyTorch's bits are compared elsewhere.
            }
            let code = &payload.unwrap().0;
            let [rows, cols] = shape[..] else { panic!("{name}") };
            let grid = [rows.div_ceil(scale_shape[0]), cols.div_ceil(scale_shape[1])];
            let block = grid.map(|n| if n > 64 { 128 } else { n });
            let pairs = bytes.chunks(4).zip(after[name].2.chunks(4)).enumerate();
            for (i, (x, y)) in pairs {
                let (x, y) = (number(x), number(y));
                let at = (i / cols) / block[0] * scale_shape[1] + (i % cols) / block[1];
                let scale = match scale_dtype.as_str() {
                    "F32" => number(&scales[4 * at..4 * at + 4]),
                    "BF16" => bf16::from_le_bytes([scales[2 * at], scales[2 * at + 1]]).to_f32(),
                    "F16" => f16::from_le_bytes([scales[2 * at], scales[2 * at + 1]]).to_f32(),
                    "F8_E8M0" => (f32::from(scales[at]) - 127.0).exp2(),
                    other => panic!("a scale of {other}"),
                };
                // A BF16 scale has a relative error of up to 2^-8, and codes are at most 7.
                let rounded = if scale_dtype == "BF16" { 7.0 / 256.0 } else { 1e-5 };
                let bound = scale * (half_step(code, x / scale) * 1.001 + rounded);
                assert!(
                    (x - y).abs() <= bound,
                    "{folder} `{name}` at {i}: {x} came back as {y}, scale {scale}"
                );
            }
            checked += 1;
        }
        assert!(checked > 5, "{folder}");
    }
}

#[test]
fn config_json_states_the_quantization_of_the_view() {
    for (folder, model) in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = golden(folder).join("checkpoint");
        let native =
            write_view(model, &checkpoint, &to(LayoutName::Native), dir.path().join("native"));
        let mut config: serde_json::Value = serde_json::from_slice(&config_of(&native)).unwrap();
        let original = config.clone();
        config.as_object_mut().unwrap().remove("quantization_config");
        if let Some(text) = config.get_mut("text_config").and_then(|t| t.as_object_mut()) {
            text.remove("quantization_config");
        }
        std::fs::write(native.join("config.json"), config.to_string()).unwrap();
        for from in [None, Some(checkpoint.as_path())] {
            let view = config_of_view(engine(model, &native, &quantized(from)));
            let at_top = original.get("quantization_config");
            let nested = original.get("text_config").and_then(|t| t.get("quantization_config"));
            let text_config = view.get("text_config").and_then(|t| t.get("quantization_config"));
            let new = view.get("quantization_config").or(text_config);
            let Some(old) = at_top.or(nested) else {
                // The release of this toy is plain. Without an original it is quantized like its
                // FP8 sibling.
                let method = new.map(|new| new["quant_method"].clone());
                assert_eq!(folder, "qwen3-vl-moe");
                assert_eq!(method, from.is_none().then(|| "fp8".into()));
                continue;
            };
            let new = new.unwrap();
            assert_eq!(text_config.is_some(), at_top.is_none(), "{folder}");
            let (mut new, mut old) = (new.clone(), old.clone());
            if from.is_none() {
                // TOML has no null, and the list names what this view leaves unquantized.
                for value in [&mut new, &mut old] {
                    drop_nulls(value);
                    value.as_object_mut().unwrap().shift_remove("ignored_layers");
                }
                if folder == "deepseek-v4-base" {
                    // New F32 scales are not powers of two, so config.json must not state
                    // `scale_fmt`.
                    old.as_object_mut().unwrap().shift_remove("scale_fmt").unwrap();
                }
            }
            assert_eq!(new, old, "{folder}");
        }
    }
}

/// Removes keys whose value is null from an object and the objects within it.
fn drop_nulls(value: &mut serde_json::Value) {
    if let Some(object) = value.as_object_mut() {
        object.retain(|_, value| !value.is_null());
        object.values_mut().for_each(drop_nulls);
    }
}

/// Folder, part of a name, and why its dtype or shape differs from the reference's `to_hf`.
const KNOWN_DIFFERENCES: [(&str, &str, &str); 7] = [
    ("mimo-v2-flash", "eh_proj.weight", "published checkpoints have it in BF16"),
    ("mimo-v2-flash", "k_proj.weight_scale_inv", "2 shards as in the checkpoint, not 4"),
    ("kimi-k25-vl", "weight_shape", "I32 as published, not I64"),
    ("kimi-k25-vl", "weight_scale", "BF16 as published, not F16"),
    ("kimi-k25-vl", "e_score_correction_bias", "F32 as published, not BF16"),
    ("qwen3-vl-moe", "_proj", "FP8 as in its FP8 release, not plain"),
    ("deepseek-v4-flash", ".scale", "E8M0 beside FP4 experts, not F32"),
];

#[test]
fn names_dtypes_and_shapes_equal_to_hf_of_the_reference() {
    for (folder, model) in FAMILIES {
        let native = golden(folder);
        let dir = tempfile::tempdir().unwrap();
        let tensors = tensors_of(&native.join("native.safetensors"));
        write(dir.path(), &config_of(&native.join("checkpoint")), &tensors);
        let listing = std::fs::read(native.join("to_hf.listing.json")).unwrap();
        let listing: serde_json::Value = serde_json::from_slice(&listing).unwrap();
        for (key, options) in
            [("quantization=False", to(LayoutName::Hf)), ("quantization=True", quantized(None))]
        {
            let engine = engine(model, dir.path(), &options);
            let got: BTreeMap<&str, (String, Vec<u64>)> = engine
                .plan()
                .tensors
                .iter()
                .map(|t| (&*t.name, (t.dtype.name().to_owned(), t.shape.dims().to_vec())))
                .collect();
            let expected: BTreeMap<&str, (String, Vec<u64>)> = listing[key]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, v)| {
                    let dtype = torch_dtype(v[0].as_str().unwrap()).to_owned();
                    let shape = serde_json::from_value(v[1].clone()).unwrap();
                    (name.as_str(), (dtype, shape))
                })
                .collect();
            let names = got.keys().chain(expected.keys());
            let differ: Vec<&&str> =
                names.filter(|name| got.get(*name) != expected.get(*name)).collect();
            let known = |name: &str| {
                KNOWN_DIFFERENCES.iter().any(|(f, part, _)| *f == folder && name.contains(part))
            };
            let unknown: Vec<_> = differ.iter().filter(|name| !known(name)).collect();
            assert!(unknown.is_empty(), "{folder}, {key}: {unknown:?}");
            // Without quantization, only Kimi's biases differ.
            let explained = KNOWN_DIFFERENCES.iter().any(|(f, part, _)| {
                *f == folder && (key == "quantization=True" || *part == "e_score_correction_bias")
            });
            assert_eq!(!differ.is_empty(), explained, "{folder}, {key}");
        }
    }
}

fn torch_dtype(name: &str) -> &str {
    match name {
        "bfloat16" => "BF16",
        "float32" => "F32",
        "float16" => "F16",
        "float8_e4m3fn" => "F8_E4M3",
        "float8_e8m0fnu" => "F8_E8M0",
        "int8" => "I8",
        "int32" => "I32",
        "int64" => "I64",
        other => other,
    }
}

#[test]
fn native_sources_may_be_f16_or_f32() {
    for dtype in [Float::F16, Float::F32] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = restorable("deepseek-v4-flash", dir.path());
        let native = PlanOptions { dtype, ..to(LayoutName::Native) };
        let native = write_view("deepseek-v4", &checkpoint, &native, dir.path().join("native"));
        let engine = engine("deepseek-v4", &native, &to(LayoutName::Hf));
        let expert = "layers.1.ffn.experts.2.w1.weight";
        let tensor = engine.plan().tensors.iter().find(|t| &*t.name == expert).unwrap();
        assert_eq!(tensor.dtype.name(), "BF16", "experts have the output dtype");
        let linear = "layers.1.attn.wq_b.weight";
        let tensor = engine.plan().tensors.iter().find(|t| &*t.name == linear).unwrap();
        assert_eq!(tensor.dtype, dtype.dtype(), "tensors that are not grouped keep their dtype");
    }
}

#[test]
fn router_biases_of_hash_layers_are_dropped_in_text_models() {
    let dir = tempfile::tempdir().unwrap();
    let golden = golden("deepseek-v4-flash");
    let mut tensors = tensors_of(&golden.join("native.safetensors"));
    let bias = |layer: u32| format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
    let of_another = tensors[&bias(2)].clone();
    assert!(tensors.insert(bias(0), of_another).is_none(), "layer 0 is a hash layer");
    let config = config_of(&golden.join("checkpoint"));
    for (vision, comes_back) in [("0", false), ("2", true)] {
        let text = String::from_utf8(config.clone()).unwrap();
        let text = text.replacen('{', &format!("{{\"vision_n_layers\": {vision},"), 1);
        write(dir.path(), text.as_bytes(), &tensors);
        let engine = engine("deepseek-v4", dir.path(), &to(LayoutName::Hf));
        let plan = engine.plan();
        let has = |name| plan.tensors.iter().any(|t| &*t.name == name);
        assert!(has("layers.2.ffn.gate.bias"));
        assert_eq!(has("layers.0.ffn.gate.bias"), comes_back, "vision_n_layers {vision}");
        assert_eq!(
            plan.summary.dropped.contains_key("hash layers have no router bias"),
            !comes_back
        );
    }
}

#[test]
fn verify_tells_fused_scales_from_plain_ones_by_the_largest_codes() {
    // K and V have random values and are quantized on their fused grid, so only the codes tell that
    // grid from the plain one.
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = restorable("mimo-v2-flash", dir.path());
    let mut native =
        tensors_of_engine(&engine("mimo-v2-flash", &checkpoint, &to(LayoutName::Native)));
    let mut state = 1u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // From 0.5 to 1 in steps of 2^-16, before the rounding to BF16.
        bf16::from_f32(f32::from_bits(0x3F00_0000 | (state >> 9 & 0x7F_FFFF))).to_le_bytes()
    };
    for (name, (_, _, bytes)) in &mut native {
        let fused = ["model.layers.0.", "model.layers.2."].iter().any(|l| name.starts_with(l));
        if fused && (name.contains("k_proj") || name.contains("v_proj")) {
            let scaled = |pair: &mut [u8]| pair.copy_from_slice(&number());
            bytes.chunks_mut(2).for_each(scaled);
            // One largest value in each block of the fused grid, but none in rows 128 to 255 of K,
            // which are one block of the plain grid.
            let rows =
                if name.contains("k_proj") { [5, 300].as_slice() } else { &[10, 70, 140, 198] };
            for row in rows {
                for col in [3, 130] {
                    bytes[(row * 136 + col) * 2..][..2]
                        .copy_from_slice(&bf16::from_f32(4.0).to_le_bytes());
                }
            }
        }
    }
    let source = dir.path().join("native");
    write(&source, &config_of(&checkpoint), &native);
    let back = write_view("mimo-v2-flash", &source, &quantized(None), dir.path().join("back"));
    let blocks = |reading| {
        let verdict = common::verified(&back, &["--kv-scales", reading]);
        let count = |key| verdict["fp8_blocks"][key].as_u64().unwrap();
        (count("blocks"), count("with_largest"))
    };
    let (all, with_largest) = blocks("fused");
    assert!(all > 80, "{all}");
    assert_eq!(with_largest, all);
    let (all, with_largest) = blocks("automodel");
    assert!(with_largest < all, "{with_largest} of {all}");
}
