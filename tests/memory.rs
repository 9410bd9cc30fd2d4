//! What a server's loop takes in memory: nothing more for each step, on the GPU's clock or the host's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use gqa::verify::{Gpu, adapters};
use gqa::{
    Attention, AttentionSpec, Batch, Dtype, Io, KvCache, NewKv, Options, PagedShape, Sequence, SequenceId,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts what the test's own thread allocates.
struct Counting;

// SAFETY: every call goes to the system's allocator as it is; counting touches a thread's own number and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(of: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    of();
    ALLOCATIONS.get() - before
}

/// 256 sequences of many lengths, a quarter of them forks of one prompt.
fn batch_of_a_server(device: &wgpu::Device, spec: &AttentionSpec) -> (KvCache, Vec<SequenceId>) {
    let shape = PagedShape { sequences: 257, page: 16, tokens: 1 << 20, longest_step: 512 };
    let mut cache = KvCache::paged(device, &[spec], shape).unwrap();
    let mut encoder = device.create_command_encoder(&Default::default());
    let prompt = cache.open().unwrap();
    cache.extend(&mut encoder, &[(prompt, 1000)]).unwrap();
    let mut ids = Vec::new();
    for i in 0..256 {
        let id = if i % 4 == 0 { cache.fork(prompt).unwrap() } else { cache.open().unwrap() };
        cache.extend(&mut encoder, &[(id, 30 + 17 * i)]).unwrap();
        ids.push(id);
    }
    (cache, ids)
}

#[test]
fn update_allocates_nothing_of_its_own() {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let spec = AttentionSpec::builder(8, 2, 16).kv_dtype(Dtype::F16).build().unwrap();
    let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
    let (mut cache, ids) = batch_of_a_server(&device, &spec);
    let sequences: Vec<_> = ids.iter().map(|id| Sequence::new(*id, 1)).collect();
    let batch = Batch::new(&spec, &sequences);
    let mut step = attention.prepare(&queue, &cache, &batch).unwrap();
    // wgpu allocates for every write and submission: two writes of one word show how much.
    let word = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 4,
        usage: wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let growth: Vec<_> = ids.iter().map(|id| (*id, 1)).collect();
    let (mut ours, mut writes, mut grown) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..40 {
        let mut encoder = device.create_command_encoder(&Default::default());
        grown.push(allocations(|| cache.extend(&mut encoder, &growth).unwrap()));
        queue.submit([]);
        writes.push(allocations(|| (0..2).for_each(|_| queue.write_buffer(&word, 0, &[0; 4]))));
        queue.submit([]);
        ours.push(allocations(|| attention.update(&queue, &cache, &batch, &mut step).unwrap()));
    }
    // Lists grow now and then, and their memory with them: most steps must take none.
    let median = |mut counts: Vec<u64>| {
        counts.sort_unstable();
        counts[counts.len() / 2]
    };
    let (ours, writes, grown) = (median(ours), median(writes), median(grown));
    assert!(ours <= writes, "update allocates {ours} times, of which its two writes {writes}");
    assert_eq!(grown, 0, "extend allocates");
}

/// A kernel that does nothing, with its bindings: what recording costs wgpu itself.
fn nothing(device: &wgpu::Device) -> (wgpu::ComputePipeline, wgpu::BindGroup) {
    let text = "@group(0) @binding(0) var<storage, read_write> x: array<u32>; @compute @workgroup_size(1) fn main() { x[0] = 0u; }";
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: None,
        source: wgpu::ShaderSource::Wgsl(text.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: None,
        compilation_options: Default::default(),
        cache: None,
    });
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 4,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }],
    });
    (pipeline, group)
}

#[test]
fn dispatch_allocates_nothing_of_its_own() {
    const LAYERS: usize = 32;
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let spec = AttentionSpec::builder(8, 2, 16).kv_dtype(Dtype::F16).build().unwrap();
    let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
    let (cache, ids) = batch_of_a_server(&device, &spec);
    let sequences: Vec<_> = ids.iter().map(|id| Sequence::new(*id, 1)).collect();
    let step = attention.prepare(&queue, &cache, &Batch::new(&spec, &sequences)).unwrap();
    let [q, out] = [(); 2].map(|()| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 256 * 8 * 16 * 4,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    });
    let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
    let bindings = attention.bind(&step, 0, io).unwrap();
    let dispatches = step.workgroups()[..3].iter().filter(|count| **count > 0).count();
    assert!(dispatches > 0);
    let (pipeline, group) = nothing(&device);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        ours.push(allocations(|| {
            (0..LAYERS).for_each(|_| attention.dispatch(&mut pass, &step, &bindings).unwrap());
        }));
        drop(pass);
        let mut pass = encoder.begin_compute_pass(&Default::default());
        theirs.push(allocations(|| {
            for _ in 0..LAYERS * dispatches {
                pass.set_pipeline(&pipeline);
                pass.set_bind_group(0, &group, &[]);
                pass.dispatch_workgroups(1, 1, 1);
            }
        }));
    }
    let median = |mut counts: Vec<u64>| {
        counts.sort_unstable();
        counts[counts.len() / 2]
    };
    let (ours, theirs) = (median(ours), median(theirs));
    // wgpu's own lists grow with what is recorded; anything of ours would come with every layer.
    assert!(
        ours < theirs + LAYERS as u64,
        "dispatch allocates {ours} times, as many calls of wgpu {theirs} times"
    );
}

/// Resident memory of this process in KiB, where the system tells.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

#[test]
fn ten_thousand_steps_on_the_gpus_clock_take_no_more_memory_than_two_thousand() {
    const STEPS: u32 = 10_000;
    let all = adapters();
    assert!(!all.is_empty(), "no adapter: `cargo xtask setup` unpacks a software driver");
    for adapter in all {
        let gpu = Gpu::open(&adapter).unwrap();
        let spec = AttentionSpec::builder(2, 1, 8).kv_dtype(Dtype::F16).build().unwrap();
        let attention = Attention::new(&gpu.device, spec.clone(), Options::default()).unwrap();
        let shape = PagedShape { sequences: 1, page: 16, tokens: STEPS, longest_step: 1 };
        let mut cache = KvCache::paged(&gpu.device, &[&spec], shape).unwrap();
        let id = cache.open().unwrap();
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        cache.reserve(&mut encoder, &[(id, STEPS)]).unwrap();
        let lengths = gpu.upload("lengths", &[0; 4]);
        let sequences = [Sequence::new(id, 1)];
        let step = attention.prepare_loop(&gpu.queue, &cache, &Batch::new(&spec, &sequences)).unwrap();
        let [q, k, v, out] = [2, 1, 1, 2].map(|heads| gpu.upload("test", &vec![0; heads * 8 * 4]));
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        let mut early = 0;
        for nth in 0..STEPS {
            attention.schedule(&mut encoder, &step, whole(&lengths)).unwrap();
            attention.append(&mut encoder, &step, 0, NewKv { k: whole(&k), v: whole(&v) }).unwrap();
            attention
                .record(&mut encoder, &step, 0, Io { q: whole(&q), out: whole(&out), lse: None })
                .unwrap();
            // As a loop that looks at its tokens now and then.
            if nth % 20 == 19 {
                let next = gpu.device.create_command_encoder(&Default::default());
                gpu.finish(std::mem::replace(&mut encoder, next)).unwrap();
            }
            if nth == STEPS / 5 {
                early = resident();
            }
        }
        let grown = resident().saturating_sub(early);
        assert!(grown < 8 << 10, "{}: {grown} KiB more after {STEPS} steps", gpu.name());
        let found: Vec<u32> = bytemuck::pod_collect_to_vec(&gpu.download(&lengths).unwrap());
        assert_eq!(found, [STEPS], "{}", gpu.name());
        cache.advance(id, STEPS).unwrap();
        assert!(cache.advance(id, 1).is_err());
    }
}
