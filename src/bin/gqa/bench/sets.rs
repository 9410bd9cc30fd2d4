//! What `gqa bench` measures: sections of rows, in groups that are alive at once.

use gqa::Dtype;
use gqa::profile::{Pass, Shape};

use crate::Failure;
use crate::info::SpecArgs;

/// A part of the report: rows that are read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    One,
    Context,
    Storage,
    Heads,
    Batch,
    Queries,
    Prefill,
    Backward,
}

impl Section {
    /// In the order of the report.
    pub(super) const ALL: [Self; 8] = [
        Self::One,
        Self::Context,
        Self::Storage,
        Self::Heads,
        Self::Batch,
        Self::Queries,
        Self::Prefill,
        Self::Backward,
    ];

    /// In JSON and CSV.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::One => "shape",
            Self::Context => "context",
            Self::Storage => "storage",
            Self::Heads => "heads",
            Self::Batch => "batch",
            Self::Queries => "queries",
            Self::Prefill => "prefill",
            Self::Backward => "backward",
        }
    }

    /// For people.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::One => "The shape asked for",
            Self::Context => "Decode by context",
            Self::Storage => "Decode by storage of K and V",
            Self::Heads => "Decode with other heads",
            Self::Batch => "Decode by batch",
            Self::Queries => "By query tokens",
            Self::Prefill => "Prefill",
            Self::Backward => "Training, forward and backward",
        }
    }
}

/// Rows that are prepared, measured in turns and dropped together.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group {
    pub(super) section: Section,
    pub(super) shapes: Vec<Shape>,
}

/// All that one run measures.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Set {
    pub(super) groups: Vec<Group>,
    /// What has no place, and why.
    pub(super) left_out: Vec<String>,
}

/// Bytes of caches that are alive at once.
const GROUP_BYTES: u64 = 4_000_000_000;

/// Contexts from a short question to a long book.
const CONTEXTS: [u32; 7] = [128, 512, 1024, 4096, 16_384, 65_536, 131_072];
const KV_HEADS: [u32; 3] = [32, 8, 1];
/// The context of rows that differ in something else, and a shorter one where all but the cache grows.
const CONTEXT: u32 = 16_384;
const SHORT_CONTEXT: u32 = 8192;
const BATCHES: [u32; 4] = [1, 4, 16, 64];
const BATCH_CONTEXT: u32 = 1024;
const QUERIES: [u32; 9] = [1, 2, 4, 8, 12, 16, 24, 32, 64];
const PREFILLS: [u32; 5] = [128, 512, 1024, 4096, 8192];

impl Set {
    /// One shape and nothing else.
    pub(super) fn one(shape: Shape) -> Self {
        Self { groups: vec![Group { section: Section::One, shapes: vec![shape] }], left_out: Vec::new() }
    }

    /// Rows of all groups.
    pub(super) fn rows(&self) -> usize {
        self.groups.iter().map(|group| group.shapes.len()).sum()
    }

    /// MHA, GQA and MQA at a few lengths: what takes seconds.
    pub(super) fn quick(spec: &SpecArgs, software: bool) -> Result<Self, Failure> {
        let (decodes, prefills) = if software {
            ([1024, 4096, 16_384], [128, 512])
        } else {
            ([4096, 16_384, 65_536], [1024, 4096])
        };
        let mut set = Self::default();
        set.add(Section::Context, units(spec, &decodes.map(|len| (1, len)))?);
        set.add(Section::Prefill, units(spec, &prefills.map(|len| (len, len)))?);
        Ok(set)
    }

    /// What training takes: each shape forward, and backward beside it.
    pub(super) fn backward(spec: &SpecArgs) -> Result<Self, Failure> {
        let small = SpecArgs { dim: 64, v_dim: None, v_in_k: false, ..spec.clone() };
        let shapes =
            [(&small, (9, 3), 1024), (&small, (9, 9), 1024), (spec, (32, 8), 512), (spec, (32, 32), 512)];
        let mut set = Self::default();
        for (spec, heads, len) in shapes {
            let spec = SpecArgs { kv_dtype: Dtype::F32, v_dtype: None, ..spec.clone() }.build(heads, true)?;
            let forward = Shape { spec, q_len: len, kv_len: len, batch: 1, pass: Pass::Forward };
            let backward = Shape { pass: Pass::Backward, ..forward.clone() };
            set.add(Section::Backward, vec![vec![forward, backward]]);
        }
        Ok(set)
    }

    /// Everything that this library has to be measured for.
    pub(super) fn standard(spec: &SpecArgs) -> Result<Self, Failure> {
        let gqa = spec.build((32, 8), true)?;
        let shape =
            |q_len, kv_len, batch| Shape { spec: gqa.clone(), q_len, kv_len, batch, pass: Pass::Infer };
        let small = SpecArgs { dim: 64, v_dim: None, v_in_k: false, ..spec.clone() };

        let mut storages = Vec::new();
        let plain = Dtype::ALL.map(|dtype| (dtype, spec.rotate));
        // Values that lie in keys are not rotated.
        let rotated = Some((Dtype::Q4, true)).filter(|_| !spec.v_in_k);
        for (dtype, rotate) in plain.into_iter().chain(rotated) {
            let of_dtype = SpecArgs { kv_dtype: dtype, v_dtype: None, rotate, ..spec.clone() };
            let shape = Shape { spec: of_dtype.build((32, 8), true)?, ..shape(1, CONTEXT, 1) };
            if !storages.contains(&shape) {
                storages.push(shape);
            }
        }
        let heads =
            [(&small, (9, 9), SHORT_CONTEXT), (&small, (9, 3), SHORT_CONTEXT), (spec, (64, 8), CONTEXT)];
        let heads = heads
            .into_iter()
            .map(|(spec, heads, kv_len)| Ok(Shape { spec: spec.build(heads, true)?, ..shape(1, kv_len, 1) }));
        let mut prefills = PREFILLS.map(|len| shape(len, len, 1)).to_vec();
        prefills.push(Shape { spec: small.build((32, 8), true)?, ..shape(1024, 1024, 1) });

        let mut set = Self::default();
        set.add(Section::Context, units(spec, &CONTEXTS.map(|len| (1, len)))?);
        set.add(Section::Storage, alone(storages));
        set.add(Section::Heads, alone(heads.collect::<Result<Vec<_>, Failure>>()?));
        set.add(Section::Batch, alone(BATCHES.map(|batch| shape(1, BATCH_CONTEXT, batch)).to_vec()));
        set.add(Section::Queries, alone(QUERIES.map(|q_len| shape(q_len, SHORT_CONTEXT, 1)).to_vec()));
        set.add(Section::Prefill, alone(prefills));
        Ok(set)
    }

    /// Adds groups of as many units as memory holds.
    fn add(&mut self, section: Section, units: Vec<Vec<Shape>>) {
        let bytes = |unit: &[Shape]| unit.iter().map(Shape::cache_bytes).sum::<u64>();
        // What cannot be alive together is measured one by one, if at all.
        let (units, large): (Vec<_>, Vec<_>) = units.into_iter().partition(|unit| bytes(unit) <= GROUP_BYTES);
        let (singles, too_large): (Vec<_>, Vec<_>) =
            large.into_iter().flatten().partition(|shape| shape.cache_bytes() <= GROUP_BYTES);
        self.left_out.extend(too_large.iter().map(|shape| {
            let gigabytes = |bytes: u64| bytes as f64 * 1e-9;
            let [found, room] = [shape.cache_bytes(), GROUP_BYTES].map(gigabytes);
            format!("{shape}: {found:.1} GB of K and V, this command holds {room:.0}")
        }));
        let units: Vec<_> = units.into_iter().chain(alone(singles)).collect();
        let sizes: Vec<_> = units.iter().map(|unit| bytes(unit)).collect();
        for group in pack(&sizes, GROUP_BYTES) {
            let shapes = group.into_iter().flat_map(|unit| units[unit].clone()).collect();
            self.groups.push(Group { section, shapes });
        }
    }
}

/// MHA, GQA and MQA at each pair of lengths, which are compared and so measured together.
fn units(spec: &SpecArgs, lengths: &[(u32, u32)]) -> Result<Vec<Vec<Shape>>, Failure> {
    let specs = KV_HEADS.map(|kv_heads| spec.build((32, kv_heads), true));
    let specs = specs.into_iter().collect::<Result<Vec<_>, _>>()?;
    let unit = |(q_len, kv_len): &(u32, u32)| {
        let shape = |spec: &gqa::AttentionSpec| Shape {
            spec: spec.clone(),
            q_len: *q_len,
            kv_len: *kv_len,
            batch: 1,
            pass: Pass::Infer,
        };
        specs.iter().map(shape).collect()
    };
    Ok(lengths.iter().map(unit).collect())
}

/// Each shape as a unit.
fn alone(shapes: Vec<Shape>) -> Vec<Vec<Shape>> {
    shapes.into_iter().map(|shape| vec![shape]).collect()
}

/// Indices of `sizes` in few groups of at most `room`: the largest first, each into the first group that has room. Within a group
/// they are in order.
fn pack(sizes: &[u64], room: u64) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(sizes[*i]));
    let mut groups: Vec<(u64, Vec<usize>)> = Vec::new();
    for i in order {
        match groups.iter_mut().find(|(used, _)| used + sizes[i] <= room) {
            Some((used, group)) => {
                *used += sizes[i];
                group.push(i);
            }
            None => groups.push((sizes[i], vec![i])),
        }
    }
    let mut groups: Vec<_> = groups.into_iter().map(|(_, group)| group).collect();
    groups.iter_mut().for_each(|group| group.sort_unstable());
    groups
}

/// Samples of a row that takes `seconds` for each, of at most `asked`: as many as a few seconds hold, and enough for a median where
/// that does not take half a minute.
pub(super) fn samples_for(seconds: f64, asked: usize) -> usize {
    const TOTAL_SECONDS: f64 = 2.0;
    const SLOW_SECONDS: f64 = 5.0;
    let least = if seconds > SLOW_SECONDS { 2 } else { 3 };
    ((TOTAL_SECONDS / seconds) as usize).max(least).min(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> SpecArgs {
        SpecArgs {
            heads: None,
            dim: 128,
            v_dim: None,
            dtype: Dtype::F32,
            kv_dtype: Dtype::F16,
            v_dtype: None,
            rotate: false,
            window: None,
            softcap: None,
            alibi: false,
            rope: None,
            v_in_k: false,
        }
    }

    #[test]
    fn groups_stay_within_memory_and_nothing_is_lost() {
        let groups = pack(&[5, 1, 6, 4, 3], 10);
        assert_eq!(groups, [vec![2, 3], vec![0, 1, 4]]);
        assert!(pack(&[], 10).is_empty());
    }

    #[test]
    fn the_standard_set_has_what_is_promised() {
        let set = Set::standard(&spec()).unwrap();
        assert!(set.left_out.is_empty());
        let bytes = |group: &Group| group.shapes.iter().map(Shape::cache_bytes).sum::<u64>();
        assert!(set.groups.iter().all(|group| bytes(group) <= GROUP_BYTES));
        let shapes: Vec<_> = set.groups.iter().flat_map(|group| &group.shapes).collect();
        let has = |(heads, dim): ((u32, u32), u32), dtype, (q_len, kv_len, batch)| {
            shapes.iter().any(|s| {
                (s.spec.q_heads(), s.spec.kv_heads()) == heads
                    && (s.spec.head_dim(), s.spec.k_dtype(), s.spec.v_dtype()) == (dim, dtype, dtype)
                    && (s.q_len, s.kv_len, s.batch) == (q_len, kv_len, batch)
            })
        };
        let gqa = ((32, 8), 128);
        for dtype in Dtype::ALL {
            assert!(has(gqa, dtype, (1, 16_384, 1)), "{dtype}");
        }
        assert!(has(((9, 3), 64), Dtype::F16, (1, 8192, 1)));
        for len in [128, 1024, 4096, 8192] {
            assert!(has(gqa, Dtype::F16, (len, len, 1)), "prefill {len}");
        }
        assert!(has(((32, 8), 64), Dtype::F16, (1024, 1024, 1)));
        for (kv_heads, len) in KV_HEADS.into_iter().flat_map(|heads| CONTEXTS.map(|len| (heads, len))) {
            assert!(has(((32, kv_heads), 128), Dtype::F16, (1, len, 1)), "32/{kv_heads} at {len}");
        }
        for q_len in QUERIES {
            assert!(has(gqa, Dtype::F16, (q_len, 8192, 1)), "{q_len} query tokens");
        }
        assert!(shapes.iter().all(|s| s.spec.causal()));
    }

    #[test]
    fn what_exceeds_memory_is_left_out_with_a_reason() {
        let set = Set::standard(&SpecArgs { kv_dtype: Dtype::F32, ..spec() }).unwrap();
        assert_eq!(set.left_out.len(), 1);
        assert!(set.left_out[0].contains("32/32 heads") && set.left_out[0].contains("131072 keys"));
    }

    #[test]
    fn slow_rows_have_fewer_samples() {
        assert_eq!(samples_for(0.03, 9), 9);
        assert_eq!(samples_for(0.25, 9), 8);
        assert_eq!(samples_for(1.0, 9), 3);
        assert_eq!(samples_for(11.0, 9), 2);
        assert_eq!(samples_for(11.0, 1), 1);
    }
}
