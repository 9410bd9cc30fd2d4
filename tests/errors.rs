//! Bad input is a typed error that names the field: none panics, none reaches the GPU (the device here does nothing, and a
//! driver's own complaint would be a panic).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use gqa::{
    Attention, AttentionSpec, Batch, CacheShape, Dtype, Error, Io, KvCache, LayerWeights, Layout, Mask,
    MaskLayout, Merge, MergeLayout, Options, Partial, Rope, Scaling, Sequence, SequenceId, SpecBuilder,
    alibi_slopes,
};

fn device() -> (wgpu::Device, wgpu::Queue) {
    wgpu::Device::noop(&wgpu::DeviceDescriptor::default())
}

fn plain() -> SpecBuilder {
    AttentionSpec::builder(6, 2, 16)
}

fn buffer(device: &wgpu::Device, size: u64) -> wgpu::Buffer {
    let usage = wgpu::BufferUsages::STORAGE;
    device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
}

/// What an error is about: the field, buffer or limit that it names.
fn names(error: &Error) -> String {
    match error {
        Error::Field { field, .. } => (*field).to_owned(),
        Error::Buffer { name, .. } => (*name).to_owned(),
        Error::Limit { limit, .. } => (*limit).to_owned(),
        other => panic!("not about a field: {other}"),
    }
}

fn assert_names<T: std::fmt::Debug>(cases: Vec<(&str, Result<T, Error>)>) -> usize {
    for (nth, (name, result)) in cases.iter().enumerate() {
        let error = result.as_ref().expect_err(&format!("case {nth}, {name}, was accepted"));
        assert_eq!(names(error), *name, "case {nth}: {error}");
        assert!(error.to_string().contains(name), "case {nth} does not print its field: {error}");
    }
    cases.len()
}

#[test]
fn specs() {
    let rope = |change: &dyn Fn(&mut Rope)| {
        let mut rope = Rope::new(8);
        change(&mut rope);
        plain().rope(rope).build()
    };
    let scaled = |scaling: Scaling| rope(&|r| r.scaling = scaling.clone());
    let yarn = |factor, beta_fast| Scaling::Yarn {
        factor,
        original_context: 64,
        beta_fast,
        beta_slow: 1.0,
        attention_factor: None,
        truncate: true,
    };
    let llama = |low, high| Scaling::Llama3 {
        factor: 8.0,
        low_freq_factor: low,
        high_freq_factor: high,
        original_context: 64,
    };
    let long = |short: usize, long: f64| Scaling::LongRope {
        short: vec![1.0; short],
        long: vec![long; 4],
        original_context: 64,
        context: 100,
        attention_factor: None,
    };
    let cases = vec![
        ("q_heads", AttentionSpec::builder(0, 1, 8).build()),
        ("kv_heads", AttentionSpec::builder(6, 4, 8).build()),
        ("head_dim", AttentionSpec::builder(6, 2, 577).build()),
        ("v_head_dim", plain().v_head_dim(513).build()),
        ("v_head_dim", plain().v_in_k(17).build()),
        ("v_head_dim", plain().v_in_k(0).build()),
        ("q_dtype", plain().q_dtype(Dtype::Bf16).build()),
        ("q_dtype", plain().q_dtype(Dtype::Q8).build()),
        ("v_dtype", plain().v_in_k(8).kv_dtype(Dtype::Q8).v_dtype(Dtype::F16).build()),
        ("rotated", plain().v_in_k(8).rotated(true).build()),
        ("scale", plain().scale(f32::INFINITY).build()),
        ("softcap", plain().softcap(0.0).build()),
        ("softcap", plain().softcap(-30.0).build()),
        ("softcap", plain().softcap(f32::NAN).build()),
        ("softcap", plain().softcap(f32::INFINITY).build()),
        ("alibi", plain().alibi(&alibi_slopes(5)).build()),
        ("alibi", plain().alibi(&[]).build()),
        ("alibi", plain().alibi(&[0.5, 0.5, f32::NAN, 0.5, 0.5, 0.5]).build()),
        ("window_left", plain().window(1 << 31, None).build()),
        ("window_right", plain().window(None, u32::MAX).build()),
        ("qk_norm", plain().qk_norm(0.0).build()),
        ("qk_norm", plain().qk_norm(-1e-6).build()),
        ("qk_norm", plain().qk_norm(f32::NAN).build()),
        ("rope.dim", rope(&|r| r.dim = 0)),
        ("rope.dim", rope(&|r| r.dim = 7)),
        ("rope.dim", rope(&|r| r.dim = 18)),
        ("rope.first", rope(&|r| r.first = 10)),
        ("rope.first", rope(&|r| r.first = u32::MAX)),
        ("rope.theta", rope(&|r| r.theta = 0.0)),
        ("rope.theta", rope(&|r| r.theta = f64::NAN)),
        ("rope.scaling.factor", scaled(Scaling::Linear { factor: 0.0 })),
        ("rope.scaling.factor", scaled(yarn(0.5, 32.0))),
        ("rope.scaling.beta_fast", scaled(yarn(4.0, 0.5))),
        ("rope.scaling.high_freq_factor", scaled(llama(4.0, 4.0))),
        ("rope.scaling.short", scaled(long(3, 2.0))),
        ("rope.scaling.long", scaled(long(4, 0.0))),
    ];
    assert!(assert_names(cases) >= 30);
}

#[test]
fn weights() {
    let (device, _) = device();
    let spec = plain().sinks(true).qk_norm(1e-6).build().unwrap();
    let mut attention = Attention::new(&device, spec, Options::default()).unwrap();
    let good = LayerWeights { sinks: &[0.0; 6], q_norm: &[1.0; 16], k_norm: &[1.0; 16] };
    assert_eq!(attention.set_weights(3, &good), Ok(()));
    let mut set = |layer, weights: LayerWeights<'_>| attention.set_weights(layer, &weights);
    let cases = vec![
        ("weights.sinks", set(0, LayerWeights { sinks: &[0.0; 5], ..good })),
        ("weights.sinks", set(0, LayerWeights { sinks: &[f32::NEG_INFINITY; 6], ..good })),
        ("weights.q_norm", set(0, LayerWeights { q_norm: &[], ..good })),
        ("weights.q_norm", set(0, LayerWeights { q_norm: &[f32::NAN; 16], ..good })),
        ("weights.k_norm", set(0, LayerWeights { k_norm: &[1.0; 17], ..good })),
        ("layer", set(u32::MAX, good)),
    ];
    assert_names(cases);
    let mut without = Attention::new(&device, plain().build().unwrap(), Options::default()).unwrap();
    assert_names(vec![("weights", without.set_weights(0, &good))]);
}

/// One open sequence of 20 tokens, and what `prepare` says of queries over it.
fn prepare(
    spec: &AttentionSpec,
    change: &dyn Fn(&mut Sequence<'_>),
    mask: Option<MaskLayout>,
) -> Result<(), Error> {
    let (device, queue) = device();
    let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
    let mut cache =
        KvCache::new(&device, spec, CacheShape { layers: 1, sequences: 1, capacity: 100 }).unwrap();
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 20)]).unwrap();
    let mut sequence = Sequence::new(id, 4);
    change(&mut sequence);
    attention.prepare(&queue, &cache, &Batch { mask, ..Batch::new(spec, &[sequence]) }).map(drop)
}

#[test]
fn batches() {
    let spec = |mask| plain().mask(mask).build().unwrap();
    let (plain_spec, tree, keep) = (spec(Mask::None), spec(Mask::Tree), spec(Mask::Keep));
    let windowed = plain().window(4, None).build().unwrap();
    let turned = plain().rope(Rope::new(16)).build().unwrap();
    let dense = Some(MaskLayout::dense([1, 1, 4, 20]));
    let far = |stride| Some(MaskLayout { key_stride: stride, ..MaskLayout::dense([1, 1, 4, 20]) });
    const CHAIN: [u64; 4] = [1, 3, 7, 15];
    assert_eq!(prepare(&tree, &|s| s.tree = Some(&CHAIN), None), Ok(()));
    assert_eq!(prepare(&keep, &|_| (), dense), Ok(()));
    assert_eq!(prepare(&plain_spec, &|s| s.documents = Some(&[0, 5, 15]), None), Ok(()));
    let cases = vec![
        ("batch.mask", prepare(&keep, &|_| (), None)),
        ("batch.mask", prepare(&plain_spec, &|_| (), dense)),
        ("batch.mask", prepare(&tree, &|_| (), dense)),
        ("batch.mask", prepare(&keep, &|_| (), far(u32::MAX))),
        ("sequence.tree", prepare(&plain_spec, &|s| s.tree = Some(&CHAIN), None)),
        ("sequence.tree", prepare(&tree, &|s| s.tree = Some(&CHAIN[..3]), None)),
        ("sequence.tree", prepare(&tree, &|s| s.tree = Some(&[1, 3, 7, 31]), None)),
        ("sequence.tree", prepare(&tree, &|s| (s.q_len, s.tree) = (65, Some(&[1u64; 65][..])), None)),
        ("sequence.tree", prepare(&tree, &|s| (s.q_len, s.tree) = (21, Some(&[1u64; 21][..])), None)),
        ("sequence.tree", prepare(&tree, &|s| (s.q_start, s.tree) = (Some(3), Some(&CHAIN[..])), None)),
        (
            "sequence.tree",
            prepare(&tree, &|s| (s.documents, s.tree) = (Some(&[20u32][..]), Some(&CHAIN[..])), None),
        ),
        ("sequence.documents", prepare(&plain_spec, &|s| s.documents = Some(&[]), None)),
        ("sequence.documents", prepare(&plain_spec, &|s| s.documents = Some(&[10, 11]), None)),
        ("sequence.documents", prepare(&plain_spec, &|s| s.documents = Some(&[u32::MAX; 9]), None)),
        ("sequence.q_start", prepare(&windowed, &|s| s.q_start = Some(1 << 29), None)),
        ("sequence.q_start", prepare(&turned, &|s| s.q_start = Some(i32::MIN), None)),
        ("sequence.new_len", prepare(&plain_spec, &|s| s.new_len = 21, None)),
    ];
    assert!(assert_names(cases) >= 17);
}

#[test]
fn views() {
    let (device, queue) = device();
    let spec = plain().mask(Mask::Keep).sinks(true).build().unwrap();
    let mut attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
    let shape = CacheShape { layers: 2, sequences: 1, capacity: 100 };
    let mut cache = KvCache::new(&device, &spec, shape).unwrap();
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 20)]).unwrap();
    let sequences = [Sequence::new(id, 4)];
    let batch = Batch::new(&spec, &sequences).with_mask(MaskLayout::dense([1, 1, 4, 20]));
    let step = attention.prepare(&queue, &cache, &batch).unwrap();
    let tensor = buffer(&device, 4 * 6 * 16 * 4);
    let other = buffer(&device, 4 * 6 * 16 * 4);
    let whole = wgpu::Buffer::as_entire_buffer_binding;
    let mut encoder = device.create_command_encoder(&Default::default());
    let io = || Io { q: whole(&tensor), out: whole(&other), lse: None };

    let mut cases = vec![("mask", attention.record(&mut encoder, &step, 0, io()))];
    let small = buffer(&device, 76);
    cases.push(("mask", attention.mask(&mut encoder, &step, whole(&small))));
    assert_eq!(attention.mask(&mut encoder, &step, whole(&buffer(&device, 80))), Ok(()));
    cases.push(("weights", attention.record(&mut encoder, &step, 1, io())));
    attention.set_weights(1, &LayerWeights { sinks: &[0.0; 6], ..Default::default() }).unwrap();
    assert_eq!(attention.record(&mut encoder, &step, 1, io()), Ok(()));
    cases.push(("weights", attention.record(&mut encoder, &step, 0, io())));

    let unmasked = plain().build().unwrap();
    let without = Attention::new(&device, unmasked.clone(), Options::default()).unwrap();
    let bare = without.prepare(&queue, &cache, &Batch::new(&unmasked, &sequences)).unwrap();
    cases.push(("mask", without.mask(&mut encoder, &bare, whole(&tensor))));
    cases.push(("step", attention.mask(&mut encoder, &bare, whole(&tensor))));
    assert_names(cases);
    drop(encoder);
}

#[test]
fn merges() {
    let (device, _queue) = device();
    let merge = Merge::new(&device, &plain().build().unwrap()).unwrap();
    let (out, lse) = (Layout::tokens_heads(6, 16), Layout::tokens_heads(6, 1));
    let good = MergeLayout { tokens: 4, out, lse };
    let step = merge.prepare(&good).unwrap();
    let layouts = vec![
        ("out", merge.prepare(&MergeLayout { out: Layout { head_stride: 15, ..out }, ..good })),
        ("lse", merge.prepare(&MergeLayout { lse: Layout { token_stride: 0, ..lse }, ..good })),
        ("out", merge.prepare(&MergeLayout { tokens: u32::MAX, ..good })),
    ];
    assert_names(layouts);
    let buffers: Vec<_> = (0..4).map(|_| buffer(&device, 4 * 6 * 16 * 4)).collect();
    let small = buffer(&device, 92);
    let part = |out: usize, lse: &wgpu::Buffer| (buffers[out].clone(), lse.clone());
    let mut encoder = device.create_command_encoder(&Default::default());
    let mut record = |from: (wgpu::Buffer, wgpu::Buffer), into: (wgpu::Buffer, wgpu::Buffer)| {
        let [from, into] = [&from, &into].map(|(out, lse)| Partial {
            out: out.as_entire_buffer_binding(),
            lse: lse.as_entire_buffer_binding(),
        });
        merge.record(&mut encoder, &step, &from, &into)
    };
    assert_eq!(record(part(0, &buffers[1]), part(2, &buffers[3])), Ok(()));
    let views = vec![
        ("into.out", record(part(0, &buffers[1]), part(0, &buffers[3]))),
        ("into.lse", record(part(0, &buffers[1]), part(2, &buffers[1]))),
        ("from.lse", record(part(0, &small), part(2, &buffers[3]))),
        ("into.lse", record(part(0, &buffers[1]), part(2, &small))),
    ];
    assert_names(views);

    // A step of smaller heads would let the kernel write behind the views.
    let wider = Merge::new(&device, &AttentionSpec::builder(32, 8, 128).build().unwrap()).unwrap();
    let [from, into] = [0, 2].map(|i| Partial {
        out: buffers[i].as_entire_buffer_binding(),
        lse: buffers[i + 1].as_entire_buffer_binding(),
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    assert_names(vec![("step", wider.record(&mut encoder, &step, &from, &into))]);
}

#[test]
fn a_table_beyond_a_uniform_binding_is_refused() {
    let (device, _) = device();
    // 65,535 heads of 4 bytes do not fit 64 KiB.
    let spec = AttentionSpec::builder(65_535, 1, 8).sinks(true).build().unwrap();
    let error = Attention::new(&device, spec, Options::default()).unwrap_err();
    assert_names(vec![("max_uniform_buffer_binding_size", Err::<(), _>(error))]);
}

/// Makes room; nothing is shared, so nothing is copied.
fn grow(device: &wgpu::Device, cache: &mut KvCache, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
    cache.extend(&mut device.create_command_encoder(&Default::default()), growth)
}

/// wgpu answers a buffer that is too large with an error that nobody catches.
#[test]
fn a_buffer_beyond_the_device() {
    let required_limits = wgpu::Limits { max_buffer_size: 1 << 20, ..Default::default() };
    let (device, _queue) =
        wgpu::Device::noop(&wgpu::DeviceDescriptor { required_limits, ..Default::default() });
    let spec = AttentionSpec::builder(1, 1, 64).build().unwrap();
    // Keys fit, twice their page, which copies wait in, does not.
    let shape = CacheShape { layers: 1, sequences: 1, capacity: 3000 };
    let mut cache = KvCache::new(&device, &spec, shape).unwrap();
    let id = cache.open().unwrap();
    let refused = cache.fork(id).unwrap_err();
    assert!(matches!(refused, Error::Limit { limit: "max_buffer_size", .. }), "{refused}");
    assert_eq!(cache.usage().open, 1);
}
