//! Steps whose sequences have moved on are refused, and a refused batch leaves a step what it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::backward_io;
use gqa::{
    Attention, AttentionSpec, Batch, CacheShape, Error, Io, KvCache, Layout, NewKv, Options, PagedShape,
    Sequence, SequenceId, Step,
};

fn device() -> (wgpu::Device, wgpu::Queue) {
    wgpu::Device::noop(&wgpu::DeviceDescriptor::default())
}

fn tensor(device: &wgpu::Device, elements: u64) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: elements * 4,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    })
}

/// A server's cache: two sequences of 100 tokens in pages of 16, in layers with a window of 32 keys.
struct Server {
    device: wgpu::Device,
    queue: wgpu::Queue,
    attention: Attention,
    cache: KvCache,
    ids: [SequenceId; 2],
}

impl Server {
    fn new() -> Self {
        let (device, queue) = device();
        let spec = AttentionSpec::builder(6, 2, 16).window(31, None).build().unwrap();
        let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
        let shape = PagedShape { sequences: 4, page: 16, tokens: 4096, longest_step: 100 };
        let mut cache = KvCache::paged(&device, &[&spec], shape).unwrap();
        let ids = [cache.open().unwrap(), cache.open().unwrap()];
        let mut server = Self { device, queue, attention, cache, ids };
        server.extend(100, &ids);
        server
    }

    fn extend(&mut self, tokens: u32, ids: &[SequenceId]) {
        let growth: Vec<_> = ids.iter().map(|id| (*id, tokens)).collect();
        let mut encoder = self.device.create_command_encoder(&Default::default());
        self.cache.extend(&mut encoder, &growth).unwrap();
    }

    /// A decode of the first sequence.
    fn step(&self) -> Step {
        let sequences = [Sequence::new(self.ids[0], 1)];
        let batch =
            Batch::new(self.attention.plan().spec(), &sequences).with_lse(self.attention.plan().spec());
        self.attention.prepare(&self.queue, &self.cache, &batch).unwrap()
    }

    /// What each call that uses the step's places says.
    fn uses(&self, step: &Step) -> [Result<(), Error>; 3] {
        let [q, out, lse] = [96, 96, 6].map(|elements| tensor(&self.device, elements));
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let io = Io { q: whole(&q), out: whole(&out), lse: Some(whole(&lse)) };
        let new = NewKv { k: whole(&q), v: whole(&q) };
        [
            self.attention.append(&mut encoder, step, 0, new),
            self.attention.record(&mut encoder, step, 0, io),
            self.attention.prepare_backward(step).map(drop),
        ]
    }
}

#[test]
fn a_step_is_refused_when_its_sequences_gave_places_back() {
    type Change = fn(&mut Server);
    let stale: [(&str, Change); 7] = [
        ("truncate", |s| s.cache.truncate(s.ids[0], 99).unwrap()),
        ("evict", |s| s.cache.evict(s.ids[0], 90).unwrap()),
        ("close", |s| s.cache.close(s.ids[0]).unwrap()),
        ("clear", |s| s.cache.clear()),
        ("defragment", |s| {
            let mut encoder = s.device.create_command_encoder(&Default::default());
            s.cache.defragment(&mut encoder).unwrap();
        }),
        ("a window that moves on", |s| (0..2).for_each(|_| s.extend(16, &[s.ids[0]]))),
        ("a page that a fork keeps", |s| {
            s.cache.fork(s.ids[0]).unwrap();
            s.extend(1, &[s.ids[0]]);
        }),
    ];
    for (name, change) in stale {
        let mut server = Server::new();
        // This gives back what no later query sees: only what comes after the step counts.
        server.extend(1, &[server.ids[0]]);
        let step = server.step();
        assert_eq!(server.uses(&step), [(); 3].map(Ok), "before {name}");
        change(&mut server);
        for used in server.uses(&step) {
            assert_eq!(used, Err(Error::StaleStep { sequence: server.ids[0].index() }), "{name}");
        }
    }
}

#[test]
fn what_moves_nothing_of_it_is_nothing_to_a_step() {
    let mut server = Server::new();
    server.extend(1, &[server.ids[0]]);
    let mut encoder = server.device.create_command_encoder(&Default::default());
    server.cache.defragment(&mut encoder).unwrap();
    let step = server.step();
    let [own, other] = server.ids;
    server.extend(50, &[other]);
    server.cache.fork(own).unwrap();
    server.cache.truncate(other, 140).unwrap();
    server.cache.evict(other, 130).unwrap();
    server.cache.close(other).unwrap();
    // Of its own sequence: nothing that takes a place away.
    server.cache.truncate(own, 101).unwrap();
    // A token that the step sees, but no page.
    server.cache.evict(own, 72).unwrap();
    assert_eq!(server.cache.defragment(&mut encoder).unwrap(), 0);
    assert_eq!(server.uses(&step), [(); 3].map(Ok));
}

/// A window that lets go of pages moves nothing of layers that keep all, nor does growth.
#[test]
fn layers_that_keep_all_outlive_the_windows_of_others() {
    let (device, queue) = device();
    let global = AttentionSpec::builder(6, 2, 16).build().unwrap();
    let local = global.to_builder().window(31, None).build().unwrap();
    let shape = PagedShape { sequences: 1, page: 16, tokens: 4096, longest_step: 100 };
    let mut cache = KvCache::paged(&device, &[&global, &local], shape).unwrap();
    let id = cache.open().unwrap();
    let mut encoder = device.create_command_encoder(&Default::default());
    cache.extend(&mut encoder, &[(id, 100)]).unwrap();
    let sequences = [Sequence::new(id, 1)];
    let steps = [&global, &local].map(|spec| {
        let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
        let step = attention.prepare(&queue, &cache, &Batch::new(spec, &sequences)).unwrap();
        (attention, step)
    });
    cache.extend(&mut encoder, &[(id, 50)]).unwrap();
    let [q, out] = [96, 96].map(|elements| tensor(&device, elements));
    let found = [0, 1].map(|layer: u32| {
        let (attention, step) = &steps[layer as usize];
        let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
        attention.record(&mut encoder, step, layer, io)
    });
    assert_eq!(found, [Ok(()), Err(Error::StaleStep { sequence: 0 })]);
}

#[test]
fn loops_are_stale_too() {
    let mut server = Server::new();
    let mut encoder = server.device.create_command_encoder(&Default::default());
    server.cache.reserve(&mut encoder, &[(server.ids[0], 10)]).unwrap();
    let sequences = [Sequence::new(server.ids[0], 1)];
    let batch = Batch::new(server.attention.plan().spec(), &sequences);
    let step = server.attention.prepare_loop(&server.queue, &server.cache, &batch).unwrap();
    let lengths = tensor(&server.device, 1);
    let mut schedule = || server.attention.schedule(&mut encoder, &step, lengths.as_entire_buffer_binding());
    assert_eq!(schedule(), Ok(()));
    server.cache.advance(server.ids[0], 3).unwrap();
    assert_eq!(schedule(), Ok(()));
    server.cache.truncate(server.ids[0], 100).unwrap();
    assert_eq!(schedule(), Err(Error::StaleStep { sequence: 0 }));
}

#[test]
fn bindings_of_a_stale_step_are_refused_until_it_is_updated() {
    let (device, queue) = device();
    let spec = AttentionSpec::builder(6, 2, 16).build().unwrap();
    let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
    let shape = CacheShape { layers: 1, sequences: 1, capacity: 100 };
    let mut cache = KvCache::new(&device, &spec, shape).unwrap();
    let id = cache.open().unwrap();
    let mut encoder = device.create_command_encoder(&Default::default());
    cache.extend(&mut encoder, &[(id, 50)]).unwrap();
    let sequences = [Sequence::new(id, 1)];
    let batch = Batch::new(&spec, &sequences);
    let mut step = attention.prepare(&queue, &cache, &batch).unwrap();
    let [q, out] = [96, 96].map(|elements| tensor(&device, elements));
    let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
    let bindings = attention.bind(&step, 0, io).unwrap();
    let dispatch = |step: &Step| {
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        attention.dispatch(&mut pass, step, &bindings)
    };
    assert_eq!(dispatch(&step), Ok(()));
    // Drafts were refused: the same length again, but other tokens.
    cache.truncate(id, 40).unwrap();
    cache.extend(&mut encoder, &[(id, 10)]).unwrap();
    assert_eq!(dispatch(&step), Err(Error::StaleStep { sequence: 0 }));
    attention.update(&queue, &cache, &batch, &mut step).unwrap();
    assert_eq!(dispatch(&step), Ok(()));
}

#[test]
fn a_refused_batch_leaves_the_gradients_of_the_one_before() {
    let required_limits = wgpu::Limits { max_compute_workgroups_per_dimension: 30, ..Default::default() };
    let (device, queue) =
        wgpu::Device::noop(&wgpu::DeviceDescriptor { required_limits, ..Default::default() });
    let spec = AttentionSpec::builder(6, 2, 16).build().unwrap();
    let options = Options { chunk: Some(1), ..Options::default() };
    let attention = Attention::new(&device, spec.clone(), options).unwrap();
    let shape = CacheShape { layers: 1, sequences: 2, capacity: 1000 };
    let mut cache = KvCache::new(&device, &spec, shape).unwrap();
    let (id, other) = (cache.open().unwrap(), cache.open().unwrap());
    let mut encoder = device.create_command_encoder(&Default::default());
    cache.extend(&mut encoder, &[(id, 4), (other, 900)]).unwrap();
    let few = [Sequence::new(id, 4)];
    let few = Batch::new(&spec, &few).with_lse(&spec);
    let mut step = attention.prepare(&queue, &cache, &few).unwrap();
    let size = attention.prepare_backward(&step).unwrap().size();
    // Refused when much of it is resolved already.
    let twice = [Sequence::new(other, 900), Sequence::new(other, 1)];
    let twice = Batch::new(&spec, &twice).with_lse(&spec);
    let refused = attention.update(&queue, &cache, &twice, &mut step);
    assert_eq!(refused, Err(Error::RepeatedSequence { sequence: other.index() }));
    assert_eq!(attention.prepare_backward(&step).unwrap().size(), size);
    // Refused when all of it is laid out, but for the last list: more tiles than workgroups are to be merged. Its queries lie in one place,
    // where gradients cannot.
    let many = [Sequence::new(other, 900)];
    let many = Batch::new(&spec, &many).with_lse(&spec);
    let many = Batch { q: Layout { token_stride: 0, ..many.q }, ..many };
    let refused = attention.update(&queue, &cache, &many, &mut step);
    assert!(matches!(refused, Err(Error::Limit { .. })), "{refused:?}");
    let gradients = attention.prepare_backward(&step).unwrap();
    assert_eq!(gradients.size(), size);
    // Tensors of four tokens are all that it needs.
    let [q, out, d_out, dq] = [(); 4].map(|()| tensor(&device, 4 * 96));
    let [dk, dv] = [(); 2].map(|()| tensor(&device, 4 * 32));
    let lse = tensor(&device, 4 * 6);
    let io = backward_io([&q, &out, &lse, &d_out, &dq, &dk, &dv], None);
    assert_eq!(attention.backward(&mut encoder, (&step, &gradients), 0, io.clone()), Ok(()));
    cache.truncate(id, 3).unwrap();
    let stale = attention.backward(&mut encoder, (&step, &gradients), 0, io);
    assert_eq!(stale, Err(Error::StaleStep { sequence: id.index() }));
}

#[test]
fn a_cache_of_another_device_is_refused() {
    let noop = wgpu::NoopBackendOptions { enable: true, ..Default::default() };
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::NOOP,
        backend_options: wgpu::BackendOptions { noop, ..Default::default() },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let [(device, queue), (elsewhere, _)] = [(); 2].map(|()| {
        let adapter = pollster::block_on(instance.request_adapter(&Default::default())).unwrap();
        pollster::block_on(adapter.request_device(&Default::default())).unwrap()
    });
    let spec = AttentionSpec::builder(6, 2, 16).build().unwrap();
    let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
    let shape = CacheShape { layers: 1, sequences: 1, capacity: 100 };
    let mut cache = KvCache::new(&elsewhere, &spec, shape).unwrap();
    let sequences = [Sequence { new_len: 0, ..Sequence::new(cache.open().unwrap(), 1) }];
    let batch = Batch::new(&spec, &sequences);
    for refused in [attention.prepare(&queue, &cache, &batch), attention.prepare_loop(&queue, &cache, &batch)]
    {
        assert!(matches!(refused, Err(Error::Field { field: "cache", .. })));
    }
    let here = KvCache::new(&device, &spec, shape).unwrap();
    let mut step = attention.prepare(&queue, &here, &Batch::new(&spec, &[])).unwrap();
    let refused = attention.update(&queue, &cache, &batch, &mut step);
    assert!(matches!(refused, Err(Error::Field { field: "cache", .. })));
}
