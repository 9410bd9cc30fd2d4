//! The host's side, on a device that does nothing: `Plan::new`, `Attention::new`, `prepare`, `record`.

use criterion::Criterion;
use gqa::{
    Attention, AttentionSpec, Batch, CacheShape, Caps, Dtype, Io, KvCache, Options, PagedShape, Plan,
    Sequence,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let spec = AttentionSpec::builder(32, 8, 128).kv_dtype(Dtype::F16).build()?;
    let mut criterion = Criterion::default().configure_from_args();
    criterion.bench_function("plan", |bencher| {
        bencher.iter(|| Plan::new(&spec, &Caps::minimal(), &Options::default()));
    });

    criterion.bench_function("new", |bencher| {
        bencher.iter(|| Attention::new(&device, spec.clone(), Options::default()));
    });

    let attention = Attention::new(&device, spec.clone(), Options::default())?;
    let mut cache = KvCache::new(&device, &spec, CacheShape { layers: 1, sequences: 256, capacity: 256 })?;
    let mut sequences = Vec::new();
    let mut encoder = device.create_command_encoder(&Default::default());
    for i in 0..256 {
        let id = cache.open()?;
        cache.extend(&mut encoder, &[(id, i)])?;
        // Decodes, and a prefill now and then.
        sequences.push(Sequence::new(id, if i % 16 == 15 { i } else { 1.min(i) }));
    }
    let batch = Batch::new(&spec, &sequences);
    let step = attention.prepare(&queue, &cache, &batch)?;
    criterion.bench_function("prepare, 256 sequences", |bencher| {
        bencher.iter(|| {
            // The submission takes the writes away; they would pile up otherwise.
            queue.submit([]);
            attention.prepare(&queue, &cache, &batch)
        });
    });

    let one = [Sequence::new(sequences[200].id, 1)];
    let decode = Batch::new(&spec, &one);
    let mut decoding = attention.prepare(&queue, &cache, &decode)?;
    criterion.bench_function("prepare, one sequence", |bencher| {
        bencher.iter(|| {
            queue.submit([]);
            attention.prepare(&queue, &cache, &decode)
        });
    });
    criterion.bench_function("update, one sequence", |bencher| {
        bencher.iter(|| {
            queue.submit([]);
            attention.update(&queue, &cache, &decode, &mut decoding)
        });
    });

    // As a server has them: pages of 16, up to 4,000 tokens, an eighth of them forks, every one a token further.
    let shape = PagedShape { sequences: 257, page: 16, tokens: 1 << 20, longest_step: 512 };
    let mut pages = KvCache::paged(&device, &[&spec], shape)?;
    let mut encoder = device.create_command_encoder(&Default::default());
    let prompt = pages.open()?;
    pages.extend(&mut encoder, &[(prompt, 1000)])?;
    let mut decodes = Vec::new();
    for i in 0..256 {
        let id = if i % 8 == 0 { pages.fork(prompt)? } else { pages.open()? };
        pages.extend(&mut encoder, &[(id, 1 + i * 16)])?;
        decodes.push(Sequence::new(id, 1));
    }
    let decodes = Batch::new(&spec, &decodes);
    let mut renewed = attention.prepare(&queue, &pages, &decodes)?;
    criterion.bench_function("update, 256 sequences in pages", |bencher| {
        bencher.iter(|| {
            queue.submit([]);
            attention.update(&queue, &pages, &decodes, &mut renewed)
        });
    });

    let tokens: u64 = sequences.iter().map(|s| u64::from(s.q_len)).sum();
    let tensor = |label| {
        let usage = wgpu::BufferUsages::STORAGE;
        let size = tokens * 32 * 128 * 4;
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage,
            mapped_at_creation: false,
        })
    };
    let (q, out) = (tensor("q"), tensor("out"));
    criterion.bench_function("record", |bencher| {
        bencher.iter(|| {
            let mut encoder = device.create_command_encoder(&Default::default());
            let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
            attention.record(&mut encoder, &step, 0, io)
        });
    });
    // One layer after another, as a model records them: fresh bindings for each, and bindings made before.
    let io = || Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
    const LAYERS: u32 = 32;
    criterion.bench_function("record, one sequence, 32 layers", |bencher| {
        bencher.iter(|| {
            let mut encoder = device.create_command_encoder(&Default::default());
            (0..LAYERS).try_for_each(|_| attention.record(&mut encoder, &decoding, 0, io()))
        });
    });
    let bindings = attention.bind(&decoding, 0, io())?;
    criterion.bench_function("dispatch, one sequence, 32 layers", |bencher| {
        bencher.iter(|| {
            let mut encoder = device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            (0..LAYERS).try_for_each(|_| attention.dispatch(&mut pass, &decoding, &bindings))
        });
    });
    criterion.final_summary();
    Ok(())
}
