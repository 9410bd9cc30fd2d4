//! The skeleton of a decode loop on a device of its own: one prefill, then decodes, in two layers. A model would fill the tensors.
//!
//! `cargo run --release --example generate`

use gqa::{Attention, AttentionSpec, Batch, CacheShape, Dtype, Io, KvCache, NewKv, Options, Sequence};

const LAYERS: u32 = 2;
const PROMPT: u32 = 40;
const NEW_TOKENS: u32 = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&Default::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&gqa::device_descriptor(&adapter)))?;
    println!("{}", adapter.get_info().name);

    let spec = AttentionSpec::builder(32, 8, 64).kv_dtype(Dtype::F16).build()?;
    let attention = Attention::new(&device, spec.clone(), Options::default())?;
    print!("{}", attention.plan());
    let shape = CacheShape { layers: LAYERS, sequences: 1, capacity: 256 };
    let mut cache = KvCache::new(&device, &spec, shape)?;
    let sequence = cache.open()?;

    // A real model computes these: here the tensors of the longest call serve every call.
    let tensor = |heads: u32| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: u64::from(PROMPT * heads * 64 * 4),
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    let (q, k, v, out) = (tensor(32), tensor(8), tensor(8), tensor(32));

    for call in 0..=NEW_TOKENS {
        let tokens = if call == 0 { PROMPT } else { 1 };
        let mut encoder = device.create_command_encoder(&Default::default());
        cache.extend(&mut encoder, &[(sequence, tokens)])?;
        let sequences = [Sequence::new(sequence, tokens)];
        let step = attention.prepare(&queue, &cache, &Batch::new(&spec, &sequences))?;
        for layer in 0..LAYERS {
            let new = NewKv { k: k.as_entire_buffer_binding(), v: v.as_entire_buffer_binding() };
            attention.append(&mut encoder, &step, layer, new)?;
            let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
            attention.record(&mut encoder, &step, layer, io)?;
        }
        queue.submit([encoder.finish()]);
        device.poll(wgpu::PollType::wait_indefinitely())?;
        println!("{:3} keys, at least {} KiB moved", cache.len(sequence)?, step.traffic().bytes >> 10);
    }
    Ok(())
}
