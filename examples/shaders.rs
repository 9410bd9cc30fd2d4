//! Writes the linked shaders of a few specs, as a browser would get them: `cargo run --example shaders -- FOLDER`.
//!
//! For compilers that are not linked in, such as `tint`, and for reading.

use std::collections::BTreeMap;

use gqa::shader::{Compiler, link};
use gqa::{AttentionSpec, Caps, Dtype, Options, Plan};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("name a folder")?;
    let minimal = Caps { unpack_f16: true, ..Caps::minimal() };
    let gpu = Caps { subgroup: Some((32, 32)), f16: true, workgroup_memory: 32 << 10, ..minimal.clone() };
    let software = Caps { subgroup: Some((8, 8)), software: true, ..minimal.clone() };
    let mut texts = BTreeMap::new();
    for (adapter, caps) in [("minimal", minimal), ("gpu", gpu), ("software", software)] {
        for (q_heads, kv_heads, dim) in [(32, 32, 64), (32, 8, 128), (71, 1, 80), (9, 3, 33)] {
            for (q_dtype, kv_dtype) in
                [(Dtype::F32, Dtype::F32), (Dtype::F16, Dtype::F16), (Dtype::F32, Dtype::Bf16)]
            {
                let spec = AttentionSpec::builder(q_heads, kv_heads, dim)
                    .q_dtype(q_dtype)
                    .kv_dtype(kv_dtype)
                    .build()?;
                for variant in Plan::new(&spec, &caps, &Options::default())?.variants() {
                    let kernel = variant.kernel;
                    let name =
                        format!("{kernel}-{adapter}-{q_heads}-{kv_heads}-{dim}-{q_dtype}-{kv_dtype}.wgsl");
                    texts.insert(name, link(variant, Compiler::Tint).text);
                }
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
