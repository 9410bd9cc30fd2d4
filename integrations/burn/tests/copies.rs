//! No copy is made of queries, keys, values or outputs: what is bound is the tensors' own memory, and nothing else comes to be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::{Arc, Mutex};

use burn::tensor::Tensor;
use burn_wgpu::{AutoCompiler, CubeTensor, Wgpu, WgpuResource};
use common::{numbers, open, random};
use cubecl::wgpu::WgpuServer;
use gqa_burn::gqa::wgpu;
use gqa_burn::{AttentionSpec, CacheShape, GqaAttention, KvCache, Sequence};

/// Memory is counted: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn primitive(tensor: &Tensor<3>) -> CubeTensor {
    tensor.clone().try_into_primitive::<Wgpu>().unwrap()
}

/// The memory that Burn has given a tensor.
fn memory(tensor: &Tensor<3>) -> WgpuResource {
    let tensor = primitive(tensor);
    let held = tensor.client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone()).unwrap();
    held.resource().clone()
}

fn buffers(instance: &wgpu::Instance) -> usize {
    let report = instance.generate_report().expect("a native instance");
    report.hub.buffers.num_allocated
}

#[test]
fn a_call_makes_its_output_and_nothing_else() {
    let _alone = ALONE.lock();
    let (device, setup) = open();
    let spec = AttentionSpec::builder(6, 2, 64).build().unwrap();
    let attention = GqaAttention::new(&setup, spec.clone()).unwrap();
    let shape = CacheShape { layers: 3, sequences: 1, capacity: 32 };
    let mut cache = KvCache::new(&setup.device, &spec, shape).unwrap();
    let id = cache.open().unwrap();
    let [q, k, v] = [6, 2, 2].map(|heads| random([24, heads, 64], &device));
    let sequences = [Sequence::new(id, 24)];
    let mut step = attention.begin(&mut cache, &sequences).unwrap();
    let mut forward =
        |layer| attention.forward(&cache, &mut step, layer, [q.clone(), k.clone(), v.clone()]).unwrap();
    // The first layer prepares the step, the second finds Burn's pools grown.
    let _kept = [forward(0), forward(1)];

    let client = primitive(&q).client;
    let in_use = || client.memory_report(cubecl::MemoryScope::Device).usage();
    setup.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let (before, buffers_before) = (in_use(), buffers(&setup.instance));
    let out = forward(2);
    setup.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let (after, buffers_after) = (in_use(), buffers(&setup.instance));
    assert_eq!(after.number_allocs - before.number_allocs, 1, "of Burn's: the output");
    assert_eq!(after.bytes_in_use - before.bytes_in_use, 24 * 6 * 64 * 4, "and as large as it is");
    assert_eq!(buffers_after, buffers_before, "of wgpu's: none");

    // The output is where Burn says, and what is there is the result.
    let place = memory(&out);
    let staging = setup.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: place.size,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = setup.device.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(&place.buffer, place.offset, &staging, 0, place.size);
    setup.queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |_| {});
    setup.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let there: Vec<f32> = bytemuck::pod_collect_to_vec(&staging.get_mapped_range(..).unwrap());
    assert_eq!(there, numbers(out));
}

#[test]
fn what_is_written_into_a_tensors_memory_is_what_is_attended() {
    let _alone = ALONE.lock();
    let (device, setup) = open();
    let spec = AttentionSpec::builder(2, 1, 64).build().unwrap();
    let attention = GqaAttention::new(&setup, spec.clone()).unwrap();
    let mut cache =
        KvCache::new(&setup.device, &spec, CacheShape { layers: 1, sequences: 1, capacity: 8 }).unwrap();
    let id = cache.open().unwrap();
    let [q, k, v] = [2, 1, 1].map(|heads| random([1, heads, 64], &device));
    // One key: the output is its value, whatever the query. Behind Burn's back the value's own buffer changes.
    let place = memory(&v);
    let written: Vec<f32> = (0..64).map(|i| i as f32).collect();
    setup.queue.write_buffer(&place.buffer, place.offset, bytemuck::cast_slice(&written));
    let mut step = attention.begin(&mut cache, &[Sequence::new(id, 1)]).unwrap();
    let out = attention.forward(&cache, &mut step, 0, [q, k, v]).unwrap();
    assert_eq!(numbers(out), [written.clone(), written].concat());
}

#[test]
fn training_makes_its_output_a_sum_per_row_and_gradients() {
    let _alone = ALONE.lock();
    let (device, setup) = open();
    let spec = AttentionSpec::builder(6, 2, 64).build().unwrap();
    let attention = Arc::new(GqaAttention::new(&setup, spec).unwrap());
    let mut pass = attention.train(&[16, 8], 3).unwrap();
    let qkv = [6, 2, 2].map(|heads| random([24, heads, 64], &device).autodiff().require_grad());
    let client = primitive(&qkv[0].clone().without_autodiff()).client;
    let in_use = || {
        setup.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        (client.memory_report(cubecl::MemoryScope::Device).usage(), buffers(&setup.instance))
    };
    let mut forward = |layer| pass.forward(layer, qkv.clone()).unwrap();
    // The first layer prepares the step and its gradients, the second finds Burn's pools grown.
    for layer in [0, 1] {
        drop(forward(layer).backward());
    }
    let (before, buffers_before) = in_use();
    let out = forward(2);
    let (between, buffers_between) = in_use();
    let (row, kv_row) = (24 * 6 * 64 * 4, 24 * 2 * 64 * 4);
    assert_eq!(between.number_allocs - before.number_allocs, 2, "the output and its log-sum-exp");
    assert_eq!(between.bytes_in_use - before.bytes_in_use, row + 24 * 6 * 4);
    let gradients = out.backward();
    let [dq, dk, dv] = qkv.each_ref().map(|x| x.grad(&gradients).unwrap());
    drop((out, gradients));
    let (after, buffers_after) = in_use();
    // The output and its log-sum-exp have gone with the graph.
    assert_eq!(after.number_allocs - before.number_allocs, 3, "the gradients");
    assert_eq!(after.bytes_in_use - before.bytes_in_use, row + 2 * kv_row);
    assert_eq!([dq.dims(), dk.dims(), dv.dims()], [[24, 6, 64], [24, 2, 64], [24, 2, 64]]);
    assert_eq!([buffers_between, buffers_after], [buffers_before; 2], "of wgpu's: none");
}
