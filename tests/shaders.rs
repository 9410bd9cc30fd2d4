//! Every shader variant that plans can emit, through naga to every target; and structs, Rust against WGSL. No GPU needed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use gqa::params::{
    AppendItem, CombineItem, LoopHead, LoopTile, PackHead, PackItem, Params, StoreHead, StoreItem, WorkItem,
};
use gqa::plan::BackwardPlan;
use gqa::shader::{Access, Compiler, F16, Kernel, MatrixUnits, Variant, link};
use gqa::{AttentionSpec, Caps, Class, Dtype, Mask, Options, Pairing, Plan, Rope, SpecBuilder, alibi_slopes};
use naga::back::{glsl, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

/// Adapters as they are: the poorest, ones without f16, software ones, ordinary GPUs.
fn adapters() -> Vec<Caps> {
    let minimal = Caps::minimal();
    let gpu =
        Caps { workgroup_memory: 32 << 10, unpack_f16: true, subgroup: Some((32, 32)), ..minimal.clone() };
    let software = Caps { class: Class::Software, ..gpu.clone() };
    vec![
        Caps { unpack_f16: true, ..minimal.clone() },
        Caps { subgroup: Some((16, 32)), f16: true, cooperative_matrix: true, ..gpu.clone() },
        Caps { subgroup: Some((8, 8)), f16: true, ..software.clone() },
        Caps { subgroup: Some((8, 8)), f16: true, int64: true, vector_registers: 32, ..software.clone() },
        Caps { subgroup: Some((8, 8)), f16: true, int64: true, ..software.clone() },
        Caps { subgroup: Some((4, 4)), unpack_f16: false, ..software.clone() },
        Caps { subgroup: None, ..software },
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
                        let builder = AttentionSpec::builder(q_heads, kv_heads, head_dim);
                        let builder = builder.v_head_dim(v_head_dim).q_dtype(q_dtype).kv_dtype(kv_dtype);
                        specs.push(builder.causal(causal).build().unwrap());
                    }
                }
            }
        }
    }
    specs.extend(stored());
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

/// Every way to store keys and values, those of one differently from those of the other, rotated and not.
fn stored() -> Vec<AttentionSpec> {
    let mut specs = Vec::new();
    for (nth, k) in Dtype::ALL.into_iter().enumerate() {
        for v in Dtype::ALL {
            // Blocks that end within a row, fours that do, and rows of less than a block.
            for (head_dim, v_head_dim) in [(128, 64), (33, 100), (70, 7)] {
                let builder = AttentionSpec::builder(6, 2, head_dim).v_head_dim(v_head_dim);
                let builder = builder.kv_dtype(k).v_dtype(v).sinks(true).rope(Rope::new(32)).qk_norm(1e-6);
                let q_dtype = if nth % 2 == 0 { Dtype::F16 } else { Dtype::F32 };
                for (q_dtype, rotated) in [(q_dtype, false), (Dtype::F32, true), (Dtype::F16, true)] {
                    specs.push(builder.clone().q_dtype(q_dtype).rotated(rotated).build().unwrap());
                }
            }
        }
        for mask in [Mask::None, Mask::Tree, Mask::Keep, Mask::Add] {
            let builder = AttentionSpec::builder(8, 1, 64).kv_dtype(k).mask(mask).window(9, 3);
            let latent = AttentionSpec::builder(16, 1, 576).v_in_k(512).kv_dtype(k).mask(mask);
            specs.extend([builder.rotated(true), latent].map(|builder| builder.build().unwrap()));
        }
        // The longest rows, and the most of them.
        let builder = AttentionSpec::builder(71, 1, 576).v_head_dim(512).kv_dtype(k).qk_norm(1e-6);
        specs.push(builder.rotated(true).build().unwrap());
    }
    specs
}

/// A variant, with the poorest adapter that it is for.
type Emitted = (Variant, Caps);

fn keep_poorest(known: &mut Caps, caps: &Caps) {
    if caps.workgroup_memory < known.workgroup_memory {
        *known = caps.clone();
    }
}

/// What plans of a spec emit on all adapters, each once.
fn emitted(spec: &AttentionSpec) -> Vec<Emitted> {
    let mut emitted: Vec<Emitted> = Vec::new();
    for caps in adapters() {
        for (count_fetches, pooled) in [(false, false), (true, false), (false, true)] {
            let options = Options { count_fetches, pooled, ..Options::default() };
            let plan = Plan::new(spec, &caps, &options).unwrap();
            let (merge, schedule) = (plan.merge(), plan.schedule());
            let backward = plan.backward().ok();
            let backward = backward.iter().flat_map(BackwardPlan::variants);
            let matrices = [MatrixUnits::Cooperative, MatrixUnits::Emulated].map(|matrix_units| {
                Plan::new(spec, &caps, &Options { matrix_units, ..options.clone() }).ok()
            });
            let matrices = matrices.iter().flatten().map(Plan::prefill);
            let forward = plan.variants().into_iter().chain([&merge, &schedule]);
            for variant in forward.chain(backward).chain(matrices) {
                match emitted.iter_mut().find(|(known, _)| known == variant) {
                    Some((_, known)) => keep_poorest(known, &caps),
                    None => emitted.push((variant.clone(), caps.clone())),
                }
            }
        }
    }
    emitted
}

/// Linked texts of all variants of all specs, each once.
fn variants() -> &'static BTreeMap<String, Emitted> {
    static VARIANTS: OnceLock<BTreeMap<String, Emitted>> = OnceLock::new();
    VARIANTS.get_or_init(|| {
        let specs = specs();
        let linked = on_all_threads(&specs, |spec| {
            let link = |(variant, caps): Emitted| (link(&variant, Compiler::Naga).text, (variant, caps));
            emitted(spec).into_iter().map(link).collect::<Vec<_>>()
        });
        let mut variants = BTreeMap::<String, Emitted>::new();
        for (text, (variant, caps)) in linked.into_iter().flatten() {
            match variants.entry(text) {
                Entry::Occupied(mut known) => keep_poorest(&mut known.get_mut().1, &caps),
                Entry::Vacant(place) => _ = place.insert((variant, caps)),
            }
        }
        variants
    })
}

/// What `work` makes of each item; whichever thread is free takes the next.
fn on_all_threads<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let take = || {
        let taken = std::iter::from_fn(|| items.get(next.fetch_add(1, Ordering::Relaxed)));
        taken.map(&work).collect::<Vec<_>>()
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(take)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn validate(text: &str, variant: &Variant) -> (naga::Module, ModuleInfo) {
    let linked = link(variant, Compiler::Naga);
    let context = format!("{:?}", variant.spec);
    let module = naga::front::wgsl::parse_str(text)
        .unwrap_or_else(|e| panic!("{context}: {}", linked.explain(&e.emit_to_string(text))));
    let mut capabilities =
        Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16 | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::COOPERATIVE_MATRIX, variant.uses_matrix_units());
    capabilities.set(Capabilities::SHADER_INT64, variant.uses_int64());
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{context}: {}", linked.explain(&e.emit_to_string(text))));
    (module, info)
}

/// What the library binds is what the kernel uses, and written where the kernel writes.
fn check_bindings(module: &naga::Module, info: &ModuleInfo, variant: &Variant) {
    let bindings: BTreeMap<_, _> = variant.bindings().into_iter().collect();
    let used = info.get_entry_point(0);
    let globals = module.global_variables.iter().filter(|(handle, _)| !used[*handle].is_empty());
    for (_, global) in globals {
        let Some(binding) = &global.binding else { continue };
        let access = bindings.get(&binding.binding);
        let needed = match global.space {
            naga::AddressSpace::Uniform => Access::Uniform,
            naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => {
                Access::Write
            }
            _ => Access::Read,
        };
        assert_eq!(access, Some(&needed), "{} binds {:?} elsewhere", variant.kernel, global.name);
    }
}

/// Workgroup memory and invocations stay within the adapter.
fn check_limits(module: &naga::Module, variant: &Variant, caps: &Caps) {
    let of_workgroup = |v: &&naga::GlobalVariable| v.space == naga::AddressSpace::WorkGroup;
    let bytes =
        |v: &naga::GlobalVariable| module.types[v.ty].inner.size(module.to_ctx()).next_multiple_of(16);
    let used: u32 = module.global_variables.iter().map(|(_, v)| v).filter(of_workgroup).map(bytes).sum();
    let (Variant { kernel, spec, tile, .. }, most) = (variant, caps.workgroup_memory);
    assert!(used <= most, "{kernel} of {spec:?} uses {used} B of workgroup memory, {most} B exist");
    assert!(tile.threads <= caps.invocations, "{kernel} has {} invocations", tile.threads);
}

/// Writes a module for every target.
fn write(module: &naga::Module, info: &ModuleInfo, variant: &Variant) {
    let name = variant.kernel.name();
    let bounds = naga::proc::BoundsCheckPolicies::default();
    let entry = || Some((naga::ShaderStage::Compute, "main".to_owned()));

    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    spv::write_vec(module, info, &options, None).unwrap_or_else(|e| panic!("{name} to SPIR-V: {e}"));

    // Matrices of 16 x 16 are Vulkan's alone.
    if variant.uses_matrix_units() {
        return;
    }
    let options = msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
    let pipeline = msl::PipelineOptions { entry_point: entry(), ..Default::default() };
    msl::write_string(module, info, &options, &pipeline).unwrap_or_else(|e| panic!("{name} to MSL: {e}"));

    let shader_model = hlsl::ShaderModel::V6_2;
    let options = hlsl::Options { shader_model, fake_missing_bindings: true, ..Default::default() };
    let (mut out, pipeline) = (String::new(), hlsl::PipelineOptions { entry_point: entry() });
    hlsl::Writer::new(&mut out, &options, &pipeline)
        .write(module, info, None)
        .unwrap_or_else(|e| panic!("{name} to HLSL: {e}"));

    // GL has neither subgroups nor f16 in wgpu: plans for it use neither.
    if !variant.uses_subgroups() && variant.f16 != F16::Native {
        let options = glsl::Options { version: glsl::Version::new_gles(310), ..Default::default() };
        let pipeline = glsl::PipelineOptions {
            shader_stage: naga::ShaderStage::Compute,
            entry_point: "main".to_owned(),
            multiview: None,
        };
        let mut out = String::new();
        glsl::Writer::new(&mut out, module, info, &options, &pipeline, bounds)
            .and_then(|mut writer| writer.write())
            .unwrap_or_else(|e| panic!("{name} to GLSL: {e}"));
    }
}

#[test]
fn every_variant_reaches_every_target() {
    let variants: Vec<_> = variants().iter().collect();
    assert!(variants.len() > 5000, "only {} variants: the matrix has shrunk", variants.len());
    on_all_threads(&variants, |(text, (variant, caps))| {
        let (module, info) = validate(text, variant);
        check_bindings(&module, &info, variant);
        check_limits(&module, variant, caps);
        write(&module, &info, variant);
    });
    for kernel in Kernel::ALL {
        assert!(
            variants.iter().any(|(_, (variant, _))| variant.kernel == kernel),
            "no plan has emitted {kernel}"
        );
    }
}

/// Files that no plan links: ceilings are measured as they are.
const ALONE: [&str; 2] = ["shaders/ceiling_fma.wgsl", "shaders/ceiling_read.wgsl"];

#[test]
fn every_file_is_linked() {
    let mut linked = BTreeSet::new();
    for (text, (variant, _)) in variants() {
        let of = link(variant, Compiler::Naga);
        linked.extend((1..=text.lines().count() as u32).map(|line| of.locate(line).0));
    }
    for path in files() {
        let name =
            path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_str().unwrap().replace('\\', "/");
        assert_eq!(linked.contains(&*name), !ALONE.contains(&&*name), "{name}: is it linked?");
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
    let rotated = spec.to_builder().mask(Mask::None).kv_dtype(Dtype::Q4).rotated(true).build().unwrap();
    let rotated = Plan::new(&rotated, &Caps::minimal(), &Options::default()).unwrap();
    let (turned, embed) = (module(rotated.combine()), module(rotated.embed().unwrap()));
    let decode = module(rotated.decode());
    let classify = module(plan.mask().unwrap().1);
    let backward = plan.backward().unwrap();
    let (d_queries, d_keys) = (module(&backward.queries), module(&backward.keys));
    let d_rows = module(&backward.rows);
    for module in
        [&prefill, &combine, &append, &turned, &embed, &decode, &classify, &d_queries, &d_keys, &d_rows]
    {
        assert_same_struct!(
            module, Params, items, slots, page_shift, page_mask, pages, k_headers, v_headers, lse, q_offset,
            q_token, q_head, out_offset, out_token, out_head, lse_offset, lse_token, lse_head, maps, tokens,
            zero
        );
    }
    let store = module(&backward.store);
    assert_same_struct!(
        &store, StoreHead, items, dim, token, head, first, turns, out_offset, out_token, out_head
    );
    assert_same_struct!(&store, StoreItem, token, tokens, position);
    for module in [&prefill, &decode, &classify, &d_queries, &d_keys] {
        assert_same_struct!(
            module,
            WorkItem,
            token,
            row_begin,
            row_end,
            key_begin,
            key_end,
            q_start,
            pages,
            state,
            state_stride,
            origin,
            mask,
            mask_head,
            mask_token,
            mask_key,
            map,
            list
        );
    }
    for module in [&combine, &turned] {
        assert_same_struct!(module, CombineItem, token, row_begin, row_end, parts, count);
    }
    for module in [&append, &embed] {
        assert_same_struct!(module, AppendItem, token, tokens, slot, position, pages);
    }
    let schedule = plan.schedule();
    let schedule = module(&schedule);
    assert_same_struct!(
        &schedule,
        LoopHead,
        tiles,
        patches,
        sequences,
        least_chunk,
        most_chunk,
        chunk_step,
        fill,
        items,
        merges,
        head_words,
        parts,
        tiles_at,
        patches_at,
        sequences_at
    );
    assert_same_struct!(&schedule, LoopTile, sequence, token, row_begin, row_end, pages);
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
fn lines_of_the_walk_that_is_linked_twice_lead_back_to_one_file() {
    let caps = Caps { subgroup: Some((8, 8)), class: Class::Software, ..Caps::minimal() };
    let spec = AttentionSpec::builder(4, 2, 64).build().unwrap();
    let plan = Plan::new(&spec, &caps, &Options::default()).unwrap();
    let linked = link(plan.prefill(), Compiler::Naga);
    let source = include_str!("../shaders/parts/attend.wgsl");
    let at = 1 + source.lines().position(|line| line.starts_with("fn attend(")).unwrap() as u32;
    for name in ["fn attend(", "fn attend_few(", "fn main("] {
        let line = 1 + linked.text.lines().position(|line| line.starts_with(name)).unwrap() as u32;
        match linked.locate(line) {
            ("shaders/prefill_subgroup.wgsl", _) => assert_eq!(name, "fn main("),
            place => assert_eq!(place, ("shaders/parts/attend.wgsl", at), "{name}"),
        }
    }
}

/// Every file in `shaders`.
fn files() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let read = |folder| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let all: Vec<_> = [root.clone(), root.join("parts")].into_iter().flat_map(read).collect();
    all.into_iter().filter(|path| !path.is_dir()).collect()
}

#[test]
fn shaders_hold_plain_wgsl_only() {
    assert!(files().len() > 20);
    for path in files() {
        assert_eq!(path.extension().unwrap(), "wgsl", "{path:?}");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("// "), "{path:?} does not say what it is");
        assert!(!text.lines().any(|l| l.starts_with('#')), "{path:?} has preprocessor lines");
    }
}
