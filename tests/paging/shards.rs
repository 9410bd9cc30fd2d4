//! Layers that exceed a binding lie in shards, and nobody can tell.

use fastrand::Rng;
use gqa::verify::{Gpu, adapters, check};
use gqa::{AttentionSpec, Dtype, KvCache, Mask, Options, PagedShape, Rope, wgpu};

use super::common::on_each;
use super::laws::{LAWS, tokens};
use super::world::{Lab, Part, SHARD, World};

/// A device whose bindings hold `slots` slots of a layer.
fn short_of_bindings(adapter: &wgpu::Adapter, spec: &AttentionSpec, slots: u32) -> Gpu {
    let mut descriptor = gqa::device_descriptor(adapter);
    let row = u64::from(spec.kv_heads() * spec.k_row().bytes().max(spec.v_row().bytes()));
    descriptor.required_limits.max_storage_buffer_binding_size =
        (u64::from(slots) * row).next_multiple_of(256);
    Gpu::open_with(adapter, &descriptor).unwrap()
}

fn all_adapters() -> Vec<wgpu::Adapter> {
    let all = adapters();
    assert!(!all.is_empty(), "no adapter: `cargo xtask setup` unpacks a software driver");
    all
}

#[test]
fn laws_hold_across_shards() {
    let builder = AttentionSpec::builder;
    let specs = [
        builder(6, 2, 64).v_head_dim(16).rope(Rope::new(64)).mask(Mask::Tree),
        builder(2, 2, 96).v_head_dim(20).window(60, None).kv_dtype(Dtype::Q8).rotated(true),
    ];
    let specs = specs.map(|builder| builder.build().unwrap());
    on_each(all_adapters(), |adapter| {
        for spec in &specs {
            let gpu = short_of_bindings(&adapter, spec, SHARD);
            let lab = Lab::new(&gpu, spec, Options::default()).unwrap();
            assert!(lab.paged(16).unwrap().cache.layers()[0].shards.len() > 10);
            for (name, law) in LAWS {
                let result = law(&lab, &mut Rng::with_seed(5));
                assert_eq!(result, Ok(()), "{}: {name}, {spec:?}", gpu.name());
            }
        }
    });
}

/// A long text in a kernel's view is a piece for each shard that it lies in.
#[test]
fn defragmenting_gathers_texts_in_few_shards() {
    on_each(all_adapters(), |adapter| {
        let spec = AttentionSpec::builder(6, 2, 64).v_head_dim(16).build().unwrap();
        let gpu = short_of_bindings(&adapter, &spec, 200);
        let lab = Lab::new(&gpu, &spec, Options { chunk: Some(1 << 20), ..Options::default() }).unwrap();
        let shape = PagedShape { sequences: 9, page: 4, tokens: 600, longest_step: 1 };
        let mut world = World::new(&lab, KvCache::paged(&gpu.device, &[&spec; 2], shape).unwrap()).unwrap();
        assert_eq!(world.cache.layers()[0].shards.len(), 3);
        let mut rng = Rng::with_seed(1);
        // Three in each shard, of which those in the first go: the others have no room but there.
        for nth in 0..9 {
            world.open().unwrap();
            world.say(&[Part::silent(nth, &tokens(&mut rng, 60))]).unwrap();
        }
        for nth in [0, 3, 6] {
            world.cache.close(world.texts[nth].id).unwrap();
        }
        let rest = [1, 2, 4, 5, 7, 8];
        for nth in rest {
            world.say(&[Part::silent(nth, &tokens(&mut rng, 40))]).unwrap();
        }
        let asks = rest.map(|nth| Part { q_len: 1, ..Part::new(nth, &[]) });
        let pieces = |world: &World<'_>| (world.workgroups[0] + world.workgroups[1]) / 2;
        let before = world.say(&asks).unwrap();
        assert!(pieces(&world) > 6, "{}: {:?}", gpu.name(), world.workgroups);
        let mut encoder = world.encoder();
        assert!(world.cache.defragment(&mut encoder).unwrap() > 0);
        gpu.queue.submit([encoder.finish()]);
        let after = world.say(&asks).unwrap();
        assert_eq!(pieces(&world), 6, "{}: {:?}", gpu.name(), world.workgroups);
        let problem = world.problem(&asks);
        for output in [before, after] {
            assert_eq!(check(&problem, &output), Ok(()), "{}", gpu.name());
        }
    });
}

/// What is shared has states of its own: where there is no room for them, nothing is shared, but nothing is refused.
#[test]
fn sharing_is_given_up_where_states_have_no_room() {
    on_each(all_adapters(), |adapter| {
        let builder = AttentionSpec::builder(6, 2, 64).q_dtype(Dtype::F16);
        let spec = builder.build().unwrap();
        let gpu = short_of_bindings(&adapter, &spec, 96);
        for (forks, len, shares) in [(2, 1, true), (10, 2, false)] {
            let lab = Lab::new(&gpu, &spec, Options { count_fetches: true, ..Options::default() }).unwrap();
            let shape = PagedShape { sequences: 10, page: 4, tokens: 96, longest_step: 1 };
            let mut world =
                World::new(&lab, KvCache::paged(&gpu.device, &[&spec; 2], shape).unwrap()).unwrap();
            let mut rng = Rng::with_seed(1);
            world.open().unwrap();
            world.say(&[Part::silent(0, &tokens(&mut rng, 48))]).unwrap();
            for _ in 1..forks {
                let mut text = world.texts[0].clone();
                text.id = world.cache.fork(text.id).unwrap();
                world.texts.push(text);
            }
            let news: Vec<_> = (0..forks).map(|_| tokens(&mut rng, len)).collect();
            let parts: Vec<_> = news.iter().enumerate().map(|(nth, new)| Part::new(nth, new)).collect();
            let output = world.say(&parts).unwrap();
            assert_eq!(check(&world.problem(&parts), &output), Ok(()), "{}", gpu.name());
            let all = forks as u32 * (48 + len as u32) * 2 * (64 + 64) / 4;
            assert_eq!(world.fetches.unwrap() < all, shares, "{}, {forks} forks", gpu.name());
        }
    });
}

/// Once as it happens: 156 MiB of keys where a binding holds 128 MiB. Adapters that could bind more are told that they cannot.
#[test]
fn a_pool_beyond_128_mib() {
    const BINDING: u64 = 128 << 20;
    let all = all_adapters();
    let of = |adapter: &&wgpu::Adapter| adapter.limits().max_storage_buffer_binding_size;
    let adapter = all.iter().filter(|adapter| of(adapter) >= BINDING).min_by_key(of);
    let adapter = adapter.expect("no adapter can bind 128 MiB");
    let mut descriptor = gqa::device_descriptor(adapter);
    descriptor.required_limits.max_storage_buffer_binding_size = BINDING;
    let gpu = Gpu::open_with(adapter, &descriptor).unwrap();
    let spec = AttentionSpec::builder(16, 8, 128).kv_dtype(Dtype::F16).build().unwrap();
    let lab = Lab::new(&gpu, &spec, Options::default()).unwrap();
    let shape = PagedShape { sequences: 3, page: 16, tokens: 80_000, longest_step: 1 };
    let mut world = World::new(&lab, KvCache::paged(&gpu.device, &[&spec], shape).unwrap()).unwrap();
    let shards: Vec<_> = world.cache.layers()[0].shards.iter().map(|shard| shard.k.size()).collect();
    assert_eq!(shards, [BINDING, 80_000 * 2048 - BINDING], "{}", gpu.name());
    // What lies in front takes room only: the text has the last 160 slots of the first shard, and the last 64 of the second.
    let mut encoder = world.encoder();
    for tokens in [65_536 - 160, 80_000 - 65_536 - 64] {
        let id = world.cache.open().unwrap();
        world.cache.extend(&mut encoder, &[(id, tokens)]).unwrap();
    }
    let (nth, mut rng) = (world.open().unwrap(), Rng::with_seed(1));
    world.say(&[Part::silent(nth, &tokens(&mut rng, 219))]).unwrap();
    let last = tokens(&mut rng, 5);
    let parts = [Part::new(nth, &last)];
    let output = world.say(&parts).unwrap();
    assert_eq!(check(&world.problem(&parts), &output), Ok(()), "{}", gpu.name());
    assert_eq!(world.cache.usage().pools[0].free, 0);
}
