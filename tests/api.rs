//! The public API on a device that does nothing: every error, and that nothing has changed after one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use gqa::{
    Attention, AttentionSpec, Batch, CacheShape, Dtype, Error, Family, Io, KvCache, Layout, MAX_HEAD_DIM,
    NewKv, Options, Rope, Sequence, SequenceId, Step,
};

fn device() -> (wgpu::Device, wgpu::Queue) {
    wgpu::Device::noop(&wgpu::DeviceDescriptor::default())
}

fn spec() -> AttentionSpec {
    AttentionSpec::builder(6, 2, 16).build().unwrap()
}

const SHAPE: CacheShape = CacheShape { layers: 2, sequences: 3, capacity: 100 };

fn buffer(device: &wgpu::Device, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
}

fn field(error: Error) -> String {
    match error {
        Error::Field { field, .. } => field.to_owned(),
        other => panic!("not a field error: {other}"),
    }
}

#[test]
fn a_spec_names_the_field_that_cannot_be() {
    let build = |q, kv, dim| AttentionSpec::builder(q, kv, dim);
    let cases = [
        ("q_heads", build(0, 1, 8)),
        ("q_heads", build(65_536, 1, 8)),
        ("kv_heads", build(4, 0, 8)),
        ("kv_heads", build(4, 3, 8)),
        ("kv_heads", build(4, 8, 8)),
        ("kv_heads", build(4, 65_536, 8)),
        ("head_dim", build(4, 2, 0)),
        ("head_dim", build(4, 2, MAX_HEAD_DIM + 1)),
        ("v_head_dim", build(4, 2, 8).v_head_dim(0)),
        ("v_head_dim", build(4, 2, 8).v_head_dim(u32::MAX)),
        ("q_dtype", build(4, 2, 8).q_dtype(Dtype::Bf16)),
        ("scale", build(4, 2, 8).scale(f32::NAN)),
        ("scale", build(4, 2, 8).scale(f32::NEG_INFINITY)),
        ("scale", build(4, 2, 8).scale(-3e38)),
    ];
    for (name, builder) in cases {
        assert_eq!(field(builder.build().unwrap_err()), name);
    }
    assert_eq!(field("f64".parse::<Dtype>().unwrap_err()), "dtype");
    for dtype in Dtype::ALL {
        assert_eq!(dtype.name().parse(), Ok(dtype));
    }
}

#[test]
fn a_cache_names_the_limit_it_exceeds() {
    let (device, _) = device();
    let new = |shape| KvCache::new(&device, &spec(), shape);
    for (name, shape) in [
        ("layers", CacheShape { layers: 0, ..SHAPE }),
        ("sequences", CacheShape { sequences: 0, ..SHAPE }),
        ("capacity", CacheShape { capacity: 0, ..SHAPE }),
    ] {
        assert_eq!(field(new(shape).unwrap_err()), name);
    }
    // 2 heads x 16 elements x 4 bytes a token: 128 MiB hold 1,048,576 tokens.
    assert!(new(CacheShape { layers: 1, sequences: 1, capacity: 1 << 20 }).is_ok());
    let error = new(CacheShape { layers: 1, sequences: 1, capacity: (1 << 20) + 1 }).unwrap_err();
    let Error::Limit { limit: "max_storage_buffer_binding_size", needed, found, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((needed, found), ((128 << 20) + 128, 128 << 20));
    assert!(matches!(
        new(CacheShape { layers: 1, sequences: u32::MAX, capacity: u32::MAX }),
        Err(Error::Limit { .. })
    ));
}

#[test]
fn a_cache_is_unchanged_after_an_error() {
    let (device, _queue) = device();
    let mut cache = KvCache::new(&device, &spec(), SHAPE).unwrap();
    let ids: Vec<_> = (0..3).map(|_| cache.open().unwrap()).collect();
    assert!(matches!(cache.open(), Err(Error::NoFreeSequence { capacity: 3 })));
    grow(&device, &mut cache, &[(ids[0], 60), (ids[1], 99)]).unwrap();
    let lengths = |cache: &KvCache| ids.iter().map(|id| cache.len(*id)).collect::<Vec<_>>();
    let before = lengths(&cache);

    let full = grow(&device, &mut cache, &[(ids[0], 40), (ids[1], 2)]).unwrap_err();
    assert_eq!(full, Error::SequenceFull { sequence: 1, needed: 101, used: 99, capacity: 100 });
    assert!(matches!(grow(&device, &mut cache, &[(ids[0], u32::MAX)]), Err(Error::SequenceFull { .. })));
    assert!(matches!(
        grow(&device, &mut cache, &[(ids[0], 1), (ids[0], 1)]),
        Err(Error::RepeatedSequence { .. })
    ));
    assert_eq!(field(cache.truncate(ids[2], 1).unwrap_err()), "len");
    let stranger = KvCache::new(&device, &spec(), SHAPE).unwrap().open().unwrap();
    assert!(matches!(cache.truncate(stranger, 0), Err(Error::StaleSequence { .. })));
    assert!(matches!(
        grow(&device, &mut cache, &[(ids[0], 1), (stranger, 1)]),
        Err(Error::StaleSequence { .. })
    ));
    assert_eq!(lengths(&cache), before);

    cache.close(ids[0]).unwrap();
    assert!(matches!(cache.close(ids[0]), Err(Error::StaleSequence { .. })));
    let reopened = cache.open().unwrap();
    assert_eq!(cache.len(reopened), Ok(0));
    assert!(matches!(cache.len(ids[0]), Err(Error::StaleSequence { .. })));
    cache.clear();
    assert!(cache.is_empty());
    assert_eq!(cache.len(ids[1]), Ok(0));
}

#[test]
fn options_that_the_device_cannot_do() {
    let (device, _) = device();
    let new = |options| Attention::new(&device, spec(), options);
    let subgroup = new(Options { family: Family::Subgroup, ..Options::default() });
    assert_eq!(field(subgroup.unwrap_err()), "options.family");
    for (name, options) in [
        ("options.chunk", Options { chunk: Some(0), ..Options::default() }),
        ("options.fill", Options { fill: Some(0), ..Options::default() }),
        ("options.decode_rows", Options { decode_rows: Some(0), ..Options::default() }),
        ("options.prefill_rows", Options { prefill_rows: Some(0), ..Options::default() }),
        ("options.prefill_rows", Options { prefill_rows: Some(30), ..Options::default() }),
        ("options.prefill_rows", Options { prefill_rows: Some(1024), ..Options::default() }),
    ] {
        assert_eq!(field(new(options).unwrap_err()), name);
    }
    // More rows than a group has are as many as it has; more than registers hold are refused.
    let asked = Options { decode_rows: Some(17), ..Options::default() };
    assert_eq!(new(asked.clone()).unwrap().plan().decode().tile.rows, spec().group());
    let many = AttentionSpec::builder(20, 1, 16).build().unwrap();
    assert_eq!(field(Attention::new(&device, many, asked).unwrap_err()), "options.decode_rows");

    let required_limits = wgpu::Limits { max_storage_buffers_per_shader_stage: 4, ..Default::default() };
    let (poor, _) = wgpu::Device::noop(&wgpu::DeviceDescriptor { required_limits, ..Default::default() });
    let error = Attention::new(&poor, spec(), Options::default()).unwrap_err();
    assert!(matches!(
        error,
        Error::Limit { limit: "max_storage_buffers_per_shader_stage", needed: 8, found: 4, .. }
    ));
}

#[test]
fn a_batch_names_the_field_that_cannot_be() {
    let (device, queue) = device();
    let attention = Attention::new(&device, spec(), Options::default()).unwrap();
    let mut cache = KvCache::new(&device, &spec(), SHAPE).unwrap();
    let (a, b) = (cache.open().unwrap(), cache.open().unwrap());
    grow(&device, &mut cache, &[(a, 10), (b, 20)]).unwrap();
    let good = Sequence::new(a, 4);
    let prepare = |sequences: &[Sequence], change: &dyn Fn(&mut Batch<'_>)| {
        let mut batch = Batch::new(&spec(), sequences).with_lse(&spec());
        change(&mut batch);
        attention.prepare(&queue, &cache, &batch).map(drop)
    };
    assert_eq!(prepare(&[good], &|_| ()), Ok(()));
    assert_eq!(prepare(&[], &|_| ()), Ok(()));

    let sequences = [
        ("sequence.new_len", Sequence { new_len: 11, ..good }),
        ("sequence.q_len * q_heads", Sequence { q_len: 1 << 30, ..good }),
        ("sequence.token + q_len", Sequence { token: Some(u32::MAX), ..good }),
        ("sequence.new_token + new_len", Sequence { new_token: Some(u32::MAX - 3), ..good }),
    ];
    for (name, sequence) in sequences {
        assert_eq!(field(prepare(&[sequence], &|_| ()).unwrap_err()), name);
    }
    let overlapping = [good, Sequence { token: Some(3), ..Sequence::new(b, 2) }];
    assert_eq!(field(prepare(&overlapping, &|_| ()).unwrap_err()), "sequence.token");
    assert_eq!(prepare(&[good, good], &|_| ()), Err(Error::RepeatedSequence { sequence: 0 }));

    let far = Layout { offset: 0, token_stride: 1 << 31, head_stride: 16 };
    let overlap = Layout { offset: 0, token_stride: 16, head_stride: 16 };
    type Change<'a> = &'a dyn Fn(&mut Batch<'_>);
    let layouts: [(&str, Change<'_>); 7] = [
        ("q", &|b| b.q = far),
        ("out", &|b| b.out = far),
        ("new_k", &|b| b.new_k = far),
        ("new_v", &|b| b.new_v = far),
        ("lse", &|b| b.lse = Some(far)),
        ("out", &|b| b.out = overlap),
        ("lse", &|b| b.lse = Some(Layout { offset: 0, token_stride: 1, head_stride: 1 })),
    ];
    for (name, change) in layouts {
        assert_eq!(field(prepare(&[good], change).unwrap_err()), name);
    }
    // Inputs may overlap: one key for all heads, say.
    assert_eq!(
        prepare(&[good], &|b| b.new_k = Layout { offset: 0, token_stride: 16, head_stride: 0 }),
        Ok(())
    );

    let mut stale = KvCache::new(&device, &spec(), SHAPE).unwrap();
    let closed = Sequence::new(stale.open().unwrap(), 0);
    assert!(matches!(prepare(&[closed], &|_| ()), Err(Error::StaleSequence { .. })));

    let other = AttentionSpec::builder(6, 3, 16).build().unwrap();
    let other_cache = KvCache::new(&device, &other, SHAPE).unwrap();
    let mismatch = attention.prepare(&queue, &other_cache, &Batch::new(&spec(), &[]));
    assert!(matches!(mismatch, Err(Error::CacheMismatch { .. })));
}

#[test]
fn views_that_cannot_be_bound() {
    let (device, queue) = device();
    let attention = Attention::new(&device, spec(), Options::default()).unwrap();
    let mut cache = KvCache::new(&device, &spec(), SHAPE).unwrap();
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 10)]).unwrap();
    let sequences = [Sequence::new(id, 4)];
    let batch = Batch::new(&spec(), &sequences);
    let step = attention.prepare(&queue, &cache, &batch).unwrap();
    let bytes = 4 * 6 * 16 * 4;
    let q = buffer(&device, bytes + 256, wgpu::BufferUsages::STORAGE);
    let out = buffer(&device, bytes, wgpu::BufferUsages::STORAGE);
    let small = buffer(&device, bytes - 4, wgpu::BufferUsages::STORAGE);
    let unbindable = buffer(&device, bytes, wgpu::BufferUsages::COPY_DST);
    let whole = |buffer| wgpu::Buffer::as_entire_buffer_binding(buffer);
    let at = |buffer, offset| wgpu::BufferBinding { buffer, offset, size: None };

    let bind = |q, out, lse, layer| attention.bind(&step, layer, Io { q, out, lse });
    assert!(bind(whole(&q), whole(&out), None, 0).is_ok());
    assert!(bind(at(&q, 256), whole(&out), None, 1).is_ok());
    assert!(matches!(bind(whole(&q), whole(&out), None, 2), Err(Error::NoSuchLayer { layer: 2, layers: 2 })));
    let failing = [
        ("q", bind(whole(&small), whole(&out), None, 0)),
        ("q", bind(at(&q, 512), whole(&out), None, 0)),
        ("q", bind(at(&q, u64::MAX - 255), whole(&out), None, 0)),
        ("q", bind(at(&q, 4), whole(&out), None, 0)),
        ("out", bind(whole(&q), whole(&small), None, 0)),
        ("out", bind(whole(&q), whole(&unbindable), None, 0)),
        ("lse", bind(whole(&q), whole(&out), Some(whole(&small)), 0)),
        ("out", bind(whole(&q), whole(&q), None, 0)),
        ("out", bind(whole(&q), whole(&cache.layers()[0].shards[0].v), None, 0)),
    ];
    for (expected, result) in failing {
        assert!(
            matches!(result, Err(Error::Buffer { name, .. }) if name == expected),
            "{expected}: {result:?}"
        );
    }

    let mut encoder = device.create_command_encoder(&Default::default());
    let new = buffer(&device, 4 * 2 * 16 * 4, wgpu::BufferUsages::STORAGE);
    let mut append = |k, v, layer| attention.append(&mut encoder, &step, layer, NewKv { k, v });
    assert_eq!(append(whole(&new), whole(&new), 0), Ok(()));
    assert!(matches!(append(whole(&new), whole(&new), 9), Err(Error::NoSuchLayer { layer: 9, .. })));
    assert!(matches!(append(whole(&unbindable), whole(&new), 0), Err(Error::Buffer { name: "new_k", .. })));
    assert!(matches!(append(whole(&new), at(&new, 256), 0), Err(Error::Buffer { name: "new_v", .. })));

    let stored = &cache.layers()[0].shards[0].k;
    assert!(matches!(append(whole(stored), whole(&new), 0), Err(Error::Buffer { name: "new_k", .. })));

    let with_lse = attention.prepare(&queue, &cache, &batch.with_lse(&spec())).unwrap();
    let missing = attention.bind(&with_lse, 0, Io { q: whole(&q), out: whole(&out), lse: None });
    assert!(matches!(missing, Err(Error::Buffer { name: "lse", .. })));
}

#[test]
fn steps_and_bindings_belong_to_who_made_them() {
    let (device, queue) = device();
    let attention = Attention::new(&device, spec(), Options::default()).unwrap();
    let other = Attention::new(&device, spec(), Options { chunk: Some(7), ..Options::default() }).unwrap();
    let mut cache = KvCache::new(&device, &spec(), SHAPE).unwrap();
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 10)]).unwrap();
    let sequences = [Sequence::new(id, 1)];
    let batch = Batch::new(&spec(), &sequences);
    let step = attention.prepare(&queue, &cache, &batch).unwrap();
    let again = attention.prepare(&queue, &cache, &batch).unwrap();
    let q = buffer(&device, 6 * 16 * 4, wgpu::BufferUsages::STORAGE);
    let out = buffer(&device, 6 * 16 * 4, wgpu::BufferUsages::STORAGE);
    let io = || Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
    let bindings = attention.bind(&step, 0, io()).unwrap();
    assert_eq!(field(other.bind(&step, 0, io()).unwrap_err()), "step");
    let mut encoder = device.create_command_encoder(&Default::default());
    assert_eq!(field(other.record(&mut encoder, &step, 0, io()).unwrap_err()), "step");
    assert!(matches!(attention.record(&mut encoder, &step, 7, io()), Err(Error::NoSuchLayer { .. })));
    let new = NewKv { k: q.as_entire_buffer_binding(), v: q.as_entire_buffer_binding() };
    assert_eq!(field(other.append(&mut encoder, &step, 0, new).unwrap_err()), "step");
    let mut pass = encoder.begin_compute_pass(&Default::default());
    for _ in 0..3 {
        assert_eq!(attention.dispatch(&mut pass, &step, &bindings), Ok(()));
    }
    assert_eq!(attention.dispatch(&mut pass, &again, &bindings), Err(Error::StaleBindings));
    assert_eq!(field(other.dispatch(&mut pass, &step, &bindings).unwrap_err()), "step");
}

#[test]
fn bindings_stay_good_while_batches_fit_the_memory_of_a_step() {
    let (device, queue) = device();
    let attention = Attention::new(&device, spec(), Options::default()).unwrap();
    let other = Attention::new(&device, spec(), Options::default()).unwrap();
    let mut cache = KvCache::new(&device, &spec(), CacheShape { capacity: 2000, ..SHAPE }).unwrap();
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 2000)]).unwrap();
    let of = |q_len| [Sequence { new_len: 0, ..Sequence::new(id, q_len) }];
    let (some, fewer, many, wrong) = (of(100), of(90), of(2000), [Sequence::new(id, 2001)]);
    let [some, fewer, many, wrong] = [&some, &fewer, &many, &wrong].map(|s| Batch::new(&spec(), s));
    let nothing = Batch::new(&spec(), &[]);
    let tensor = |tokens: u64| buffer(&device, tokens * 6 * 16 * 4, wgpu::BufferUsages::STORAGE);
    let (q, out, small) = (tensor(2000), tensor(2000), tensor(3));
    let bind = |step: &Step, q: &wgpu::Buffer| {
        let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
        attention.bind(step, 0, io)
    };
    let dispatch = |step: &Step, bindings| {
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        attention.dispatch(&mut pass, step, bindings)
    };

    let mut step = attention.prepare(&queue, &cache, &some).unwrap();
    let first = bind(&step, &q).unwrap();
    assert_eq!(field(other.update(&queue, &cache, &some, &mut step).unwrap_err()), "step");
    assert_eq!(field(attention.update(&queue, &cache, &wrong, &mut step).unwrap_err()), "sequence.new_len");
    assert_eq!(dispatch(&step, &first), Ok(()));
    // A smaller batch, and none at all: but tensors must reach as far as the largest.
    for batch in [&fewer, &nothing] {
        attention.update(&queue, &cache, batch, &mut step).unwrap();
        assert_eq!(dispatch(&step, &first), Ok(()));
        assert!(matches!(bind(&step, &small), Err(Error::Buffer { name: "q", .. })));
    }
    attention.update(&queue, &cache, &some, &mut step).unwrap();
    assert_eq!(dispatch(&step, &first), Ok(()));
    // A larger batch needs other memory, and bindings to it.
    attention.update(&queue, &cache, &many, &mut step).unwrap();
    assert_eq!(dispatch(&step, &first), Err(Error::StaleBindings));
    assert_eq!(dispatch(&step, &bind(&step, &q).unwrap()), Ok(()));
}

#[test]
fn a_step_too_large_for_the_device() {
    let few = wgpu::Limits { max_compute_workgroups_per_dimension: 9, ..Default::default() };
    let narrow = wgpu::Limits { max_storage_buffer_binding_size: 4096, ..Default::default() };
    let open = |required_limits| {
        wgpu::Device::noop(&wgpu::DeviceDescriptor { required_limits, ..Default::default() })
    };
    let prepare = |limits: wgpu::Limits, chunk, q_len| {
        let (device, queue) = open(limits);
        let spec = AttentionSpec::builder(1, 1, 1).build().unwrap();
        let attention =
            Attention::new(&device, spec.clone(), Options { chunk, ..Options::default() }).unwrap();
        let mut cache =
            KvCache::new(&device, &spec, CacheShape { layers: 1, sequences: 1, capacity: 200 }).unwrap();
        let id = cache.open().unwrap();
        grow(&device, &mut cache, &[(id, 200)]).unwrap();
        let sequence = Sequence { new_len: 0, ..Sequence::new(id, q_len) };
        attention.prepare(&queue, &cache, &Batch::new(&spec, &[sequence])).map(drop)
    };
    assert_eq!(prepare(few.clone(), None, 5), Ok(()));
    // 32 rows a tile: more than 9 tiles see more than one key, and each is to be merged.
    let merging = prepare(few.clone(), Some(1), 200 * 8).unwrap_err();
    assert!(matches!(merging, Error::Limit { limit: "max_compute_workgroups_per_dimension", .. }));
    let listing = prepare(narrow, None, 32 * 200).unwrap_err();
    assert!(matches!(listing, Error::Limit { limit: "max_storage_buffer_binding_size", found: 4096, .. }));
    let spec = AttentionSpec::builder(10, 10, 1).build().unwrap();
    let heads = Attention::new(&open(few).0, spec, Options::default()).unwrap_err();
    assert!(matches!(heads, Error::Limit { needed: 10, found: 9, .. }));
}

/// As in Gemma: layers with and without a window, each kind with a RoPE of its own, over one cache.
#[test]
fn several_kinds_of_layers_share_a_cache() {
    let (device, queue) = device();
    let kind = |window, theta| {
        let rope = Rope { theta, ..Rope::new(16) };
        AttentionSpec::builder(6, 2, 16).window(window, None).rope(rope).build().unwrap()
    };
    let (local, global) = (kind(Some(511), 1e4), kind(None, 1e6));
    let [local_layers, global_layers] =
        [&local, &global].map(|spec| Attention::new(&device, spec.clone(), Options::default()).unwrap());
    let mut cache = KvCache::new(&device, &local, SHAPE).unwrap();
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 10)]).unwrap();
    let sequences = [Sequence::new(id, 10)];
    let tensor = buffer(&device, 10 * 6 * 16 * 4, wgpu::BufferUsages::STORAGE);
    let out = buffer(&device, 10 * 6 * 16 * 4, wgpu::BufferUsages::STORAGE);
    let whole = wgpu::Buffer::as_entire_buffer_binding;
    let mut encoder = device.create_command_encoder(&Default::default());
    for (layer, (attention, spec)) in [(&local_layers, &local), (&global_layers, &global)].iter().enumerate()
    {
        let step = attention.prepare(&queue, &cache, &Batch::new(spec, &sequences)).unwrap();
        let new = NewKv { k: whole(&tensor), v: whole(&tensor) };
        assert_eq!(attention.append(&mut encoder, &step, layer as u32, new), Ok(()));
        let io = Io { q: whole(&tensor), out: whole(&out), lse: None };
        assert_eq!(attention.record(&mut encoder, &step, layer as u32, io), Ok(()));
    }
}

/// Makes room; nothing is shared, so nothing is copied.
fn grow(device: &wgpu::Device, cache: &mut KvCache, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
    cache.extend(&mut device.create_command_encoder(&Default::default()), growth)
}
