//! Every shader variant that plans can emit, through naga to every target; and structs, Rust against WGSL. No GPU needed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use gqa::params::{AppendItem, CombineItem, PackHead, PackItem, Params, WorkItem};
use gqa::shader::{Compiler, Kernel, Variant, link};
use gqa::{AttentionSpec, Caps, Dtype, Mask, Options, Pairing, Plan, Rope, SpecBuilder, alibi_slopes};
use naga::back::{glsl, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

/// Adapters as they are: the poorest, ones without f16, a software one, ordinary GPUs.
fn adapters() -> Vec<Caps> {
    let minimal = Caps::minimal();
    let gpu =
        Caps { workgroup_memory: 32 << 10, unpack_f16: true, subgroup: Some((32, 32)), ..minimal.clone() };
    let software = Caps { software: true, ..gpu.clone() };
    vec![
        Caps { unpack_f16: true, ..minimal.clone() },
        Caps { subgroup: Some((16, 32)), f16: true, ..gpu.clone() },
        Caps { subgroup: Some((8, 8)), f16: true, ..software.clone() },
        Caps { subgroup: Some((4, 4)), unpack_f16: false, ..software },
        minimal,
        gpu,
    ]
}

fn specs() -> Vec<AttentionSpec> {
    let mut specs = Vec::new();
    for (q_heads, kv_heads) in [(1, 1), (9, 3), (32, 4), (71, 1)] {
        for (head_dim, v_head_dim) in [(1, 1), (64, 64), (128, 128), (127, 33), (256, 256), (192, 128)] {
            for q_dtype in [Dtype::F32, Dtype::F16] {
                for kv_dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                    for causal in [true, false] {
                        let builder =
                            AttentionSpec::builder(q_heads, kv_heads, head_dim).v_head_dim(v_head_dim);
                        specs.push(
                            builder.q_dtype(q_dtype).kv_dtype(kv_dtype).causal(causal).build().unwrap(),
                        );
                    }
                }
            }
        }
    }
    // One after the other, then all at once: what a feature links must stand alone, and with the others.
    for dtype in [Dtype::F32, Dtype::F16] {
        let plain = || AttentionSpec::builder(6, 2, 34).q_dtype(dtype).kv_dtype(Dtype::F16);
        let rope = |pairing| Rope { pairing, ..Rope::new(32) };
        let each = [
            plain().window(4, 5),
            plain().softcap(30.0),
            plain().sinks(true),
            plain().alibi(&alibi_slopes(6)),
            plain().mask(Mask::Keep),
            plain().mask(Mask::Add),
            plain().mask(Mask::Tree),
            plain().rope(rope(Pairing::Half)),
            plain().rope(rope(Pairing::Interleaved)).mask(Mask::Tree),
            plain().qk_norm(1e-6),
            plain().v_in_k(20),
        ];
        let all = |builder: SpecBuilder, mask| {
            let builder = builder.window(4, 5).softcap(30.0).sinks(true).alibi(&alibi_slopes(6)).mask(mask);
            builder.rope(rope(Pairing::Half)).qk_norm(1e-6)
        };
        let masks = [Mask::Tree, Mask::Keep, Mask::Add];
        let together = masks.into_iter().flat_map(|m| [all(plain(), m), all(plain().v_in_k(20), m)]);
        specs.extend(each.into_iter().chain(together).map(|builder| builder.build().unwrap()));
        // The norms of a tile's rows are the last bytes that fit.
        specs.push(AttentionSpec::builder(14, 1, 172).v_head_dim(4).qk_norm(1e-6).build().unwrap());
        specs.push(AttentionSpec::builder(16, 1, 576).v_in_k(512).q_dtype(dtype).build().unwrap());
    }
    specs
}

/// Linked texts of all variants of all specs on all adapters, each once.
fn variants() -> BTreeMap<String, Variant> {
    let mut variants = BTreeMap::new();
    for spec in specs() {
        for caps in adapters() {
            for count_fetches in [false, true] {
                let plan = Plan::new(&spec, &caps, &Options { count_fetches, ..Options::default() }).unwrap();
                let merge = plan.merge();
                for variant in plan.variants().into_iter().chain([&merge]) {
                    variants.insert(link(variant, Compiler::Naga).text, variant.clone());
                }
            }
        }
    }
    variants
}

fn validate(text: &str, variant: &Variant) -> (naga::Module, ModuleInfo) {
    let linked = link(variant, Compiler::Naga);
    let context = format!("{:?}", variant.spec);
    let module = naga::front::wgsl::parse_str(text)
        .unwrap_or_else(|e| panic!("{context}: {}", linked.explain(&e.emit_to_string(text))));
    let capabilities =
        Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16 | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{context}: {}", linked.explain(&e.emit_to_string(text))));
    (module, info)
}

#[test]
fn every_variant_reaches_every_target() {
    let variants = variants();
    assert!(variants.len() > 500, "only {} variants: the matrix has shrunk", variants.len());
    let mut seen = BTreeMap::<&str, usize>::new();
    for (text, variant) in &variants {
        let (module, info) = validate(text, variant);
        let name = variant.kernel.name();
        *seen.entry(name).or_default() += 1;
        let bounds = naga::proc::BoundsCheckPolicies::default();
        let entry = || Some((naga::ShaderStage::Compute, "main".to_owned()));

        let options = spv::Options { lang_version: (1, 3), ..Default::default() };
        spv::write_vec(&module, &info, &options, None).unwrap_or_else(|e| panic!("{name} to SPIR-V: {e}"));

        let options =
            msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
        let pipeline = msl::PipelineOptions { entry_point: entry(), ..Default::default() };
        msl::write_string(&module, &info, &options, &pipeline)
            .unwrap_or_else(|e| panic!("{name} to MSL: {e}"));

        let options = hlsl::Options {
            shader_model: hlsl::ShaderModel::V6_2,
            fake_missing_bindings: true,
            ..Default::default()
        };
        let (mut out, pipeline) = (String::new(), hlsl::PipelineOptions { entry_point: entry() });
        hlsl::Writer::new(&mut out, &options, &pipeline)
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{name} to HLSL: {e}"));

        // GL has neither subgroups nor f16 in wgpu: plans for it use neither.
        if !variant.uses_subgroups() && !text.contains("enable f16") {
            let options = glsl::Options { version: glsl::Version::new_gles(310), ..Default::default() };
            let pipeline = glsl::PipelineOptions {
                shader_stage: naga::ShaderStage::Compute,
                entry_point: "main".to_owned(),
                multiview: None,
            };
            let mut out = String::new();
            glsl::Writer::new(&mut out, &module, &info, &options, &pipeline, bounds)
                .and_then(|mut writer| writer.write())
                .unwrap_or_else(|e| panic!("{name} to GLSL: {e}"));
        }
    }
    for kernel in Kernel::ALL {
        assert!(seen.contains_key(kernel.name()), "no plan has emitted {kernel}");
    }
}

#[test]
fn workgroup_memory_and_invocations_stay_within_the_adapter() {
    for spec in specs() {
        for caps in adapters() {
            let plan = Plan::new(&spec, &caps, &Options::default()).unwrap();
            for variant in plan.variants() {
                let (module, _) = validate(&link(variant, Compiler::Naga).text, variant);
                let context = module.to_ctx();
                let used: u32 = module
                    .global_variables
                    .iter()
                    .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
                    .map(|(_, v)| module.types[v.ty].inner.size(context).next_multiple_of(16))
                    .sum();
                let (kernel, most) = (variant.kernel, caps.workgroup_memory);
                assert!(
                    used <= most,
                    "{kernel} of {spec:?} uses {used} B of workgroup memory, {most} B exist"
                );
                assert!(
                    variant.tile.threads <= caps.invocations,
                    "{kernel} has {} invocations",
                    variant.tile.threads
                );
            }
        }
    }
}

/// Size and member offsets of a WGSL struct.
fn wgsl_struct(module: &naga::Module, name: &str) -> (u32, Vec<(String, u32)>) {
    let (_, ty) = module.types.iter().find(|(_, t)| t.name.as_deref() == Some(name)).unwrap();
    let naga::TypeInner::Struct { members, span } = &ty.inner else { panic!("{name} is not a struct") };
    (*span, members.iter().map(|m| (m.name.clone().unwrap(), m.offset)).collect())
}

macro_rules! assert_same_struct {
    ($module:expr, $ty:ident, $($field:ident),+) => {{
        let (size, members) = wgsl_struct($module, stringify!($ty));
        assert_eq!(size as usize, size_of::<$ty>(), "size of {}", stringify!($ty));
        let here = vec![$((stringify!($field).to_owned(), std::mem::offset_of!($ty, $field) as u32)),+];
        assert_eq!(members, here, "members of {}", stringify!($ty));
    }};
}

#[test]
fn structs_are_the_same_in_rust_and_wgsl() {
    let spec = AttentionSpec::builder(4, 2, 8).mask(Mask::Add).build().unwrap();
    let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
    let module = |variant| validate(&link(variant, Compiler::Naga).text, variant).0;
    let (prefill, combine, append) = (module(plan.prefill()), module(plan.combine()), module(plan.append()));
    for module in [&prefill, &combine, &append] {
        assert_same_struct!(
            module, Params, items, slots, lse, q_offset, q_token, q_head, out_offset, out_token, out_head,
            lse_offset, lse_token, lse_head, maps
        );
    }
    assert_same_struct!(
        &prefill, WorkItem, token, row_begin, row_end, key_begin, key_end, kv_len, q_start, cache_row, state,
        origin, mask, mask_head, mask_token, mask_key, map
    );
    assert_same_struct!(&combine, CombineItem, token, row_begin, row_end, state, chunks);
    assert_same_struct!(&append, AppendItem, token, tokens, slot, position, cache_row);
    let pack = module(plan.mask().unwrap().0);
    assert_same_struct!(&pack, PackItem, word, pitch, heads, q_len, kv_len, source);
    assert_same_struct!(&pack, PackHead, items, head_stride, token_stride, key_stride);
}

#[test]
fn a_line_of_linked_text_leads_back_to_its_file() {
    let spec = AttentionSpec::builder(4, 2, 8).build().unwrap();
    let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
    let linked = link(plan.decode(), Compiler::Naga);
    let line = 1 + linked.text.lines().position(|l| l.starts_with("fn main")).unwrap() as u32;
    let (file, at) = linked.locate(line);
    let source = include_str!("../shaders/decode.wgsl");
    assert_eq!(file, "shaders/decode.wgsl");
    assert!(source.lines().nth(at as usize - 1).unwrap().starts_with("fn main"));
    assert_eq!(
        linked.explain(&format!("error at wgsl:{line}:5 here")),
        format!("error at {file}:{at}:5 here")
    );
    assert_eq!(linked.locate(1).0, "prelude");
}

#[test]
fn shaders_hold_plain_wgsl_only() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let mut files = 0;
    for folder in [root.clone(), root.join("parts")] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            files += 1;
            assert_eq!(path.extension().unwrap(), "wgsl", "{path:?}");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("// "), "{path:?} does not say what it is");
            assert!(!text.lines().any(|l| l.starts_with('#')), "{path:?} has preprocessor lines");
        }
    }
    assert!(files > 20);
}

/// Parts that no variant links yet: they stand alone.
#[test]
fn codecs_of_the_cache_are_valid() {
    let text = concat!(
        include_str!("../shaders/parts/four_fp8.wgsl"),
        include_str!("../shaders/parts/four_block.wgsl"),
        include_str!("../shaders/parts/encode_fp8.wgsl"),
        include_str!("../shaders/parts/encode_block.wgsl"),
    );
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
    Validator::new(ValidationFlags::all(), Capabilities::empty())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
}
