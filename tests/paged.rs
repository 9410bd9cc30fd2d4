//! Errors of a paged cache and of steps over it, on a device that does nothing: what they name, and that nothing has changed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use gqa::{
    Attention, AttentionSpec, Batch, Dtype, Error, Io, KvCache, NewKv, Options, PagedShape, Sequence,
    SequenceId, Step,
};

fn device() -> (wgpu::Device, wgpu::Queue) {
    wgpu::Device::noop(&wgpu::DeviceDescriptor::default())
}

/// Layers that see all, and layers with a window.
fn specs() -> (AttentionSpec, AttentionSpec) {
    let global = AttentionSpec::builder(6, 2, 16).kv_dtype(Dtype::Q8).build().unwrap();
    let local = global.to_builder().window(20, None).build().unwrap();
    (global, local)
}

const SHAPE: PagedShape = PagedShape { sequences: 3, page: 16, tokens: 160, longest_step: 64 };

/// A cache of one layer of each kind.
fn cache(device: &wgpu::Device) -> KvCache {
    let (global, local) = specs();
    KvCache::paged(device, &[&global, &local], SHAPE).unwrap()
}

fn grow(device: &wgpu::Device, cache: &mut KvCache, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
    cache.extend(&mut device.create_command_encoder(&Default::default()), growth)
}

fn field<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Field { field, .. }) => field.to_owned(),
        other => panic!("not a field error: {other:?}"),
    }
}

#[test]
fn shapes() {
    let (device, _queue) = device();
    let (global, local) = specs();
    let new = |shape| KvCache::paged(&device, &[&global, &local], shape);
    assert!(new(SHAPE).is_ok());
    let cases = [
        ("sequences", PagedShape { sequences: 0, ..SHAPE }),
        ("page", PagedShape { page: 0, ..SHAPE }),
        ("page", PagedShape { page: 24, ..SHAPE }),
        ("page", PagedShape { page: 1 << 17, ..SHAPE }),
        ("tokens", PagedShape { tokens: 0, ..SHAPE }),
        ("longest_step", PagedShape { longest_step: 0, ..SHAPE }),
    ];
    for (name, shape) in cases {
        assert_eq!(field(new(shape)), name, "{shape:?}");
    }
    assert_eq!(field(KvCache::paged(&device, &[], SHAPE)), "layers");
}

#[test]
fn a_full_cache_names_what_is_needed_and_free() {
    let (device, _queue) = device();
    let mut cache = cache(&device);
    let [a, b] = [cache.open().unwrap(), cache.open().unwrap()];
    // 10 pages that see all.
    grow(&device, &mut cache, &[(a, 64)]).unwrap();
    grow(&device, &mut cache, &[(a, 40), (b, 1)]).unwrap();
    let before = cache.usage();
    let error = grow(&device, &mut cache, &[(a, 9), (b, 60)]).unwrap_err();
    assert!(matches!(error, Error::CacheFull { needed: 4, free: 2, slots: 16, .. }), "{error:?}");
    assert!(error.to_string().contains("needs 4 more pages of 16 slots, but 2 are free"), "{error}");
    assert_eq!((cache.usage(), cache.check()), (before, Ok(())));
    // The same in several steps, for layers with a window: those have pages for steps of 64.
    let (device, _queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let local = specs().1;
    let mut cache =
        KvCache::paged(&device, &[&local], PagedShape { sequences: 1, tokens: 4096, ..SHAPE }).unwrap();
    let id = cache.open().unwrap();
    for _ in 0..100 {
        grow(&device, &mut cache, &[(id, 64)]).unwrap();
    }
    let error = grow(&device, &mut cache, &[(id, 200)]).unwrap_err();
    assert!(
        matches!(error, Error::CacheFull { .. }) && error.to_string().contains("append fewer"),
        "{error}"
    );
    assert_eq!(cache.len(id), Ok(6400));
}

#[test]
fn sequences_that_cannot_be() {
    let (device, _queue) = device();
    let mut cache = cache(&device);
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 64)]).unwrap();
    grow(&device, &mut cache, &[(id, 36)]).unwrap();
    let before = cache.usage();
    assert_eq!(field(cache.evict(id, 101)), "tokens");
    assert_eq!(field(cache.advance(id, 1)), "tokens");
    assert_eq!(field(cache.truncate(id, 101)), "len");
    // The window has kept the page of token 44 and those behind it: a query at 52 sees 32 and all behind it.
    let error = cache.truncate(id, 51).unwrap_err();
    assert!(error.to_string().contains("the least is 52, or 0"), "{error}");
    assert_eq!(field::<()>(Err(error)), "len");
    assert_eq!((cache.usage(), cache.check()), (before, Ok(())));
    assert_eq!(cache.truncate(id, 52), Ok(()));

    cache.reserve(&mut device.create_command_encoder(&Default::default()), &[(id, 5)]).unwrap();
    assert_eq!(field(cache.advance(id, 6)), "tokens");
    assert_eq!((cache.advance(id, 5), cache.len(id)), (Ok(()), Ok(57)));

    let fork = cache.fork(id).unwrap();
    cache.close(fork).unwrap();
    let stranger = KvCache::paged(&device, &[&specs().0], SHAPE).unwrap().open().unwrap();
    for stale in [fork, stranger] {
        assert!(matches!(cache.fork(stale), Err(Error::StaleSequence { .. })));
        assert!(matches!(cache.evict(stale, 0), Err(Error::StaleSequence { .. })));
        assert!(matches!(cache.advance(stale, 0), Err(Error::StaleSequence { .. })));
    }
    let forks = [cache.fork(id).unwrap(), cache.fork(id).unwrap()];
    assert!(matches!(cache.fork(id), Err(Error::NoFreeSequence { capacity: 3 })));
    // Three of 57 tokens in the same four pages; each that grows needs one more.
    let growth = [(id, 1), (forks[0], 1), (forks[1], 1)];
    grow(&device, &mut cache, &growth).unwrap();
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn a_cache_without_such_a_window_is_refused() {
    let (device, queue) = device();
    let (global, local) = specs();
    let cache = KvCache::paged(&device, &[&local], SHAPE).unwrap();
    let other = local.to_builder().window(19, None).build().unwrap();
    for spec in [&global, &other] {
        let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
        let error = attention.prepare(&queue, &cache, &Batch::new(spec, &[])).unwrap_err();
        let Error::CacheMismatch { needed, found } = &error else { panic!("{error}") };
        assert!(found.contains("with a window of 20 before"), "{error}");
        assert_eq!(needed.contains("with a window of 19 before"), spec == &other, "{error}");
    }
    // Layers that keep all serve any window.
    let cache = KvCache::paged(&device, &[&global], SHAPE).unwrap();
    let attention = Attention::new(&device, local.clone(), Options::default()).unwrap();
    assert!(attention.prepare(&queue, &cache, &Batch::new(&local, &[])).is_ok());
    // What is stored otherwise is another cache, too.
    for spec in [global.to_builder().rotated(true), global.to_builder().v_dtype(Dtype::Q4)] {
        let spec = spec.build().unwrap();
        let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
        let error = attention.prepare(&queue, &cache, &Batch::new(&spec, &[])).unwrap_err();
        assert!(matches!(error, Error::CacheMismatch { .. }), "{error}");
    }
}

#[test]
fn layers_of_another_kind() {
    let (device, queue) = device();
    let mut cache = cache(&device);
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 8)]).unwrap();
    let tensor = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 8 * 6 * 16 * 4,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let out = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: tensor.size(),
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let whole = wgpu::Buffer::as_entire_buffer_binding;
    let mut encoder = device.create_command_encoder(&Default::default());
    let (global, local) = specs();
    for (own, spec) in [(0, global), (1, local)] {
        let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
        let step: Step =
            attention.prepare(&queue, &cache, &Batch::new(&spec, &[Sequence::new(id, 8)])).unwrap();
        let mut append = |layer| {
            attention.append(&mut encoder, &step, layer, NewKv { k: whole(&tensor), v: whole(&tensor) })
        };
        assert_eq!((append(own), field(append(1 - own))), (Ok(()), "layer".to_owned()));
        let mut record = |layer| {
            attention.record(
                &mut encoder,
                &step,
                layer,
                Io { q: whole(&tensor), out: whole(&out), lse: None },
            )
        };
        assert_eq!((record(own), field(record(1 - own))), (Ok(()), "layer".to_owned()));
        assert!(matches!(record(2), Err(Error::NoSuchLayer { layer: 2, layers: 2 })));
    }
}

#[test]
fn queries_and_tokens_before_what_is_kept() {
    let (device, queue) = device();
    let mut cache = cache(&device);
    let (global, local) = specs();
    let [all, windowed] =
        [&global, &local].map(|spec| Attention::new(&device, spec.clone(), Options::default()).unwrap());
    let id = cache.open().unwrap();
    grow(&device, &mut cache, &[(id, 64)]).unwrap();
    grow(&device, &mut cache, &[(id, 36)]).unwrap();
    let prepare = |attention: &Attention, cache: &KvCache, change: &dyn Fn(&mut Sequence<'_>)| {
        let mut sequence = Sequence { new_len: 0, ..Sequence::new(id, 4) };
        change(&mut sequence);
        attention.prepare(&queue, cache, &Batch::new(attention.plan().spec(), &[sequence])).map(drop)
    };
    // The window has kept the keys from 32 on.
    for (q_start, refused) in [(52, false), (51, true), (0, true), (-4, false), (-3, true)] {
        let result = prepare(&windowed, &cache, &|s| s.q_start = Some(q_start));
        assert_eq!(result.is_err(), refused, "{q_start}: {result:?}");
        if refused {
            assert_eq!(field(result), "sequence.q_start");
        }
        assert_eq!(prepare(&all, &cache, &|s| s.q_start = Some(q_start)), Ok(()));
    }
    assert_eq!(prepare(&windowed, &cache, &|s| s.new_len = 68), Ok(()));
    assert_eq!(field(prepare(&windowed, &cache, &|s| s.new_len = 69)), "sequence.new_len");
    assert_eq!(prepare(&all, &cache, &|s| s.new_len = 69), Ok(()));
    // What was evicted no query sees, and no token is written there.
    cache.evict(id, 50).unwrap();
    assert_eq!(prepare(&all, &cache, &|s| s.q_start = Some(0)), Ok(()));
    assert_eq!(field(prepare(&all, &cache, &|s| s.new_len = 51)), "sequence.new_len");
}
