//! Work lists: every visible (row, key) pair exactly once, whatever the batch. Pure, no GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use gqa::params::{MAP_KEYS, MAP_TILES, WHOLE, WorkItem};
use gqa::plan::{StepAppend, StepSequence, Traffic, WorkLists};
use gqa::{AttentionSpec, Caps, Dtype, Family, Mask, Options, Plan};
use proptest::prelude::*;

fn caps() -> [Caps; 3] {
    let minimal = Caps::minimal();
    let gpu = Caps { workgroup_memory: 32 << 10, subgroup: Some((32, 32)), ..minimal.clone() };
    [Caps { subgroup: Some((8, 8)), software: true, ..gpu.clone() }, minimal, gpu]
}

fn spec() -> impl Strategy<Value = AttentionSpec> {
    let window = || prop::option::of(0u32..200);
    (1u32..=20, 1u32..=3, 1u32..=256, 1u32..=256, any::<bool>(), (window(), window())).prop_map(
        |(group, kv_heads, dim, v_dim, causal, (left, right))| {
            let builder = AttentionSpec::builder(group * kv_heads, kv_heads, dim).v_head_dim(v_dim);
            builder.kv_dtype(Dtype::F16).causal(causal).window(left, right).build().unwrap()
        },
    )
}

fn sequence() -> impl Strategy<Value = (StepSequence, StepAppend)> {
    (0u32..60, 0u32..700, -70i32..700, any::<bool>(), 0u32..700).prop_map(
        |(q_len, kv_len, at, aligned, new)| {
            let q_start =
                if aligned { kv_len as i32 - q_len as i32 } else { at.clamp(-(q_len as i32), kv_len as i32) };
            let new_len = new.min(kv_len);
            let slot = kv_len - new_len;
            let append = StepAppend { len: new_len, slot, position: slot, ..StepAppend::default() };
            (StepSequence { q_len, q_start, kv_len, ..StepSequence::default() }, append)
        },
    )
}

/// Sequences with tokens and cache rows of their own.
fn batch() -> impl Strategy<Value = (Vec<StepSequence>, Vec<StepAppend>)> {
    prop::collection::vec(sequence(), 0..6).prop_map(|mut sequences| {
        let (mut token, mut new_token) = (0, 0);
        for (i, (s, append)) in sequences.iter_mut().enumerate() {
            (s.token, s.cache_row) = (token, i as u32 * 10_000);
            (append.token, append.cache_row) = (new_token, s.cache_row);
            token += s.q_len;
            new_token += append.len;
        }
        sequences.into_iter().unzip()
    })
}

/// Keys that a row walks, over all items of its sequence; each at most once.
fn walked(lists: &WorkLists, s: &StepSequence, row: u32) -> BTreeSet<u32> {
    let mut keys = BTreeSet::new();
    let items = lists.prefill.iter().chain(&lists.decode);
    for item in items.filter(|i| i.cache_row == s.cache_row && (i.row_begin..i.row_end).contains(&row)) {
        assert_eq!((item.token, item.kv_len, item.q_start), (s.token, s.kv_len, s.q_start));
        for key in item.key_begin..item.key_end {
            assert!(keys.insert(key), "row {row} walks key {key} twice");
        }
    }
    keys
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_visible_pair_is_walked_once(
        spec in spec(), batch in batch(), adapter in 0usize..3, chunk in prop::option::of(1u32..300), portable: bool,
    ) {
        let family = if portable { Family::Portable } else { Family::Auto };
        let options = Options { chunk, family, ..Options::default() };
        let plan = Plan::new(&spec, &caps()[adapter], &options).unwrap();
        let (batch, appends) = batch;
        let lists = plan.work(&batch, &appends);
        for s in &batch {
            for row in 0..s.q_len * spec.group() {
                let visible = spec.visible(i64::from(s.q_start) + i64::from(row / spec.group()), s.kv_len);
                let keys = walked(&lists, s, row);
                // All that it sees, and of the rest only what another row of its tile sees.
                prop_assert!(visible.clone().all(|key| keys.contains(&key)), "row {row} misses a key");
                prop_assert!(keys.last().is_none_or(|last| *last < s.kv_len));
            }
        }
        // No tile is longer than what its first and last row see.
        for item in lists.prefill.iter().chain(&lists.decode) {
            let of = |row: u32| spec.visible(i64::from(item.q_start) + i64::from(row / spec.group()), item.kv_len);
            prop_assert!(item.key_end <= of(item.row_end - 1).end);
            prop_assert!(item.key_begin >= of(item.row_begin).start.min(item.key_end));
            prop_assert!(item.key_begin <= item.key_end && item.row_begin < item.row_end);
        }
    }

    #[test]
    fn states_are_apart_and_all_merged(spec in spec(), batch in batch(), adapter in 0usize..3, chunk in 1u32..200) {
        let options = Options { chunk: Some(chunk), ..Options::default() };
        let plan = Plan::new(&spec, &caps()[adapter], &options).unwrap();
        let (batch, appends) = batch;
        let lists = plan.work(&batch, &appends);
        let mut spans: BTreeMap<u64, (u64, &WorkItem)> = BTreeMap::new();
        for item in lists.prefill.iter().chain(&lists.decode).filter(|item| item.state != WHOLE) {
            let rows = u64::from(spec.kv_heads() * (item.row_end - item.row_begin));
            prop_assert!(spans.insert(u64::from(item.state), (rows, item)).is_none());
        }
        let mut next = 0;
        for (state, (rows, _)) in &spans {
            prop_assert_eq!(*state, next, "states overlap or leave gaps");
            next = state + rows;
        }
        prop_assert_eq!(next, lists.state_rows);
        // `combine` finds the chunks of a tile one behind the other.
        let mut merged = 0;
        for tile in &lists.combine {
            prop_assert!(tile.row_end - tile.row_begin <= lists.combine_rows && tile.chunks > 1);
            let stride = spec.kv_heads() * (tile.row_end - tile.row_begin);
            for chunk in 0..tile.chunks {
                let (_, item) = spans[&u64::from(tile.state + chunk * stride)];
                prop_assert_eq!((item.token, item.row_begin, item.row_end), (tile.token, tile.row_begin, tile.row_end));
                merged += 1;
            }
        }
        prop_assert_eq!(merged, spans.len());
    }

    #[test]
    fn maps_are_apart(spec in spec(), batch in batch(), adapter in 0usize..3, chunk in prop::option::of(1u32..300)) {
        let spec = spec.to_builder().mask(Mask::Keep).build().unwrap();
        let plan = Plan::new(&spec, &caps()[adapter], &Options { chunk, ..Options::default() }).unwrap();
        // Tiles that kernels stage are the tiles of the map, or parts of them.
        prop_assert!([plan.prefill(), plan.decode()].iter().all(|v| MAP_KEYS.is_multiple_of(v.tile.keys)));
        let (batch, appends) = batch;
        let lists = plan.work(&batch, &appends);
        let mut next = 0;
        let mut maps: Vec<_> = lists.prefill.iter().chain(&lists.decode).collect();
        maps.sort_by_key(|item| (item.map, item.key_end - item.key_begin));
        for item in maps {
            prop_assert_eq!(u64::from(item.map), next, "maps overlap or leave gaps");
            let words = (item.key_end - item.key_begin).div_ceil(MAP_KEYS).div_ceil(MAP_TILES);
            next += u64::from(words * spec.kv_heads());
        }
        prop_assert_eq!(next, lists.map_words);
    }

    #[test]
    fn every_new_token_is_appended_once(spec in spec(), batch in batch()) {
        let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
        let (batch, appends) = batch;
        let lists = plan.work(&batch, &appends);
        let mut written = BTreeSet::new();
        for run in &lists.append {
            for i in 0..run.tokens {
                prop_assert!(written.insert((run.cache_row, run.slot + i, run.token + i, run.position + i as i32)));
            }
        }
        let wanted = appends.iter().flat_map(|a| {
            (0..a.len).map(|i| (a.cache_row, a.slot + i, a.token + i, (a.position + i) as i32))
        });
        prop_assert_eq!(written, wanted.collect());
    }
}

#[test]
fn states_never_exceed_a_binding() {
    // 1,000 decodes in chunks of 1 key would need 1,000 x 1,000 states of 1 KiB.
    let spec = AttentionSpec::builder(4, 1, 256).build().unwrap();
    let caps = Caps { binding_size: 1 << 20, ..Caps::minimal() };
    let plan = Plan::new(&spec, &caps, &Options { chunk: Some(1), ..Options::default() }).unwrap();
    let decode = |i| StepSequence {
        token: i,
        q_len: 1,
        q_start: 999,
        kv_len: 1000,
        cache_row: i * 1000,
        ..StepSequence::default()
    };
    let lists = plan.work(&(0..1000).map(decode).collect::<Vec<_>>(), &[]);
    assert!(lists.state_rows * plan.state_row_bytes() <= 1 << 20);
    assert_eq!(lists.decode.len(), 1000);
}

#[test]
fn chunks_fill_the_device_and_no_more() {
    let spec = AttentionSpec::builder(32, 8, 128).build().unwrap();
    let caps = Caps::minimal();
    let plan = Plan::new(&spec, &caps, &Options::default()).unwrap();
    let sequence = |q_len, kv_len: u32| StepSequence {
        token: 0,
        q_len,
        q_start: kv_len as i32 - q_len as i32,
        kv_len,
        ..StepSequence::default()
    };
    let workgroups = |s| plan.work(&[s], &[]).decode.len() as u32 * spec.kv_heads();
    // One long decode fills the device; a short one is not cut below 64 keys.
    assert_eq!(workgroups(sequence(1, 65_536)), caps.fill());
    assert_eq!(workgroups(sequence(1, 128)), 2 * 8);
    assert_eq!(workgroups(sequence(1, 64)), 8);
    // A long prefill fills it without cutting most of its tiles.
    let lists = plan.work(&[sequence(4096, 4096)], &[]);
    assert!(lists.combine.len() * 2 < 4096 * 4 / 32, "{} tiles are cut", lists.combine.len());
}

#[test]
fn traffic_counts_each_key_once_per_sequence() {
    let spec = AttentionSpec::builder(32, 8, 128).kv_dtype(Dtype::F16).build().unwrap();
    let decode = StepSequence { token: 0, q_len: 1, q_start: 4095, kv_len: 4096, ..StepSequence::default() };
    let traffic = Traffic::of(&spec, &[decode]);
    assert_eq!(traffic.bytes, 4096 * 8 * 256 * 2 + 32 * 256 * 4);
    assert_eq!(traffic.flops, 2 * 32 * 4096 * 256);
    // Causal prefill: half of the square, and the diagonal.
    let prefill = StepSequence { q_len: 100, q_start: 0, kv_len: 100, ..decode };
    assert_eq!(Traffic::of(&spec, &[prefill]).flops, 2 * 32 * (100 * 101 / 2) * 256);
}

#[test]
fn plans_tell_their_reasons() {
    let spec = AttentionSpec::builder(32, 8, 128).build().unwrap();
    for caps in caps() {
        let plan = Plan::new(&spec, &caps, &Options::default()).unwrap();
        let text = plan.to_string();
        for kernel in [plan.prefill().kernel, plan.decode().kernel] {
            assert!(text.contains(kernel.name()), "{text}");
        }
        assert!(text.contains("because") && text.contains("variants compiled: 4"), "{text}");
    }
}
