//! Lengths that live on the GPU: the same results as lengths on the host, step after step, and no memory for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{FAMILIES, gpus, on_each};
use gqa::verify::Gpu;
use gqa::{
    Attention, AttentionSpec, Batch, Dtype, Error, Io, KvCache, Mask, NewKv, Options, PagedShape, Rope,
    Sequence, SequenceId, alibi_slopes,
};

/// A decode loop over several sequences, on tensors of its own.
struct Loop<'a> {
    gpu: &'a Gpu,
    spec: AttentionSpec,
    cache: KvCache,
    ids: Vec<SequenceId>,
    tokens: u32,
}

fn numbers(count: u64, step: f32) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * step).sin()).collect()
}

impl<'a> Loop<'a> {
    fn new(gpu: &'a Gpu, spec: &AttentionSpec, (sequences, room): (u32, u32)) -> Self {
        let shape = PagedShape {
            sequences,
            page: 16,
            tokens: sequences * room.next_multiple_of(16),
            longest_step: room,
        };
        let mut cache = KvCache::paged(&gpu.device, &[spec], shape).unwrap();
        let ids = (0..sequences).map(|_| cache.open().unwrap()).collect();
        Self { gpu, spec: spec.clone(), cache, ids, tokens: 1 }
    }

    fn batch(&self, sequences: &'a [Sequence<'a>]) -> Batch<'a> {
        Batch::new(&self.spec, sequences).with_lse(&self.spec)
    }

    fn sequences(&self) -> Vec<Sequence<'static>> {
        self.ids.iter().map(|id| Sequence::new(*id, self.tokens)).collect()
    }

    /// Tensors of a step: q, new k, new v, out, lse. What a step reads depends on its number.
    fn tensors(&self, nth: u32) -> [wgpu::Buffer; 5] {
        let tokens = u64::from(self.tokens) * self.ids.len() as u64;
        let (spec, shift) = (&self.spec, nth as f32 * 0.1 + 0.3);
        let of = |heads: u32, dim: u32, step: f32| {
            let row = numbers(tokens * u64::from(heads * dim), step);
            self.gpu.upload("test", bytemuck::cast_slice(&row))
        };
        let (q_heads, kv_heads) = (spec.q_heads(), spec.kv_heads());
        [
            of(q_heads, spec.head_dim(), shift),
            of(kv_heads, spec.head_dim(), shift * 1.7),
            of(kv_heads, spec.v_head_dim(), shift * 2.3),
            of(q_heads, spec.v_head_dim(), f32::NAN),
            of(q_heads, 1, f32::NAN),
        ]
    }

    fn result(&self, tensors: &[wgpu::Buffer; 5]) -> Vec<f32> {
        let read = |buffer| bytemuck::pod_collect_to_vec::<u8, f32>(&self.gpu.download(buffer).unwrap());
        [read(&tensors[3]), read(&tensors[4])].concat()
    }
}

fn record(
    attention: &Attention,
    encoder: &mut wgpu::CommandEncoder,
    step: &gqa::Step,
    tensors: &[wgpu::Buffer; 5],
) {
    let whole = wgpu::Buffer::as_entire_buffer_binding;
    let [q, k, v, out, lse] = tensors;
    attention.append(encoder, step, 0, NewKv { k: whole(k), v: whole(v) }).unwrap();
    attention.record(encoder, step, 0, Io { q: whole(q), out: whole(out), lse: Some(whole(lse)) }).unwrap();
}

fn specs() -> Vec<(&'static str, AttentionSpec, u32)> {
    let plain = || AttentionSpec::builder(6, 2, 32);
    let built = |builder: gqa::SpecBuilder| builder.build().unwrap();
    vec![
        ("plain", built(plain()), 1),
        ("two tokens, RoPE", built(plain().rope(Rope::new(32)).kv_dtype(Dtype::F16)), 2),
        ("rotated, q8", built(plain().rope(Rope::new(32)).kv_dtype(Dtype::Q8).rotated(true)), 3),
        ("window, ALiBi, sinks", built(plain().window(20, None).alibi(&alibi_slopes(6))), 1),
        ("not causal", built(plain().causal(false).window(None, 1)), 2),
        ("a large group", built(AttentionSpec::builder(40, 1, 24).v_head_dim(8)), 1),
    ]
}

#[test]
fn lengths_on_the_gpu_are_as_good_as_on_the_host() {
    on_each(gpus(), |gpu| {
        for (name, spec, tokens) in specs() {
            for (family, chunk) in FAMILIES.into_iter().zip([None, Some(9)]) {
                let options = Options { family, chunk, ..Options::default() };
                let attention = Attention::new(&gpu.device, spec.clone(), options).unwrap();
                let steps = 47;
                let [mut host, mut resident] =
                    [(); 2].map(|()| Loop { tokens, ..Loop::new(&gpu, &spec, (3, 20 + steps * tokens)) });
                // Prompts of several lengths, one empty, the same for both.
                for this in [&mut host, &mut resident] {
                    let growth: Vec<_> = this.ids.iter().copied().zip([13, 0, 20]).collect();
                    let mut encoder = gpu.device.create_command_encoder(&Default::default());
                    this.cache.extend(&mut encoder, &growth).unwrap();
                    let prompt: Vec<_> = growth
                        .iter()
                        .map(|(id, len)| Sequence { q_len: 0, ..Sequence::new(*id, *len) })
                        .collect();
                    let step =
                        attention.prepare(&gpu.queue, &this.cache, &Batch::new(&spec, &prompt)).unwrap();
                    let of = |dim: u32| {
                        gpu.upload("prompt", bytemuck::cast_slice(&numbers(33 * 2 * u64::from(dim), 0.7)))
                    };
                    let (k, v) = (of(spec.head_dim()), of(spec.v_head_dim()));
                    let whole = wgpu::Buffer::as_entire_buffer_binding;
                    attention.append(&mut encoder, &step, 0, NewKv { k: whole(&k), v: whole(&v) }).unwrap();
                    let room: Vec<_> = this.ids.iter().map(|id| (*id, steps * tokens)).collect();
                    this.cache.reserve(&mut encoder, &room).unwrap();
                    gpu.finish(encoder).unwrap();
                }
                let lengths = gpu.upload("lengths", bytemuck::cast_slice(&[13u32, 0, 20]));
                let sequences = resident.sequences();
                let looped =
                    attention.prepare_loop(&gpu.queue, &resident.cache, &resident.batch(&sequences)).unwrap();
                for nth in 0..steps {
                    let growth: Vec<_> = host.ids.iter().map(|id| (*id, tokens)).collect();
                    let mut encoder = gpu.device.create_command_encoder(&Default::default());
                    host.cache.extend(&mut encoder, &growth).unwrap();
                    let sequences = host.sequences();
                    let step = attention.prepare(&gpu.queue, &host.cache, &host.batch(&sequences)).unwrap();
                    let [ours, theirs] = [(); 2].map(|()| host.tensors(nth));
                    record(&attention, &mut encoder, &step, &ours);
                    let whole = lengths.as_entire_buffer_binding();
                    attention.schedule(&mut encoder, &looped, whole).unwrap();
                    record(&attention, &mut encoder, &looped, &theirs);
                    gpu.finish(encoder).unwrap();
                    if nth % 23 == 0 || nth + 1 == steps {
                        for (i, (a, b)) in
                            host.result(&ours).into_iter().zip(resident.result(&theirs)).enumerate()
                        {
                            let near = (a - b).abs() <= 1e-5 * a.abs().max(1.0) || a == b;
                            assert!(near, "{}, {name}, {family:?}, step {nth}, {i}: {a} and {b}", gpu.name());
                        }
                    }
                }
                for id in &resident.ids {
                    resident.cache.advance(*id, steps * tokens).unwrap();
                }
                let lens = |this: &Loop<'_>| {
                    this.ids.iter().map(|id| this.cache.len(*id).unwrap()).collect::<Vec<_>>()
                };
                assert_eq!(lens(&host), lens(&resident));
                let found: Vec<u32> = bytemuck::pod_collect_to_vec(&gpu.download(&lengths).unwrap());
                assert_eq!(found, lens(&resident), "{name}");
            }
        }
    });
}

/// A length that no page is there for counts as the longest or the shortest: nothing outside is read or written.
#[test]
fn lengths_outside_what_is_reserved_count_as_its_bounds() {
    on_each(gpus(), |gpu| {
        let spec = AttentionSpec::builder(4, 2, 16).window(31, None).build().unwrap();
        let attention = Attention::new(&gpu.device, spec.clone(), Options::default()).unwrap();
        let mut this = Loop::new(&gpu, &spec, (3, 140));
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        // The window has let go of the pages in front of the last sequence.
        let [a, b, c] = this.ids[..] else { panic!("three sequences") };
        this.cache.extend(&mut encoder, &[(c, 100)]).unwrap();
        this.cache.reserve(&mut encoder, &[(a, 33), (b, 7), (c, 10)]).unwrap();
        let lengths = gpu.upload("lengths", bytemuck::cast_slice(&[u32::MAX, 1_000_000, 0]));
        let sequences = this.sequences();
        let step = attention.prepare_loop(&gpu.queue, &this.cache, &this.batch(&sequences)).unwrap();
        for shard in &this.cache.layers()[0].shards {
            encoder.clear_buffer(&shard.k, 0, None);
            encoder.clear_buffer(&shard.v, 0, None);
        }
        let tensors = this.tensors(0);
        attention.schedule(&mut encoder, &step, lengths.as_entire_buffer_binding()).unwrap();
        record(&attention, &mut encoder, &step, &tensors);
        gpu.finish(encoder).unwrap();
        let found: Vec<u32> = bytemuck::pod_collect_to_vec(&gpu.download(&lengths).unwrap());
        assert_eq!(found, [33, 7, 101], "{}", gpu.name());
        assert!(this.result(&tensors).iter().all(|x| x.is_finite()), "{}", gpu.name());
    });
}

/// Two sequences of unequal length that take the same new keys and values.
#[test]
fn new_tokens_that_sequences_share_go_to_the_slots_of_each() {
    on_each(gpus(), |gpu| {
        let spec = AttentionSpec::builder(4, 2, 16).rope(Rope::new(16)).build().unwrap();
        let attention = Attention::new(&gpu.device, spec.clone(), Options::default()).unwrap();
        let results = [false, true].map(|is_loop| {
            let mut this = Loop::new(&gpu, &spec, (2, 60));
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            for shard in &this.cache.layers()[0].shards {
                encoder.clear_buffer(&shard.k, 0, None);
                encoder.clear_buffer(&shard.v, 0, None);
            }
            let sequences: Vec<_> =
                this.ids.iter().map(|id| Sequence { new_token: Some(0), ..Sequence::new(*id, 1) }).collect();
            let growth = [(this.ids[0], 50), (this.ids[1], 3)];
            this.cache.extend(&mut encoder, &growth).unwrap();
            let one = growth.map(|(id, _)| (id, 1));
            let tensors = this.tensors(0);
            let step = if is_loop {
                this.cache.reserve(&mut encoder, &one).unwrap();
                let lengths = gpu.upload("lengths", bytemuck::cast_slice(&[50u32, 3]));
                let step = attention.prepare_loop(&gpu.queue, &this.cache, &this.batch(&sequences)).unwrap();
                attention.schedule(&mut encoder, &step, lengths.as_entire_buffer_binding()).unwrap();
                step
            } else {
                this.cache.extend(&mut encoder, &one).unwrap();
                attention.prepare(&gpu.queue, &this.cache, &this.batch(&sequences)).unwrap()
            };
            record(&attention, &mut encoder, &step, &tensors);
            gpu.finish(encoder).unwrap();
            this.result(&tensors)
        });
        let [host, resident] = &results;
        assert!(host.iter().any(|x| *x != 0.0), "{}", gpu.name());
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * a.abs().max(1.0);
        assert!(host.iter().zip(resident).all(near), "{}: {host:?}, {resident:?}", gpu.name());
    });
}

#[test]
fn what_a_loop_cannot_have_is_an_error() {
    let gpu = &gpus()[0];
    let refused = |spec: AttentionSpec, change: fn(&mut Sequence<'_>)| {
        let attention = Attention::new(&gpu.device, spec.clone(), Options::default()).unwrap();
        let mut this = Loop::new(gpu, &spec, (1, 32));
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        this.cache.reserve(&mut encoder, &[(this.ids[0], 32)]).unwrap();
        let mut sequences = this.sequences();
        change(&mut sequences[0]);
        let result = attention.prepare_loop(&gpu.queue, &this.cache, &this.batch(&sequences));
        let Err(Error::Field { field, .. }) = result else { panic!("{result:?} is no error of a field") };
        field
    };
    let spec = || AttentionSpec::builder(4, 2, 16);
    assert_eq!(refused(spec().mask(Mask::Keep).build().unwrap(), |_| ()), "mask");
    assert_eq!(refused(spec().build().unwrap(), |s| s.q_start = Some(3)), "sequence.q_start");
    assert_eq!(refused(spec().build().unwrap(), |s| s.documents = Some(&[32])), "sequence.documents");
    assert_eq!(refused(spec().mask(Mask::Tree).build().unwrap(), |s| s.tree = Some(&[1])), "sequence.tree");
    assert_eq!(refused(spec().build().unwrap(), |s| s.new_len = 33), "sequence.new_len");
    assert_eq!(refused(spec().build().unwrap(), |s| s.q_len = 0), "sequence.q_len");
    // The first of two queries reaches back to a page that the window has let go when the sequence is shortest, not when it is longest.
    let windowed = spec().window(31, None).build().unwrap();
    let attention = Attention::new(&gpu.device, windowed.clone(), Options::default()).unwrap();
    let mut this = Loop::new(gpu, &windowed, (1, 160));
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    this.cache.extend(&mut encoder, &[(this.ids[0], 111)]).unwrap();
    this.cache.reserve(&mut encoder, &[(this.ids[0], 20)]).unwrap();
    for (q_len, new_len, is_good) in [(1, 1, true), (2, 2, true), (2, 1, false), (1, 0, false)] {
        let sequences = [Sequence { q_len, new_len, ..Sequence::new(this.ids[0], 1) }];
        let result = attention.prepare_loop(&gpu.queue, &this.cache, &this.batch(&sequences));
        match result {
            Ok(_) => assert!(is_good, "{q_len} queries, {new_len} new"),
            Err(Error::Field { field, .. }) => assert!(!is_good && field == "sequence.q_start"),
            Err(other) => panic!("{other}"),
        }
    }
    // What is not reserved cannot be taken: the last token would be written over.
    let (gpu, spec) = (&gpus()[0], spec().build().unwrap());
    let attention = Attention::new(&gpu.device, spec.clone(), Options::default()).unwrap();
    let mut this = Loop::new(gpu, &spec, (1, 32));
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    this.cache.extend(&mut encoder, &[(this.ids[0], 20)]).unwrap();
    let sequences = this.sequences();
    let result = attention.prepare_loop(&gpu.queue, &this.cache, &this.batch(&sequences));
    assert!(matches!(result, Err(Error::Field { field: "sequence.new_len", .. })), "{result:?}");
}
