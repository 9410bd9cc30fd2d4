//! The skeleton of a server: requests come and go, share a system prompt, and are computed in one ragged batch per step, in layers of
//! two kinds. A model would fill the tensors and pick the tokens.
//!
//! `cargo run --release --example serve`

use gqa::{
    Attention, AttentionSpec, Batch, Bindings, Dtype, Error, Io, KvCache, NewKv, Options, PagedShape,
    Sequence, SequenceId, Step,
};

const HEADS: (u32, u32, u32) = (8, 2, 64);
/// Tokens of one step, over all requests: long prompts come in chunks.
const STEP_TOKENS: u32 = 128;
const SYSTEM_PROMPT: u32 = 200;

/// A user's request, and how far it is.
struct Request {
    sequence: SequenceId,
    /// Tokens of its prompt and its answer.
    asked: (u32, u32),
    /// Tokens of its prompt that are not in the cache yet.
    prompt: u32,
    /// Tokens that are still to be generated.
    answer: u32,
}

/// Layers with one spec: their kernels, the work of the step at hand, and bindings that outlive steps.
struct Kind {
    layers: Vec<u32>,
    attention: Attention,
    step: Step,
    bindings: Vec<Bindings>,
}

struct Server {
    device: wgpu::Device,
    queue: wgpu::Queue,
    cache: KvCache,
    kinds: Vec<Kind>,
    /// q, k, v, out of the largest step.
    tensors: [wgpu::Buffer; 4],
}

impl Server {
    /// As in Gemma: every third layer sees all keys, the others a window.
    fn new(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self, Error> {
        let (q_heads, kv_heads, dim) = HEADS;
        let global = AttentionSpec::builder(q_heads, kv_heads, dim).kv_dtype(Dtype::F16).build()?;
        let local = global.to_builder().window(127, None).build()?;
        let model: Vec<_> = (0..6).map(|nth| if nth % 3 == 2 { &global } else { &local }).collect();
        let shape = PagedShape { sequences: 9, page: 16, tokens: 1_200, longest_step: STEP_TOKENS };
        let cache = KvCache::paged(&device, &model, shape)?;
        let kinds = [&local, &global].map(|spec| {
            let layers = (0..).zip(&model).filter(|(_, of)| *of == &spec).map(|(nth, _)| nth).collect();
            let attention = Attention::new(&device, spec.clone(), Options::default())?;
            attention.warm_up()?;
            let step = attention.prepare(&queue, &cache, &Batch::new(spec, &[]))?;
            Ok(Kind { layers, attention, step, bindings: Vec::new() })
        });
        let kinds = kinds.into_iter().collect::<Result<_, Error>>()?;
        let tensors = [q_heads, kv_heads, kv_heads, q_heads].map(|heads| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: u64::from(STEP_TOKENS * heads * dim * 4),
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        });
        Ok(Self { device, queue, cache, kinds, tensors })
    }

    /// Computes `tokens` more tokens of each sequence: all or, where the cache is full, none.
    fn step(&mut self, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
        let Self { device, queue, cache, kinds, tensors: [q, k, v, out] } = self;
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        let mut encoder = device.create_command_encoder(&Default::default());
        cache.extend(&mut encoder, growth)?;
        let sequences: Vec<_> = growth.iter().map(|(id, len)| Sequence::new(*id, *len)).collect();
        // A model goes through its layers in order; what one kind's layers share is made once.
        for Kind { layers, attention, step, bindings } in kinds {
            let batch = Batch::new(attention.plan().spec(), &sequences);
            attention.update(queue, cache, &batch, step)?;
            if !bindings.first().is_some_and(|first| first.fit(step)) {
                let io = || Io { q: whole(q), out: whole(out), lse: None };
                let bound = layers.iter().map(|layer| attention.bind(step, *layer, io()));
                *bindings = bound.collect::<Result<_, _>>()?;
            }
            for (layer, bindings) in layers.iter().zip(bindings) {
                attention.append(&mut encoder, step, *layer, NewKv { k: whole(k), v: whole(v) })?;
                let mut pass = encoder.begin_compute_pass(&Default::default());
                attention.dispatch(&mut pass, step, bindings)?;
            }
        }
        queue.submit([encoder.finish()]);
        Ok(())
    }
}

/// What each request computes next: all of them a token, and the rest of the step for prompts, in the order of arrival.
fn plan(requests: &[Request]) -> Vec<(SequenceId, u32)> {
    let mut room = STEP_TOKENS - requests.iter().filter(|r| r.prompt == 0).count() as u32;
    let of = |request: &Request| {
        let tokens = match request.prompt {
            0 => 1,
            prompt => prompt.min(room),
        };
        room -= if request.prompt == 0 { 0 } else { tokens };
        (request.sequence, tokens)
    };
    requests.iter().map(of).filter(|(_, tokens)| *tokens > 0).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&Default::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&gqa::device_descriptor(&adapter)))?;
    println!("{}", adapter.get_info().name);
    let mut server = Server::new(device, queue)?;

    // Every request begins with the system prompt: computed once, forked, and read once for all of them.
    let system = server.cache.open()?;
    for tokens in [STEP_TOKENS, SYSTEM_PROMPT - STEP_TOKENS] {
        server.step(&[(system, tokens)])?;
    }
    let mut waiting: Vec<(u32, u32)> = (0..20).map(|nth| (20 + nth * 37 % 250, 5 + nth * 13 % 40)).collect();
    let mut requests = Vec::<Request>::new();
    let (mut steps, mut computed, mut is_full) = (0, 0, false);
    while !waiting.is_empty() || !requests.is_empty() {
        while let Some(asked) = waiting.last().copied().filter(|_| !is_full) {
            match server.cache.fork(system) {
                Ok(sequence) => requests.push(Request { sequence, asked, prompt: asked.0, answer: asked.1 }),
                Err(Error::NoFreeSequence { .. }) => break,
                Err(error) => return Err(error.into()),
            }
            waiting.pop();
        }
        let growth = plan(&requests);
        match server.step(&growth) {
            Ok(()) => {}
            // Nothing has changed: the youngest request waits until others are done, and then begins anew.
            Err(Error::CacheFull { .. }) if requests.len() > 1 => {
                if let Some(Request { sequence, asked, .. }) = requests.pop() {
                    server.cache.close(sequence)?;
                    waiting.push(asked);
                }
                is_full = true;
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        for (id, tokens) in &growth {
            let Some(request) = requests.iter_mut().find(|r| r.sequence == *id) else { continue };
            match request.prompt {
                0 => request.answer -= 1,
                _ => request.prompt -= tokens,
            }
        }
        let done = |request: &Request| request.prompt == 0 && request.answer == 0;
        for request in requests.iter().filter(|r| done(r)) {
            server.cache.close(request.sequence)?;
            is_full = false;
        }
        requests.retain(|request| !done(request));
        computed += growth.iter().map(|(_, tokens)| tokens).sum::<u32>();
        steps += 1;
        if steps % 10 == 0 {
            println!("\nstep {steps}: {computed} tokens, {} requests at once", growth.len());
            println!("{}", server.cache.usage());
        }
    }
    server.device.poll(wgpu::PollType::wait_indefinitely())?;
    println!("\n{computed} tokens in {steps} steps; what is left in the cache is the system prompt:");
    println!("{}", server.cache.usage());
    Ok(())
}
