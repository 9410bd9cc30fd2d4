//! Work lists: every visible (row, key) pair exactly once, whatever the batch, the pages and what they share. Pure, no GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod backward;
mod walk;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use gqa::params::{MAP_KEYS, MAP_TILES, NO_LIST, WHOLE};
use gqa::plan::{Shared, Span, StepInput, StepSequence, Traffic, WorkLists};
use gqa::shader::{Kernel, MatrixUnits, Variant, team_lanes};
use gqa::{AttentionSpec, Caps, Class, Dtype, Family, Mask, Options, Plan};
use proptest::prelude::*;
use walk::Walk;
use world::{spec, spec_of_trees, world};

/// The second is one whose driver ends loops, so early that the walks of tests are cut.
fn caps() -> [Caps; 4] {
    let minimal = Caps::minimal();
    let gpu = Caps { workgroup_memory: 32 << 10, subgroup: Some((32, 32)), ..minimal.clone() };
    let software = Caps { class: Class::Software, ..gpu.clone() };
    let counted = Caps { loop_iterations: Some(2_000), subgroup: Some((8, 8)), ..software.clone() };
    [Caps { subgroup: Some((8, 8)), ..software }, counted, minimal, gpu]
}

fn plan(spec: &AttentionSpec, adapter: usize, chunk: Option<u32>, portable: bool) -> Plan {
    let family = if portable { Family::Portable } else { Family::Auto };
    Plan::new(spec, &caps()[adapter], &Options { chunk, family, ..Options::default() }).unwrap()
}

/// Tiles and chunks as a user may ask for them, and as every adapter here has room for them.
fn asked() -> impl Strategy<Value = Options> {
    let rows = |all: Vec<u32>| prop::option::of(prop::sample::select(all));
    let chunk = prop::option::of(1u32..300);
    let fill = prop::option::of(1u32..3000);
    (rows(vec![8, 16, 32]), rows(vec![1, 2, 3, 8]), fill, chunk, any::<bool>()).prop_map(
        |(prefill_rows, decode_rows, fill, chunk, portable)| {
            let family = if portable { Family::Portable } else { Family::Auto };
            // Wide heads leave room for few rows of decode, and lanes want whole shares.
            Options { family, prefill_rows, decode_rows, fill, chunk, ..Options::default() }
        },
    )
}

fn items(lists: &WorkLists) -> impl Iterator<Item = &gqa::params::WorkItem> {
    lists.prefill.iter().chain(&lists.decode).flatten()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_visible_pair_is_walked_once(
        (spec, world) in world(spec_of_trees(), false),
        adapter in 0usize..4, options in asked(),
    ) {
        let plan = Plan::new(&spec, &caps()[adapter], &options).unwrap();
        let mut input = world.input.clone();
        let lists = plan.work(&mut input);
        let walk = Walk::new(&plan, &world, &input, &lists);
        walk.check_coverage();
        walk.check_tightness();
        walk.check_places();
        walk.check_words();
    }

    #[test]
    fn states_are_apart_and_all_merged(
        (spec, world) in world(spec_of_trees(), false), adapter in 0usize..4, chunk in prop::option::of(1u32..200),
    ) {
        let plan = plan(&spec, adapter, chunk, false);
        let mut input = world.input.clone();
        let lists = plan.work(&mut input);
        Walk::new(&plan, &world, &input, &lists).check_states();
    }

    #[test]
    fn maps_are_apart(
        (spec, world) in world(spec(), true), adapter in 0usize..4, chunk in prop::option::of(1u32..300),
    ) {
        let spec = spec.to_builder().mask(Mask::Keep).build().unwrap();
        let plan = plan(&spec, adapter, chunk, false);
        // Tiles that kernels stage are the tiles of the map, or parts of them; teams look at several.
        for Variant { kernel, tile, .. } in [plan.prefill(), plan.decode()] {
            let whole = if *kernel == Kernel::DecodeTeams { tile.keys } else { MAP_KEYS };
            prop_assert!(whole.is_multiple_of(tile.keys) && whole.is_multiple_of(MAP_KEYS));
        }
        let lists = plan.work(&mut world.input.clone());
        let mut next = 0;
        let mut maps: Vec<_> = items(&lists).collect();
        maps.sort_by_key(|item| (item.map, item.key_end - item.key_begin));
        for item in maps {
            prop_assert_eq!(u64::from(item.map), next, "maps overlap or leave gaps");
            let words = (item.key_end - item.key_begin).div_ceil(MAP_KEYS).div_ceil(MAP_TILES);
            next += u64::from(words * spec.kv_heads());
        }
        prop_assert_eq!(next, lists.map_words);
    }

    #[test]
    fn every_new_token_is_appended_once_where_it_belongs((spec, world) in world(spec(), false)) {
        let plan = plan(&spec, 2, None, false);
        let mut input = world.input.clone();
        let lists = plan.work(&mut input);
        prop_assert_eq!(lists.append.len(), input.shards as usize);
        let mut written = BTreeMap::new();
        for (shard, run) in lists.append.iter().enumerate().flat_map(|(n, runs)| runs.iter().map(move |r| (n, r))) {
            prop_assert!((1..=plan.append().tile.rows).contains(&run.tokens));
            for i in 0..run.tokens {
                let place = (shard, run.pages, run.slot + i, run.position + i as i32);
                prop_assert_eq!(written.insert(run.token + i, place), None);
            }
        }
        for (new, table) in input.appends.iter().zip(&world.tables) {
            for i in 0..new.len {
                let slot = new.slot + i;
                let (shard, local) = table[(slot / world.page) as usize];
                let place = (shard as usize, new.pages, slot, (new.position + i) as i32);
                prop_assert_eq!(written.remove(&(new.token + i)), Some(place));
                let at = u64::from(new.pages.wrapping_add(slot / world.page)) - input.dense;
                prop_assert_eq!(input.words[at as usize], local);
            }
        }
        prop_assert!(written.is_empty());
    }

    #[test]
    fn the_same_step_gives_the_same_lists((spec, world) in world(spec_of_trees(), false), adapter in 0usize..4) {
        let plan = plan(&spec, adapter, None, false);
        let [mut a, mut b] = [world.input.clone(), world.input];
        prop_assert_eq!(plan.work(&mut a), plan.work(&mut b));
        prop_assert_eq!(a, b);
    }
}

/// A step of these sequences, in one shard.
fn step(sequences: Vec<StepSequence>) -> StepInput {
    StepInput { sequences, shards: 1, ..StepInput::default() }
}

/// One token after `kv_len - 1` others.
fn decode(token: u32, kv_len: u32) -> StepSequence {
    let q_start = kv_len as i32 - 1;
    StepSequence { token, q_len: 1, q_start, kv_len, ..StepSequence::default() }
}

#[test]
fn states_never_exceed_a_binding() {
    // 1,000 decodes in chunks of 1 key would need 1,000 x 1,000 states of 1 KiB.
    let spec = AttentionSpec::builder(4, 1, 256).build().unwrap();
    let caps = Caps { binding_size: 1 << 20, ..Caps::minimal() };
    let plan = Plan::new(&spec, &caps, &Options { chunk: Some(1), ..Options::default() }).unwrap();
    let lists = plan.work(&mut step((0..1000).map(|i| decode(i, 1000)).collect()));
    assert!(lists.state_rows * plan.state_row_bytes() <= 1 << 20);
    assert_eq!(lists.decode[0].len(), 1000);
}

/// Rotated outputs have states in any case. A prefill whose states alone are beyond what is spread gladly must not leave a long decode
/// beside it in one piece.
#[test]
fn a_long_decode_is_spread_beside_a_prefill_of_many_states() {
    let spec = AttentionSpec::builder(32, 8, 128).rotated(true).build().unwrap();
    let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
    let prefill = StepSequence { q_len: 5_000, kv_len: 5_000, ..StepSequence::default() };
    let lists = plan.work(&mut step(vec![prefill, decode(5_000, 100_000)]));
    let bytes = lists.state_rows * plan.state_row_bytes();
    let least = 5_001 * 32 * plan.state_row_bytes();
    assert!(least > 64 << 20 && bytes <= 2 * least, "{bytes} bytes of states, of {least}");
    assert!(lists.decode[0].len() > 2, "{} items of 100,000 keys", lists.decode[0].len());
}

#[test]
fn walks_end_before_the_driver_ends_them() {
    let spec = AttentionSpec::builder(71, 1, 256).causal(true).build().unwrap();
    let counted = Caps { loop_iterations: Some(65_535), ..Caps::minimal() };
    let plan = Plan::new(&spec, &counted, &Options { fill: Some(1), ..Options::default() }).unwrap();
    // The many states that this takes do not make chunks longer than that.
    let of = |q_len: u32, kv_len: u32| StepSequence {
        q_len,
        q_start: (kv_len - q_len) as i32,
        kv_len,
        ..decode(0, 1)
    };
    let longest = |input: &mut StepInput| {
        items(&plan.work(input)).map(|item| item.key_end - item.key_begin).max().unwrap()
    };
    let [few, many] =
        [(40, 100_000), (400, 400_000)].map(|(q_len, kv_len)| longest(&mut step(vec![of(q_len, kv_len)])));
    assert!((1_000..4_000).contains(&few), "{few} keys");
    assert_eq!(few.div_ceil(32), many.div_ceil(32), "{few} and {many} keys");
    let asked = Options { chunk: Some(u32::MAX), ..Options::default() };
    let plan = Plan::new(&spec, &counted, &asked).unwrap();
    let lists = plan.work(&mut step(vec![of(1, 100_000)]));
    assert!(items(&lists).all(|item| item.key_end - item.key_begin <= few));
    // Chunks are merged in loops, too.
    let asked = Options { chunk: Some(1), ..Options::default() };
    let plan = Plan::new(&spec, &counted, &asked).unwrap();
    let lists = plan.work(&mut step(vec![of(1, 100_000)]));
    assert!(lists.combine.iter().all(|item| item.count <= 65_535 / 8 + 1), "{:?}", lists.combine);
}

#[test]
fn chunks_fill_the_device_and_no_more() {
    let spec = AttentionSpec::builder(32, 8, 128).build().unwrap();
    let caps = Caps::minimal();
    let plan = Plan::new(&spec, &caps, &Options::default()).unwrap();
    let workgroups =
        |kv_len| plan.work(&mut step(vec![decode(0, kv_len)])).decode[0].len() as u32 * spec.kv_heads();
    // One long decode fills the device; a short one is not cut below 64 keys.
    assert_eq!(workgroups(65_536), plan.fill());
    assert_eq!(workgroups(128), 2 * 8);
    assert_eq!(workgroups(64), 8);
    // A long prefill fills it without cutting most of its tiles.
    let prefill = StepSequence { q_len: 4096, kv_len: 4096, ..StepSequence::default() };
    let lists = plan.work(&mut step(vec![prefill]));
    assert!(lists.combine.len() * 2 < 4096 * 4 / 32, "{} tiles are cut", lists.combine.len());
}

/// Eight decodes of 1,100 keys, of which they share 1,024.
fn cascade() -> StepInput {
    let own = |i| StepSequence { own_from: 1024, ..decode(i, 1100) };
    let members = Span { first: 0, count: 8 };
    StepInput {
        members: (0..8).collect(),
        shared: vec![Shared { key_begin: 0, key_end: 1024, members, ..Shared::default() }],
        ..step((0..8).map(own).collect())
    }
}

#[test]
fn a_shared_prefix_is_walked_once() {
    let spec = AttentionSpec::builder(8, 2, 64).build().unwrap();
    let plan =
        Plan::new(&spec, &Caps::minimal(), &Options { chunk: Some(512), ..Options::default() }).unwrap();
    let mut input = cascade();
    let lists = plan.work(&mut input);
    let keys = |listed: bool| {
        let items = items(&lists).filter(|item| (item.list != NO_LIST) == listed);
        items.map(|item| item.key_end - item.key_begin).sum::<u32>()
    };
    // 32 rows in one tile of the prefill kernel, whose keys are read once; the rest by each for itself.
    assert_eq!((keys(true), keys(false)), (1024, 8 * 76));
    assert_eq!(lists.prefill[0].len(), 2);
    assert!(items(&lists).all(|item| item.state_stride != WHOLE));
    assert!(lists.combine.iter().all(|tile| tile.count == 3));
    assert_eq!(lists.combine.iter().map(|tile| tile.token).collect::<BTreeSet<_>>(), (0..8).collect());
}

#[test]
fn what_has_no_keys_is_finished_all_the_same() {
    let spec = AttentionSpec::builder(8, 2, 64).build().unwrap();
    let rotated = spec.to_builder().rotated(true).build().unwrap();
    let empty = StepSequence { q_len: 1, ..StepSequence::default() };
    let work =
        |spec| Plan::new(spec, &Caps::minimal(), &Options::default()).unwrap().work(&mut step(vec![empty]));
    let (plain, turned) = (work(&spec), work(&rotated));
    assert!(plain.combine.is_empty() && plain.decode[0].len() == 1);
    assert!(turned.combine[0].count == 0 && turned.decode[0].is_empty());
}

#[test]
fn traffic_counts_each_key_once_per_sequence() {
    let spec = AttentionSpec::builder(32, 8, 128).kv_dtype(Dtype::F16).build().unwrap();
    let traffic = Traffic::of(&spec, &step(vec![decode(0, 4096)]));
    assert_eq!(traffic.bytes, 4096 * 8 * 256 * 2 + 32 * 256 * 4);
    assert_eq!(traffic.flops, 2 * 32 * 4096 * 256);
    // Evicted keys are neither read nor multiplied.
    let evicted = StepSequence { begin: 96, ..decode(0, 4096) };
    let traffic = Traffic::of(&spec, &step(vec![evicted]));
    assert_eq!(traffic.bytes, 4000 * 8 * 256 * 2 + 32 * 256 * 4);
    assert_eq!(traffic.flops, 2 * 32 * 4000 * 256);
    // Causal prefill: half of the square, and the diagonal.
    let prefill = StepSequence { q_len: 100, kv_len: 100, ..StepSequence::default() };
    assert_eq!(Traffic::of(&spec, &step(vec![prefill])).flops, 2 * 32 * (100 * 101 / 2) * 256);
    // Blocks count with their headers: 34 bytes of 32 numbers.
    let blocks = spec.to_builder().kv_dtype(Dtype::Q8).build().unwrap();
    let bytes = Traffic::of(&blocks, &step(vec![decode(0, 4096)])).bytes;
    assert_eq!(bytes, 4096 * blocks.kv_bytes_per_token() + 32 * 256 * 4);
}

#[test]
fn traffic_counts_shared_keys_once_for_all() {
    let spec = AttentionSpec::builder(32, 8, 128).kv_dtype(Dtype::F16).build().unwrap();
    let traffic = Traffic::of(&spec, &cascade());
    assert_eq!(traffic.bytes, (1024 + 8 * 76) * 8 * 256 * 2 + 8 * 32 * 256 * 4);
    assert_eq!(traffic.flops, 8 * 2 * 32 * 1100 * 256);
}

#[test]
fn plans_tell_their_reasons() {
    let spec = AttentionSpec::builder(32, 8, 128).build().unwrap();
    let rotated = spec.to_builder().rotated(true).build().unwrap();
    for (caps, (spec, count)) in caps().iter().flat_map(|caps| [(caps, (&spec, 4)), (caps, (&rotated, 5))]) {
        let plan = Plan::new(spec, caps, &Options::default()).unwrap();
        let text = plan.to_string();
        for kernel in plan.variants().iter().map(|variant| variant.kernel) {
            assert!(text.contains(kernel.name()), "{text}");
        }
        for part in [format!("{} adapter: ", caps.class), format!("variants compiled: {count}")] {
            assert!(text.contains(&part), "{part} is missing:\n{text}");
        }
    }
}

#[test]
fn a_class_has_its_row_of_the_table_and_options_have_the_last_word() {
    let spec = AttentionSpec::builder(32, 8, 128).build().unwrap();
    let [software, _, _, gpu] = caps();
    let of = |caps: &Caps, options: &Options| {
        let plan = Plan::new(&spec, caps, options).unwrap();
        [plan.prefill().tile.rows, plan.decode().tile.rows, plan.fill()]
    };
    let default = Options::default();
    assert_eq!(of(&software, &default), [16, 4, 16]);
    assert_eq!(of(&Caps { subgroup: None, ..software.clone() }, &default), [64, 4, 16]);
    for (class, fill) in [(Class::Discrete, 1024), (Class::Integrated, 256), (Class::Apple, 512)] {
        assert_eq!(of(&Caps { class, ..gpu.clone() }, &default), [64, 4, fill]);
    }
    // Many rows of a group are better off with prefill's tiles, but for the tiles that prefill has.
    let large = AttentionSpec::builder(128, 1, 64).build().unwrap();
    let decode = |prefill_rows| {
        let options = Options { prefill_rows, ..Options::default() };
        Plan::new(&large, &gpu, &options).unwrap().decode().tile.rows
    };
    assert_eq!([decode(None), decode(Some(4))], [64, 16]);
    let asked = Options { prefill_rows: Some(32), decode_rows: Some(2), fill: Some(7), ..default };
    for caps in [software, gpu] {
        assert_eq!(of(&caps, &asked), [32, 2, 7]);
    }
}

#[test]
fn keys_of_a_step_fit_the_registers_of_a_software_adapter() {
    let [software, ..] = caps();
    let of = |lanes, vector_registers, heads| {
        let caps = Caps { subgroup: Some((lanes, lanes)), vector_registers, ..software.clone() };
        let [long, close] = [128, 64].map(|dim| {
            let spec = AttentionSpec::builder(heads, 8, dim).build().unwrap();
            Plan::new(&spec, &caps, &Options::default()).unwrap()
        });
        let backward = close.backward().unwrap();
        [long.prefill(), long.decode(), &backward.queries].map(|variant| variant.tile.keys)
    };
    // Groups of four: decode walks one at a time.
    assert_eq!(of(8, 16, 32), [1, 1, 1]);
    assert_eq!(of(8, 32, 32), [2, 1, 2]);
    // Groups of one.
    assert_eq!(of(8, 16, 8), [1, 1, 1]);
    assert_eq!(of(8, 32, 8), [2, 2, 2]);
    // What 4 lanes name lies in memory, whatever the registers.
    assert_eq!(of(4, 16, 8), [2, 1, 2]);
}

#[test]
fn teams_are_as_large_as_registers_ask_and_no_larger_than_subgroups() {
    // Lanes of a team: of head_dim 64, 128, 256 with groups of 1, 4, 8, 16.
    let expected = [
        (64, [Some(4), Some(4), Some(8), None]),
        (128, [Some(4), Some(8), Some(16), None]),
        (256, [Some(8), Some(16), None, None]),
    ];
    let [_, _, _, gpu] = caps();
    for (dim, lanes) in expected {
        for (group, lanes) in [1, 4, 8, 16].into_iter().zip(lanes) {
            let spec = AttentionSpec::builder(group, 1, dim).build().unwrap();
            assert_eq!(team_lanes(&spec, group), lanes, "head_dim {dim}, group {group}");
            for subgroup in [4, 8, 16, 32] {
                let caps = Caps { subgroup: Some((subgroup, 64)), ..gpu.clone() };
                let decode = Plan::new(&spec, &caps, &Options::default()).unwrap().decode().kernel;
                let fits = lanes.is_some_and(|lanes| lanes <= subgroup);
                assert_eq!(decode == Kernel::DecodeTeams, fits, "head_dim {dim}, group {group}, {subgroup}");
                let asked = |teams| {
                    let options = Options { decode_teams: Some(teams), ..Options::default() };
                    Plan::new(&spec, &caps, &options).map(|plan| plan.decode().kernel)
                };
                assert_eq!(asked(false), Ok(Kernel::Decode));
                match asked(true) {
                    Ok(kernel) => assert_eq!((kernel, fits), (Kernel::DecodeTeams, true)),
                    Err(error) => {
                        assert!(!fits && error.to_string().contains("options.decode_teams"), "{error}")
                    }
                }
            }
        }
    }
}

#[test]
fn matrix_units_are_for_what_they_multiply() {
    let builder = || AttentionSpec::builder(8, 2, 128).q_dtype(Dtype::F16).kv_dtype(Dtype::F16);
    let [_, _, _, gpu] = caps();
    let gpu = Caps { f16: true, cooperative_matrix: true, ..gpu };
    let plan = |builder: gqa::SpecBuilder, caps: &Caps| {
        let options = Options { matrix_units: MatrixUnits::Cooperative, ..Options::default() };
        Plan::new(&builder.build().unwrap(), caps, &options).map(|plan| plan.prefill().clone())
    };
    let Variant { kernel, tile, .. } = plan(builder(), &gpu).unwrap();
    assert_eq!((kernel, tile.rows, tile.threads), (Kernel::PrefillMatrix, 64, 256));
    let small = Caps { workgroup_memory: 24 << 10, ..gpu.clone() };
    assert_eq!(plan(builder().kv_dtype(Dtype::Fp8), &small).unwrap().tile.rows, 16);
    let refused = [
        (builder().q_dtype(Dtype::F32), &gpu, "queries must be f16"),
        (builder().v_dtype(Dtype::Q8), &gpu, "keys and values f16 or fp8"),
        (AttentionSpec::builder(8, 2, 144).q_dtype(Dtype::F16).kv_dtype(Dtype::F16), &gpu, "at most 128"),
        (builder(), &Caps { cooperative_matrix: false, ..gpu.clone() }, "EXPERIMENTAL_COOPERATIVE_MATRIX"),
        (builder(), &Caps { subgroup: Some((64, 128)), ..gpu.clone() }, "subgroups of at most 64"),
        (builder(), &Caps { workgroup_memory: 16 << 10, ..gpu.clone() }, "more workgroup memory"),
    ];
    for (builder, caps, needle) in refused {
        let message = plan(builder, caps).unwrap_err().to_string();
        assert!(message.contains("options.matrix_units") && message.contains(needle), "{message}");
    }
}
