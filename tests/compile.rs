//! Kernels are compiled where they are first wanted, all at once by `warm_up`, and through a cache that the caller has.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::problem;
use gqa::verify::{Gpu, Runner, Setup, check};
use gqa::{
    Attention, AttentionSpec, Batch, CacheShape, Io, KvCache, NewKv, Options, Sequence, device_descriptor,
};

fn instance() -> (wgpu::Instance, Vec<wgpu::Adapter>) {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    assert!(!adapters.is_empty(), "no adapter: `cargo xtask setup` unpacks a software driver");
    (instance, adapters)
}

fn spec() -> AttentionSpec {
    AttentionSpec::builder(8, 2, 64).build().unwrap()
}

#[test]
fn a_kernel_is_compiled_when_it_is_first_recorded() {
    let (instance, adapters) = instance();
    let compiled = || instance.generate_report().unwrap().hub.compute_pipelines.num_allocated;
    for adapter in &adapters {
        let gpu = Gpu::open(adapter).unwrap();
        let before = compiled();
        let attention = Attention::new(&gpu.device, spec(), Options::default()).unwrap();
        assert_eq!(compiled() - before, 0, "{}", gpu.name());

        let shape = CacheShape { layers: 1, sequences: 1, capacity: 16 };
        let mut cache = KvCache::new(&gpu.device, &spec(), shape).unwrap();
        let id = cache.open().unwrap();
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        cache.extend(&mut encoder, &[(id, 1)]).unwrap();
        let sequences = [Sequence::new(id, 1)];
        let step = attention.prepare(&gpu.queue, &cache, &Batch::new(&spec(), &sequences)).unwrap();
        let tensor = |heads: u64| {
            let (size, usage) = (heads * 64 * 4, wgpu::BufferUsages::STORAGE);
            let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
            gpu.device.create_buffer(&descriptor)
        };
        let (q, out, k, v) = (tensor(8), tensor(8), tensor(2), tensor(2));
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        attention.append(&mut encoder, &step, 0, NewKv { k: whole(&k), v: whole(&v) }).unwrap();
        assert_eq!(compiled() - before, 1, "{}: append", gpu.name());
        let io = Io { q: whole(&q), out: whole(&out), lse: None };
        attention.record(&mut encoder, &step, 0, io).unwrap();
        // One chunk of keys: nothing to combine.
        assert_eq!(compiled() - before, 2, "{}: and decode", gpu.name());
        attention.warm_up().unwrap();
        assert_eq!(compiled() - before, 4, "{}: and prefill and combine", gpu.name());
        attention.warm_up().unwrap();
        assert_eq!(compiled() - before, 4, "{}", gpu.name());
    }
}

#[test]
fn kernels_from_a_cache_are_the_same_kernels() {
    let (_instance, adapters) = instance();
    let mut tried = 0;
    for adapter in adapters.iter().filter(|a| a.features().contains(wgpu::Features::PIPELINE_CACHE)) {
        let mut descriptor = device_descriptor(adapter);
        descriptor.required_features |= wgpu::Features::PIPELINE_CACHE;
        let (problem, mut data, mut outputs) = (problem(&spec(), 40, 70), None, Vec::new());
        for _ in 0..2 {
            let gpu = Gpu::open_with(adapter, &descriptor).unwrap();
            let descriptor =
                wgpu::PipelineCacheDescriptor { label: None, data: data.as_deref(), fallback: true };
            // SAFETY: the data is what a cache on the same adapter has given, a moment ago in this process.
            let cache = unsafe { gpu.device.create_pipeline_cache(&descriptor) };
            let setup = Setup { slack: 2, ..Setup::default() };
            let attention =
                Attention::with_cache(&gpu.device, spec(), Options::default(), Some(cache.clone())).unwrap();
            let output = Runner::of(&gpu, attention, &setup).run(&problem).unwrap();
            assert_eq!(check(&problem, &output), Ok(()), "{}", gpu.name());
            outputs.push(output.out);
            data = cache.get_data();
            assert!(data.as_ref().is_some_and(|data| !data.is_empty()), "{}: the cache is empty", gpu.name());
        }
        assert_eq!(outputs[0], outputs[1], "{}", adapter.get_info().name);
        tried += 1;
    }
    // Both Vulkan drivers that `cargo xtask setup` finds have caches; Metal, DX12 and GL do not.
    assert!(tried > 0 || !cfg!(target_os = "linux"), "no adapter has PIPELINE_CACHE");
}
