//! Writes the linked shaders of a few specs, as a browser would get them: `cargo run --example shaders -- FOLDER`.
//!
//! For compilers that are not linked in, such as `tint`, and for reading.

use std::collections::BTreeMap;

use gqa::plan::BackwardPlan;
use gqa::shader::{Compiler, link};
use gqa::{AttentionSpec, Caps, Class, Dtype, Mask, Options, Pairing, Plan, Rope, alibi_slopes};

/// A name and a spec each: ordinary shapes, then features one by one and together.
fn specs() -> Result<Vec<(String, AttentionSpec)>, gqa::Error> {
    let mut specs = Vec::new();
    for (q_heads, kv_heads, dim) in [(32, 32, 64), (32, 8, 128), (71, 1, 80), (9, 3, 33)] {
        for (q_dtype, kv_dtype) in
            [(Dtype::F32, Dtype::F32), (Dtype::F16, Dtype::F16), (Dtype::F32, Dtype::Bf16)]
        {
            let builder = AttentionSpec::builder(q_heads, kv_heads, dim).q_dtype(q_dtype).kv_dtype(kv_dtype);
            specs.push((format!("{q_heads}-{kv_heads}-{dim}-{q_dtype}-{kv_dtype}"), builder.build()?));
        }
    }
    // What few bits store, keys and values alike and not, as it is and rotated.
    let few = [
        (Dtype::Fp8, Dtype::Fp8),
        (Dtype::Q8, Dtype::Q8),
        (Dtype::Q4, Dtype::Q4),
        (Dtype::Q8, Dtype::Q4),
        (Dtype::Fp8, Dtype::Q4),
        (Dtype::Q4, Dtype::F16),
        (Dtype::Bf16, Dtype::Q8),
    ];
    for (nth, (k, v)) in few.into_iter().enumerate() {
        for (rotated, name) in [(false, "plain"), (true, "rotated")] {
            for (head_dim, v_head_dim) in [(128, 128), (70, 33)] {
                let builder = AttentionSpec::builder(12, 4, head_dim).v_head_dim(v_head_dim).rotated(rotated);
                let q_dtype = if nth % 2 == 0 { Dtype::F32 } else { Dtype::F16 };
                let builder = builder.q_dtype(q_dtype).kv_dtype(k).v_dtype(v).sinks(true).qk_norm(1e-6);
                let spec = builder.rope(Rope::new(32)).build()?;
                specs.push((format!("{head_dim}-{v_head_dim}-{q_dtype}-{k}-{v}-{name}"), spec));
            }
        }
    }
    let half = || AttentionSpec::builder(8, 2, 64).q_dtype(Dtype::F16).kv_dtype(Dtype::F16);
    let all = |mask| {
        let builder = half().window(100, 3).softcap(30.0).sinks(true).alibi(&alibi_slopes(8));
        builder.qk_norm(1e-6).rope(Rope::new(32)).mask(mask)
    };
    let features = [
        ("window", half().window(100, None)),
        ("softcap", half().softcap(30.0)),
        ("sinks", half().sinks(true)),
        ("alibi", half().alibi(&alibi_slopes(8))),
        ("norm", half().qk_norm(1e-6)),
        ("rope", half().rope(Rope { pairing: Pairing::Interleaved, ..Rope::new(64) })),
        ("tree", all(Mask::Tree)),
        ("keep", all(Mask::Keep)),
        ("add", all(Mask::Add)),
        ("mla", AttentionSpec::builder(16, 1, 576).v_in_k(512)),
        ("mla-fp8", AttentionSpec::builder(16, 1, 576).v_in_k(512).kv_dtype(Dtype::Fp8)),
        ("mla-q8", AttentionSpec::builder(16, 1, 576).v_in_k(512).kv_dtype(Dtype::Q8)),
        ("rotated-tree", all(Mask::Tree).kv_dtype(Dtype::Q4).rotated(true)),
        ("rotated-keep", all(Mask::Keep).kv_dtype(Dtype::Q8).rotated(true)),
        ("rotated-add", all(Mask::Add).kv_dtype(Dtype::Fp8).rotated(true)),
    ];
    for (name, builder) in features {
        specs.push((name.to_owned(), builder.build()?));
    }
    Ok(specs)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("name a folder")?;
    let minimal = Caps { unpack_f16: true, ..Caps::minimal() };
    let gpu = Caps { subgroup: Some((32, 32)), f16: true, workgroup_memory: 32 << 10, ..minimal.clone() };
    let software = Caps { subgroup: Some((8, 8)), class: Class::Software, ..minimal.clone() };
    let mut texts = BTreeMap::new();
    for (adapter, caps) in [("minimal", minimal), ("gpu", gpu), ("software", software)] {
        for (name, spec) in specs()? {
            let plan = Plan::new(&spec, &caps, &Options::default())?;
            let (merge, schedule) = (plan.merge(), plan.schedule());
            // Of what trains.
            let backward = plan.backward().ok();
            let backward = backward.iter().flat_map(BackwardPlan::variants);
            for variant in plan.variants().into_iter().chain([&merge, &schedule]).chain(backward) {
                let file = format!("{}-{adapter}-{name}.wgsl", variant.kernel);
                texts.insert(file, link(variant, Compiler::Tint).text);
            }
        }
    }
    std::fs::create_dir_all(&folder)?;
    for (name, text) in &texts {
        std::fs::write(std::path::Path::new(&folder).join(name), text)?;
    }
    println!("{} shaders in {folder}", texts.len());
    Ok(())
}
