//! Kernels on the best adapter (`WGPU_ADAPTER_NAME` chooses another): one forward call of one layer, submitted and awaited.
//!
//! `gqa bench` measures the same against the adapter's ceilings; this is for comparing two versions of the code.

use criterion::{Criterion, Throughput};
use gqa::profile::{Pass, Shape, Workload};
use gqa::verify::{AdapterChoice, Gpu, adapters};
use gqa::{AttentionSpec, Dtype, Options};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let all = adapters();
    let best = AdapterChoice::Best.pick(&all).pop().ok_or("no adapter: try `cargo xtask setup`")?;
    let gpu = Gpu::open(&all[best])?;
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    let mut group = criterion.benchmark_group(gpu.name());
    for (name, kv_heads, q_len, kv_len) in [
        ("decode/mha", 32, 1, 2048),
        ("decode/gqa", 8, 1, 2048),
        ("decode/mqa", 1, 1, 2048),
        ("decode/gqa, 4 tokens", 8, 4, 2048),
        ("prefill/gqa", 8, 256, 256),
    ] {
        let spec = AttentionSpec::builder(32, kv_heads, 128).kv_dtype(Dtype::F16).build()?;
        let workload = Workload::new(
            &gpu,
            &Shape { spec, q_len, kv_len, batch: 1, pass: Pass::Infer },
            Options::default(),
        )?;
        group.throughput(Throughput::Elements(u64::from(q_len)));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut encoder = gpu.device.create_command_encoder(&Default::default());
                workload.record(&mut encoder).map_err(|e| e.to_string())?;
                gpu.finish(encoder)
            });
        });
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
