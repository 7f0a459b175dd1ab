//! The options of a view, and how a mapping is selected.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::{
    Tensor, Zeros, assert_same, config_of_view, copy_files, e4m3_to_f32, engine, golden,
    tensors_of_engine,
};
use half::{bf16, f16};
use mount_ckpt::{Checkpoint, Float, LayoutName, Mapping, Plan, PlanOptions};
use regex::Regex;

fn to(layout: LayoutName) -> PlanOptions {
    PlanOptions { to: Some(layout), ..PlanOptions::default() }
}

fn checkpoint(folder: &str) -> std::path::PathBuf {
    golden(folder).join("checkpoint")
}

#[test]
fn hf_views_have_published_names_and_no_quantization() {
    let cases = [
        ("mimo-v2-flash", "mimo-v2-flash", 75, &["weight_scale_inv"][..]),
        ("deepseek-v4-flash", "deepseek-v4", 188, &[".scale"]),
        ("deepseek-v4-base", "deepseek-v4", 188, &[".scale"]),
        ("kimi-k25-vl", "kimi-k25-vl", 73, &["weight_packed", "weight_scale", "weight_shape"]),
    ];
    for (folder, model, tensors, gone) in cases {
        let engine = engine(model, &checkpoint(folder), &to(LayoutName::Hf));
        let plan = engine.plan();
        assert_eq!(plan.tensors.len(), tensors, "{folder}");
        for tensor in &plan.tensors {
            assert!(
                gone.iter().all(|part| !tensor.name.ends_with(part)),
                "{folder} `{}`",
                tensor.name
            );
            let codes = ["F8_E4M3", "F8_E8M0", "I8"];
            assert!(!codes.contains(&tensor.dtype.name()), "{folder} `{}`", tensor.name);
        }
        let config = config_of_view(engine);
        assert_eq!(config.get("quantization_config"), None, "{folder}");
        assert_eq!(config["text_config"].get("quantization_config"), None, "{folder}");
    }
}

#[test]
fn hf_views_of_unquantized_checkpoints_are_verbatim() {
    let engine = engine("qwen3-vl-moe", &checkpoint("qwen3-vl-moe"), &to(LayoutName::Hf));
    let plan = engine.plan();
    assert!(plan.tensors.iter().all(|t| t.is_verbatim()));
    let source = Checkpoint::open(&checkpoint("qwen3-vl-moe")).unwrap();
    let names = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    let shown = names(plan.tensors.iter().map(|t| &*t.name).collect());
    assert_eq!(shown, names(source.tensors().iter().map(|t| &*t.name).collect()));
    assert_eq!(config_of_view(engine).get("quantization_config"), None);
}

#[test]
fn values_are_rounded_once_to_the_output_dtype() {
    for (folder, model) in
        [("mimo-v2-flash", "mimo-v2-flash"), ("deepseek-v4-flash", "deepseek-v4")]
    {
        let view = |dtype| {
            let options = PlanOptions { dtype, ..PlanOptions::default() };
            tensors_of_engine(&engine(model, &checkpoint(folder), &options))
        };
        let exact = view(Float::F32);
        let computed = computed(folder, model);
        for dtype in [Float::BF16, Float::F16] {
            let rounded = |(name, (from, shape, bytes)): (&String, &Tensor)| {
                if !computed.contains(name) {
                    return (name.clone(), (from.clone(), shape.clone(), bytes.clone()));
                }
                let number = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
                let round = |b: &[u8]| match dtype {
                    Float::BF16 => bf16::from_f32(number(b)).to_le_bytes(),
                    Float::F16 => f16::from_f32(number(b)).to_le_bytes(),
                    Float::F32 => unreachable!("both are narrower"),
                };
                let bytes = bytes.chunks(4).flat_map(round).collect();
                (name.clone(), (format!("{dtype:?}"), shape.clone(), bytes))
            };
            let expected: BTreeMap<String, Tensor> = exact.iter().map(rounded).collect();
            assert_same(&view(dtype), &expected, Zeros::Signed);
        }
    }
}

/// Tensors of the native view that are decoded or grouped. Only these have the output dtype.
fn computed(folder: &str, model: &str) -> BTreeSet<String> {
    let engine = engine(model, &checkpoint(folder), &PlanOptions::default());
    let computed = engine.plan().tensors.iter().filter(|t| !t.is_verbatim());
    let names: BTreeSet<String> = computed.map(|t| t.name.to_string()).collect();
    assert!(names.iter().any(|name| name.contains("experts")), "{names:?}");
    names
}

#[test]
fn filters_match_from_the_start_of_a_name() {
    let names = |include: &[&str], exclude: &[&str]| -> Vec<String> {
        let regexes = |texts: &[&str]| texts.iter().map(|t| Regex::new(t).unwrap()).collect();
        let options = PlanOptions {
            include: regexes(include),
            exclude: regexes(exclude),
            ..PlanOptions::default()
        };
        let engine = engine("mimo-v2-flash", &checkpoint("mimo-v2-flash"), &options);
        engine.plan().tensors.iter().map(|t| t.name.to_string()).collect()
    };
    assert_eq!(names(&["lm_head", r"model\.norm"], &[]), ["lm_head.weight", "model.norm.weight"]);
    let none = PlanOptions { include: vec![Regex::new("norm").unwrap()], ..PlanOptions::default() };
    let source = Checkpoint::open(&checkpoint("mimo-v2-flash")).unwrap();
    let mapping = Mapping::named("mimo-v2-flash").unwrap();
    let error = Plan::build(&source, &mapping, &none).unwrap_err().to_string();
    assert_eq!(error, "the view is empty: no tensor's name passes the filters");
    let without = names(&[], &[r"model\.mtp", "head"]);
    assert!(without.iter().all(|n| !n.starts_with("model.mtp")));
    assert!(without.contains(&"lm_head.weight".to_owned()));
}

/// The name of the mapping that is selected for a config.json.
fn chosen(config: &str) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let source = checkpoint("qwen3-vl-moe").join("model-00001-of-00003.safetensors");
    std::fs::copy(source, dir.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let types = checkpoint.config().model_types();
    let mapping = Mapping::for_model_types(&types).map_err(|e| e.to_string())?;
    Ok(mapping.list().name)
}

#[test]
fn config_json_chooses_the_mapping() {
    let cases = [
        (r#"{"model_type": "mimo_v2_flash"}"#, "mimo-v2-flash"),
        (r#"{"model_type": "deepseek_v4"}"#, "deepseek-v4"),
        (r#"{"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}"#, "kimi-k25-vl"),
        (r#"{"text_config": {"model_type": "qwen3_vl_moe"}}"#, "qwen3-vl-moe"),
    ];
    for (config, name) in cases {
        assert_eq!(chosen(config).as_deref(), Ok(name), "{config}");
    }
    let unknown = chosen(r#"{"model_type": "gpt2"}"#).unwrap_err();
    assert!(
        unknown.starts_with("no mapping for the checkpoint's model_type `gpt2`; known: "),
        "{unknown}"
    );
    assert!(unknown.contains("mimo_v2_flash"), "{unknown}");
}

#[test]
fn mtp_layers_beyond_the_depth_in_config_json_are_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    copy_files(&checkpoint("deepseek-v4-base"), dir.path());
    let config = dir.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let none = text.replace("\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 0");
    assert_ne!(text, none);
    std::fs::write(&config, none).unwrap();
    let engine = engine("deepseek-v4", dir.path(), &PlanOptions::default());
    let plan = engine.plan();
    assert!(plan.tensors.iter().all(|t| !t.name.starts_with("mtp")));
    let dropped: Vec<_> = plan.summary.dropped.iter().collect();
    assert_eq!(dropped.len(), 1);
    assert_eq!(dropped[0].0, "MTP depth at or above num_nextn_predict_layers");
    let summary = plan.summary.to_string();
    assert!(summary.contains("tensors left out: MTP depth at or above"), "{summary}");
}

#[test]
fn stacked_fp8_experts_are_dequantized_with_their_scales() {
    // The FP8 release of Qwen3-VL-MoE has codes `[experts, hidden, 2 * intermediate]` and one scale
    // for each 128x128 block of each expert. Neither size is a multiple of 128 here.
    let (experts, hidden, cols) = (3usize, 200usize, 144usize);
    let grid = [hidden.div_ceil(128), cols.div_ceil(128)];
    let codes: Vec<u8> = (0..experts * hidden * cols)
        .map(|i| u8::try_from((i * 7 + i / 251) % 256).unwrap())
        .map(|code| if code & 0x7F == 0x7F { 0 } else { code })
        .collect();
    let scales: Vec<f32> = (0..experts * grid[0] * grid[1])
        .map(|i| 0.01 * f32::from(u8::try_from(i + 1).unwrap()))
        .collect();
    let scale_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
    let dir = tempfile::tempdir().unwrap();
    let config = format!(
        r#"{{"model_type": "qwen3_vl_moe", "text_config": {{"num_hidden_layers": 1, "num_experts": {experts},
            "hidden_size": {hidden}, "moe_intermediate_size": {}}},
            "quantization_config": {{"quant_method": "fp8", "weight_block_size": [128, 128]}}}}"#,
        cols / 2
    );
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let name = "model.language_model.layers.0.mlp.experts.gate_up_proj";
    use safetensors::tensor::{Dtype, TensorView};
    let down = vec![0; experts * cols / 2 * hidden * 2];
    let tensors = [
        (
            name.replace("gate_up", "down"),
            TensorView::new(Dtype::BF16, vec![experts, cols / 2, hidden], &down),
        ),
        (name.to_owned(), TensorView::new(Dtype::F8_E4M3, vec![experts, hidden, cols], &codes)),
        (
            format!("{name}_scale_inv"),
            TensorView::new(Dtype::F32, vec![experts, grid[0], grid[1]], &scale_bytes),
        ),
    ];
    let tensors = tensors.map(|(name, view)| (name, view.unwrap()));
    safetensors::serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).unwrap();

    // The checkpoint has only experts.
    let allow_missing = vec![regex::Regex::new("").unwrap()];
    let options = PlanOptions { allow_missing, ..PlanOptions::default() };
    let engine = engine("qwen3-vl-moe", Path::new(dir.path()), &options);
    assert!(engine.plan().summary.to_string().contains("WARNING: missing and allowed to be: `"));
    let got = tensors_of_engine(&engine);
    let (dtype, shape, bytes) = &got["model.language_model.layers.0.mlp.experts.gate_and_up_projs"];
    assert_eq!((dtype.as_str(), shape), ("BF16", &vec![experts, hidden, cols]));
    for (i, (code, pair)) in codes.iter().zip(bytes.chunks(2)).enumerate() {
        let (e, row, col) = (i / (hidden * cols), i / cols % hidden, i % cols);
        let scale = scales[(e * grid[0] + row / 128) * grid[1] + col / 128];
        let expected = bf16::from_f32(e4m3_to_f32(*code) * scale);
        assert_eq!(pair, expected.to_le_bytes(), "element [{e}, {row}, {col}]");
    }
}

#[test]
fn a_layout_that_a_mapping_lacks_is_refused() {
    let text = "name = 'x'\ntitle = 'X'\n[[native.rule]]\nhf = 'lm_head.{r}'\nto = 'head.{r}'";
    let checkpoint = Checkpoint::open(&checkpoint("qwen3-vl-moe")).unwrap();
    let mapping = Mapping::parse("x", text).unwrap();
    let error = Plan::build(&checkpoint, &mapping, &to(LayoutName::Transformers)).unwrap_err();
    let error = error.to_string();
    assert_eq!(error, "the mapping `x` has no `transformers` layout; it has: hf, native");
}
