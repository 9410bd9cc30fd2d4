//! Which kernels are looked at: what gqa plans on the device for a choice of specs.

use std::collections::HashSet;

use gqa::shader::{Compiler, MatrixUnits, Variant, link};
use gqa::{AttentionSpec, Caps, Dtype, Mask, Options, Plan, Rope, alibi_slopes};

use crate::radv::Result;
use crate::spirv::spirv;

/// A name and a spec each: the shapes of common models, storage types, and features together.
pub(crate) fn specs() -> Result<Vec<(String, AttentionSpec)>> {
    let mut specs = Vec::new();
    let heads = |group: u32, dim| AttentionSpec::builder(8 * group, 8, dim);
    for dim in [64, 80, 128, 256] {
        for group in [1, 4, 8] {
            specs.push((format!("d{dim}-g{group}-f16"), heads(group, dim).kv_dtype(Dtype::F16).build()?));
        }
    }
    for (dim, group, kv) in [
        (128, 4, Dtype::F32),
        (64, 4, Dtype::Q8),
        (128, 4, Dtype::Q8),
        (128, 4, Dtype::Q4),
        (256, 8, Dtype::Q4),
    ] {
        specs.push((format!("d{dim}-g{group}-{kv}"), heads(group, dim).kv_dtype(kv).build()?));
    }
    let half = || heads(4, 128).q_dtype(Dtype::F16).kv_dtype(Dtype::F16);
    specs.push(("d128-g4-f16-q16".to_owned(), half().build()?));
    let all = half().window(100, 3).softcap(30.0).sinks(true).alibi(&alibi_slopes(32)).qk_norm(1e-6);
    specs.push(("d128-g4-f16-all".to_owned(), all.rope(Rope::new(128)).mask(Mask::Add).build()?));
    let rotated = heads(4, 128).kv_dtype(Dtype::Q4).rotated(true);
    specs.push(("d128-g4-q4-rotated".to_owned(), rotated.rope(Rope::new(128)).build()?));
    Ok(specs)
}

/// A variant to compile.
pub(crate) struct Candidate {
    /// Kernel and spec: what the budget calls it.
    pub(crate) name: String,
    /// What is linked.
    pub(crate) variant: Variant,
    /// What the driver gets.
    pub(crate) words: Vec<u32>,
}

/// What gqa plans on `caps`, each text for the driver once, as far as the filters (parts of names, any of them) let through.
pub(crate) fn candidates(caps: &Caps, filters: &[String]) -> Result<Vec<Candidate>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for (spec_name, spec) in specs()? {
        let plan = Plan::new(&spec, caps, &Options::default())?;
        let (merge, schedule) = (plan.merge(), plan.schedule());
        let options = Options { matrix_units: MatrixUnits::Cooperative, ..Options::default() };
        // What has no matrix units, or no products of f16, is refused.
        let matrices = Plan::new(&spec, caps, &options).ok();
        let matrices = matrices.as_ref().map(Plan::prefill);
        for variant in plan.variants().into_iter().chain([&merge, &schedule]).chain(matrices) {
            let name = format!("{} {spec_name}", variant.kernel);
            let linked = link(variant, Compiler::Naga);
            let words = spirv(&linked.text).map_err(|e| linked.explain(&e.to_string()))?;
            // Before the filters: what a name stands for must not depend on them.
            if seen.insert(words.clone()) && matches(&name, filters) {
                found.push(Candidate { name, variant: variant.clone(), words });
            }
        }
    }
    Ok(found)
}

/// Whether one of the filters is in `name` word by word: "prefill g4" finds `prefill d128-g4-f16`.
pub(crate) fn matches(name: &str, filters: &[String]) -> bool {
    filters.is_empty() || filters.iter().any(|filter| filter.split(' ').all(|word| name.contains(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_words() {
        let filters = |f: &str| vec![f.to_owned()];
        assert!(matches("prefill d128-g4-f16", &[]));
        assert!(matches("prefill d128-g4-f16", &filters("prefill g4")));
        assert!(!matches("prefill d128-g4-f16", &filters("prefill g8")));
    }

    #[test]
    fn every_spec_translates() {
        let caps = Caps { f16: true, unpack_f16: true, subgroup: Some((32, 64)), ..Caps::minimal() };
        let all = candidates(&caps, &[]).unwrap();
        let names: HashSet<_> = all.iter().map(|c| &c.name).collect();
        assert_eq!(names.len(), all.len());
        assert!(names.len() > 60, "{}", names.len());
    }
}
