//! One buffer for queries, new keys and values, outputs and LSE, as frameworks that allocate from pools hand them out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{FAMILIES, gpus, on_each, problem};
use gqa::verify::{Output, check};
use gqa::{
    Attention, AttentionSpec, Batch, CacheShape, Dtype, Error, Io, KvCache, NewKv, Options, Rope, Sequence,
};

/// Byte ranges of tensors, one behind the other, each at an offset that can be bound.
fn place(sizes: &[usize]) -> (Vec<usize>, usize) {
    let mut end = 0;
    let starts = sizes
        .iter()
        .map(|size| {
            let start = end;
            end = (start + size).next_multiple_of(256);
            start
        })
        .collect();
    (starts, end)
}

#[test]
fn queries_and_outputs_in_one_buffer() {
    let builder = AttentionSpec::builder(6, 2, 40).kv_dtype(Dtype::F16);
    let specs = [
        builder.clone().build().unwrap(),
        builder.clone().q_dtype(Dtype::F16).rope(Rope::new(40)).build().unwrap(),
        builder.rotated(true).build().unwrap(),
    ];
    on_each(gpus(), |gpu| {
        for (spec, family) in specs.iter().flat_map(|spec| FAMILIES.map(|family| (spec, family))) {
            let options = Options { family, pooled: true, ..Options::default() };
            let attention = Attention::new(&gpu.device, spec.clone(), options).unwrap();
            for q_len in [1, 21] {
                let mut problem = problem(spec, q_len, 21);
                let sequence = &mut problem.sequences[0];
                // All keys come in this call, whatever the queries.
                sequence.history = 0;
                let f16 = spec.q_dtype() == Dtype::F16;
                let bytes = |row: &[f32]| -> Vec<u8> {
                    match f16 {
                        true => row.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
                        false => bytemuck::cast_slice(row).to_vec(),
                    }
                };
                let (q, k, v) = (bytes(&sequence.q), bytes(&sequence.k), bytes(&sequence.v));
                let out = (q_len * 6 * 40) as usize * if f16 { 2 } else { 4 };
                let (at, size) = place(&[q.len(), k.len(), v.len(), out, q_len as usize * 6 * 4]);
                let mut content = vec![0xff; size];
                for (start, tensor) in at.iter().zip([&q, &k, &v]) {
                    content[*start..start + tensor.len()].copy_from_slice(tensor);
                }
                let buffer = gpu.upload("pool", &content);
                let view =
                    |nth: usize| wgpu::BufferBinding { buffer: &buffer, offset: at[nth] as u64, size: None };

                let mut cache =
                    KvCache::new(&gpu.device, spec, CacheShape { layers: 1, sequences: 1, capacity: 21 })
                        .unwrap();
                let id = cache.open().unwrap();
                let mut encoder = gpu.device.create_command_encoder(&Default::default());
                cache.extend(&mut encoder, &[(id, 21)]).unwrap();
                let sequences = [Sequence { q_len, ..Sequence::new(id, 21) }];
                let batch = Batch::new(spec, &sequences).with_lse(spec);
                let step = attention.prepare(&gpu.queue, &cache, &batch).unwrap();
                attention.append(&mut encoder, &step, 0, NewKv { k: view(1), v: view(2) }).unwrap();
                let io = Io { q: view(0), out: view(3), lse: Some(view(4)) };
                attention.record(&mut encoder, &step, 0, io).unwrap();
                gpu.finish(encoder).unwrap();

                let got = gpu.download(&buffer).unwrap();
                assert_eq!(got[..at[3]], content[..at[3]], "what is read stays as it was");
                let words = |nth: usize, len: usize| got[at[nth]..at[nth] + len].to_vec();
                let out = match f16 {
                    true => words(3, out)
                        .chunks(2)
                        .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
                        .collect(),
                    false => bytemuck::pod_collect_to_vec(&words(3, out)),
                };
                let lse = bytemuck::pod_collect_to_vec(&words(4, q_len as usize * 24));
                let output = Output { out: vec![out], lse: vec![lse], ..Output::default() };
                check(&problem, &output).unwrap_or_else(|e| panic!("{} {family:?} {spec}: {e}", gpu.name()));
            }
        }
    });
}

#[test]
fn overlapping_tensors_are_an_error() {
    let gpu = gpus().remove(0);
    let spec = AttentionSpec::builder(2, 1, 64).build().unwrap();
    let options = Options { pooled: true, ..Options::default() };
    let attention = Attention::new(&gpu.device, spec.clone(), options).unwrap();
    let mut cache =
        KvCache::new(&gpu.device, &spec, CacheShape { layers: 1, sequences: 1, capacity: 8 }).unwrap();
    let id = cache.open().unwrap();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    cache.extend(&mut encoder, &[(id, 2)]).unwrap();
    let sequences = [Sequence::new(id, 2)];
    let step = attention.prepare(&gpu.queue, &cache, &Batch::new(&spec, &sequences)).unwrap();
    let buffer = gpu.upload("pool", &[0; 4096]);
    let io = |out| Io {
        q: wgpu::BufferBinding { buffer: &buffer, offset: 0, size: None },
        out: wgpu::BufferBinding { buffer: &buffer, offset: out, size: None },
        lse: None,
    };
    // Queries and outputs are 2 tokens x 2 heads x 64 elements: 1,024 bytes each.
    let error = attention.bind(&step, 0, io(768)).unwrap_err();
    assert!(matches!(error, Error::Buffer { name: "q", .. }), "{error}");
    attention.bind(&step, 0, io(1024)).unwrap();
}
