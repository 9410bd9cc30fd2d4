//! Gradients: recorded layer by layer, from what the forward pass has left.

use super::Attention;
use super::io::check_together;
use crate::batch::shared_token;
use crate::cache::Shard;
use crate::device::{create_buffer, create_filled};
use crate::error::Error;
use crate::layout::Layout;
use crate::params::{Params, StoreHead};
use crate::pipeline::{Pipeline, bind};
use crate::plan::{BackwardLists, BackwardPlan, StepInput, WorkLists};
use crate::shader::row_fours;
use crate::spec::AttentionSpec;
use crate::step::{Host, Step};
use crate::upload::{Image, Launch};

/// The backward kernels of one spec.
#[derive(Debug)]
pub(super) struct BackwardPipelines {
    plan: BackwardPlan,
    rows: Pipeline,
    queries: Pipeline,
    keys: Pipeline,
    sinks: Option<Pipeline>,
    store: Pipeline,
}

/// A step prepared for gradients. Made by [`Attention::prepare_backward`], recorded once per layer.
#[derive(Debug)]
pub struct BackwardStep {
    /// The batch that it is of.
    batch: u64,
    work: wgpu::Buffer,
    rows: Launch,
    sinks: Launch,
    /// With the shard whose keys they read.
    queries: Vec<(usize, Launch)>,
    keys: Vec<(usize, Launch)>,
    /// Of queries, keys, values.
    store: [Launch; 3],
    /// What `backward_rows` packs.
    packed: wgpu::Buffer,
    /// In f32: of queries, of keys and values.
    gradients: [wgpu::Buffer; 2],
}

/// Tensors of one layer for [`Attention::backward`]. Gradients are laid out as what they are gradients of, and stored alike:
/// `d_out` as `out`, `dq` as `q`, `dk` and `dv` as the new keys and values of the batch.
#[derive(Debug, Clone)]
pub struct BackwardIo<'a> {
    /// Queries, as the forward pass had them.
    pub q: wgpu::BufferBinding<'a>,
    /// Outputs, as the forward pass has written them.
    pub out: wgpu::BufferBinding<'a>,
    /// Log-sum-exp, as the forward pass has written it.
    pub lse: wgpu::BufferBinding<'a>,
    /// Gradients of the outputs.
    pub d_out: wgpu::BufferBinding<'a>,
    /// Gradients of the queries, before they turn: written.
    pub dq: wgpu::BufferBinding<'a>,
    /// Gradients of the step's new keys, before they turn: written.
    pub dk: wgpu::BufferBinding<'a>,
    /// Gradients of the step's new values: written.
    pub dv: wgpu::BufferBinding<'a>,
    /// Gradients of the sinks, `[q_heads]` in f32: written; needed exactly when the spec has sinks.
    pub d_sinks: Option<wgpu::BufferBinding<'a>>,
}

impl BackwardStep {
    /// Bytes of GPU memory that it holds: linear in the tokens of the step.
    pub fn size(&self) -> u64 {
        let [q, kv] = &self.gradients;
        [&self.work, &self.packed, q, kv].into_iter().map(wgpu::Buffer::size).sum()
    }
}

/// That rows of queries, new keys and new values do not overlap: what is only read may, a gradient that is written may not.
fn check_written(step: &Step, spec: &AttentionSpec) -> Result<(), Error> {
    let Host { params, new, resolved, .. } = &step.host;
    let [q, _, new_k, new_v, _] = resolved.shapes(spec);
    let of_q = |p: &Params| Layout { offset: p.q_offset, token_stride: p.q_token, head_stride: p.q_head };
    let of_out =
        |p: &Params| Layout { offset: p.out_offset, token_stride: p.out_token, head_stride: p.out_head };
    of_q(params).check_disjoint("q", q)?;
    of_q(new).check_disjoint("new_k", new_k)?;
    of_out(new).check_disjoint("new_v", new_v)
}

/// That no two sequences add to the gradient of one new token.
fn check_new_apart(input: &StepInput) -> Result<(), Error> {
    let mut spans: Vec<_> =
        input.appends.iter().filter(|new| new.len > 0).map(|new| (new.token, new.token + new.len)).collect();
    match shared_token(&mut spans) {
        Some(token) => {
            let needed =
                "another sequence takes the same new token: give each its own, and add up their gradients";
            Err(Error::field("sequence.new_token", token, needed))
        }
        None => Ok(()),
    }
}

impl Attention {
    /// Compiles now what the first [`Self::prepare_backward`] would compile: [`Self::warm_up`] leaves gradients out.
    ///
    /// # Errors
    /// [`Error::Field`] when the spec does not train, [`Error::Shader`] when the device refuses a kernel.
    pub fn warm_up_backward(&self) -> Result<(), Error> {
        self.backward_pipelines().map(drop)
    }

    /// Prepares a step's gradients: once per forward call, for all layers. The batch must have a layout for the LSE.
    ///
    /// The first call compiles the backward kernels.
    ///
    /// # Errors
    /// [`Error::Field`] when the spec does not train ([`Plan::backward`](crate::Plan::backward) says what does), the step has no LSE, is
    /// a loop on the GPU or another attention's, rows of its queries, new keys or new values overlap, or sequences share new tokens;
    /// [`Error::StaleStep`]; [`Error::Limit`] for a batch beyond the device's limits, [`Error::OutOfMemory`], [`Error::Shader`].
    pub fn prepare_backward(&self, step: &Step) -> Result<BackwardStep, Error> {
        self.check_step(step)?;
        step.host.resolved.changes.check()?;
        if step.resident.is_some() {
            return Err(Error::field(
                "step",
                "of a loop on the GPU",
                "gradients need a step of Attention::prepare",
            ));
        }
        if step.needs.lse.is_none() {
            return Err(Error::field("batch.lse", "absent", "gradients need it: see Batch::with_lse"));
        }
        check_written(step, self.plan.spec())?;
        check_new_apart(&step.host.resolved.input)?;
        let pipelines = self.backward_pipelines()?;
        let lists = pipelines.plan.work(&step.host.resolved.input);
        self.lay_out_backward(step, &lists)
    }

    /// The backward kernels, compiled where that has not been done.
    fn backward_pipelines(&self) -> Result<&BackwardPipelines, Error> {
        if let Some(pipelines) = self.backward.get() {
            return Ok(pipelines);
        }
        let plan = self.plan.backward()?;
        let compile = |variant| Pipeline::new(&self.build, variant);
        let pipelines = BackwardPipelines {
            rows: compile(&plan.rows)?,
            queries: compile(&plan.queries)?,
            keys: compile(&plan.keys)?,
            sinks: plan.sinks.as_ref().map(compile).transpose()?,
            store: compile(&plan.store)?,
            plan,
        };
        Ok(self.backward.get_or_init(|| pipelines))
    }

    fn lay_out_backward(&self, step: &Step, lists: &BackwardLists) -> Result<BackwardStep, Error> {
        let (caps, spec, host) = (&self.caps, self.plan.spec(), &step.host);
        let (tokens, new_tokens) = (host.resolved.tokens, host.resolved.new_tokens);
        let (k4, v4) = (row_fours(spec.head_dim()), row_fours(spec.v_head_dim()));
        let grid = |items: usize, heads: u32| WorkLists::grid(items, heads, caps.workgroups);
        let mut image = Image::default();
        let rows = u64::from(tokens) * u64::from(spec.q_heads());
        let of_tokens = Params { items: tokens, ..host.params };
        let (of_q, of_k) = (&lists.queries_stored, &lists.keys_stored);
        let of_rows = Params { items: of_q.len() as u32, ..host.params };
        let packed = image.launch(caps, (&of_rows, of_q), grid(of_q.len(), spec.q_heads()))?;
        // It has no items of its own: one word, so that its list is not empty.
        let sinks = image.launch(caps, (&of_tokens, &[0u32]), grid(spec.q_heads() as usize, 1))?;
        let mut walks = [Vec::new(), Vec::new()];
        for (launches, rounds) in walks.iter_mut().zip([&lists.queries, &lists.keys]) {
            for (shard, items) in rounds.iter() {
                let pages = step.shards.get(shard).map_or(0, |shard| shard.pages);
                let params = Params { items: items.len() as u32, pages, ..host.params };
                let launch = image.launch(caps, (&params, items), grid(items.len(), spec.kv_heads()))?;
                launches.push((shard, launch));
            }
        }
        let [queries, keys] = walks;
        let turns = u32::from(spec.rope().is_some());
        let q_row = k4 * 4;
        let q_head = StoreHead {
            items: lists.queries_stored.len() as u32,
            dim: spec.head_dim(),
            token: spec.q_heads() * q_row,
            head: q_row,
            first: 0,
            turns,
            out_offset: host.params.q_offset,
            out_token: host.params.q_token,
            out_head: host.params.q_head,
        };
        let kv_row = (k4 + v4) * 4;
        let k_head = StoreHead {
            items: lists.keys_stored.len() as u32,
            token: spec.kv_heads() * kv_row,
            head: kv_row,
            out_offset: host.new.q_offset,
            out_token: host.new.q_token,
            out_head: host.new.q_head,
            ..q_head
        };
        let v_head = StoreHead {
            dim: spec.v_head_dim(),
            first: k4 * 4,
            turns: 0,
            out_offset: host.new.out_offset,
            out_token: host.new.out_token,
            out_head: host.new.out_head,
            ..k_head
        };
        let store = [
            image.launch(caps, (&q_head, of_q), grid(of_q.len(), spec.q_heads()))?,
            image.launch(caps, (&k_head, of_k), grid(of_k.len(), spec.kv_heads()))?,
            image.launch(caps, (&v_head, of_k), grid(of_k.len(), spec.kv_heads()))?,
        ];
        let buffer = |what: &'static str, size: u64| {
            let found = caps.binding_size;
            if size > found {
                let (what, limit) = (what.to_owned(), "max_storage_buffer_binding_size");
                let hint = "split the batch: gradients of its tokens are kept in f32";
                return Err(Error::Limit { what, limit, needed: size, found, hint });
            }
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            create_buffer(&self.device, what, size.max(16), usage)
        };
        let new_rows = u64::from(new_tokens) * u64::from(spec.kv_heads());
        Ok(BackwardStep {
            batch: step.batch,
            work: create_filled(&self.device, "gqa.backward", wgpu::BufferUsages::STORAGE, image.bytes())?,
            rows: packed,
            sinks,
            queries,
            keys,
            store,
            packed: buffer("gqa.rows", rows * u64::from(k4 + v4 + 1) * 16)?,
            gradients: [
                buffer("gqa.gradients.q", rows * u64::from(k4) * 16)?,
                buffer("gqa.gradients.kv", new_rows * u64::from(k4 + v4) * 16)?,
            ],
        })
    }

    /// Records the gradients of one layer's attention: [`Self::record`] backwards. The layer of the cache must still hold what it held
    /// in the forward pass, and a dense mask the step's.
    ///
    /// No atomics and no expanded keys or values: the same inputs give the same bits on the same device. dK and dV are those of the
    /// step's new tokens; keys that were in the cache before are constants. What is not there to be written by the step (gaps of
    /// layouts) is left alone.
    ///
    /// ```
    /// use gqa::{Attention, AttentionSpec, BackwardIo, Batch, CacheShape, Io, KvCache, NewKv, Options, Sequence};
    ///
    /// # let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    /// # let tensor = |elements: u64| {
    /// #     let usage = wgpu::BufferUsages::STORAGE;
    /// #     let descriptor = wgpu::BufferDescriptor { label: None, size: elements * 4, usage, mapped_at_creation: false };
    /// #     device.create_buffer(&descriptor)
    /// # };
    /// let spec = AttentionSpec::builder(8, 2, 64).build()?;
    /// let attention = Attention::new(&device, spec.clone(), Options::default())?;
    /// let mut cache = KvCache::new(&device, &spec, CacheShape { layers: 1, sequences: 1, capacity: 128 })?;
    /// let text = cache.open()?;
    /// let mut encoder = device.create_command_encoder(&Default::default());
    /// cache.extend(&mut encoder, &[(text, 100)])?;
    /// let sequences = [Sequence::new(text, 100)];
    /// let step = attention.prepare(&queue, &cache, &Batch::new(&spec, &sequences).with_lse(&spec))?;
    /// let gradients = attention.prepare_backward(&step)?;
    ///
    /// let [q, out, d_out, dq] = [(); 4].map(|()| tensor(100 * 8 * 64));
    /// let [k, v, dk, dv] = [(); 4].map(|()| tensor(100 * 2 * 64));
    /// let lse = tensor(100 * 8);
    /// let whole = wgpu::Buffer::as_entire_buffer_binding;
    /// attention.append(&mut encoder, &step, 0, NewKv { k: whole(&k), v: whole(&v) })?;
    /// attention.record(&mut encoder, &step, 0, Io { q: whole(&q), out: whole(&out), lse: Some(whole(&lse)) })?;
    /// // The loss, and its gradient by the outputs; then back.
    /// let io = BackwardIo {
    ///     q: whole(&q), out: whole(&out), lse: whole(&lse), d_out: whole(&d_out),
    ///     dq: whole(&dq), dk: whole(&dk), dv: whole(&dv), d_sinks: None,
    /// };
    /// attention.backward(&mut encoder, (&step, &gradients), 0, io)?;
    /// # Ok::<(), gqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::bind`]; [`Error::Field`] when `gradients` were prepared for another batch.
    pub fn backward(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        (step, gradients): (&Step, &BackwardStep),
        layer: u32,
        io: BackwardIo<'_>,
    ) -> Result<(), Error> {
        let shards = &self.layer(step, layer)?.shards;
        if gradients.batch != step.batch {
            let needed = "call Attention::prepare_backward for this step, after every Attention::update";
            return Err(Error::field("gradients", "prepared for another batch", needed));
        }
        let pipelines = self.backward_pipelines()?;
        self.check_masked(step)?;
        let spec = self.plan.spec();
        check_together(
            "d_sinks",
            "it goes together with the spec's sinks",
            [spec.sinks(), io.d_sinks.is_some()],
        )?;
        let (bytes, needs) = (spec.q_dtype().bytes(), &step.needs);
        let view = |name, binding, elements| self.caps.view(name, binding, elements, bytes);
        let (q, out) = (view("q", &io.q, needs.q)?, view("out", &io.out, needs.out)?);
        let d_out = view("d_out", &io.d_out, needs.out)?;
        let lse = self.caps.view("lse", &io.lse, needs.lse.unwrap_or(0), 4)?;
        let stored = [
            view("dq", &io.dq, needs.q)?,
            view("dk", &io.dk, needs.new_k)?,
            view("dv", &io.dv, needs.new_v)?,
        ];
        let d_sinks = match &io.d_sinks {
            Some(binding) => Some(self.caps.view("d_sinks", binding, spec.q_heads().into(), 4)?),
            None => None,
        };
        let table = self.table(layer)?;
        let [dq, dkv] = &gradients.gradients;
        encoder.clear_buffer(dq, 0, None);
        encoder.clear_buffer(dkv, 0, None);
        encoder.clear_buffer(&gradients.packed, 0, None);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("gqa.backward"),
            timestamp_writes: None,
        });
        let mut run = |pipeline: &Pipeline, launch: &Launch, more: &[(u32, wgpu::BindingResource<'_>)]| {
            let Some([x, y, z]) = launch.get() else { return };
            let mut resources = vec![(0, launch.list(&gradients.work))];
            resources.extend_from_slice(more);
            resources.extend(table.clone());
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &bind(&self.device, pipeline, &resources), &[]);
            pass.dispatch_workgroups(x, y, z);
        };
        let packed = || gradients.packed.as_entire_binding();
        let resources = [(1, q), (2, out), (4, d_out), (5, lse), (6, packed())];
        run(&pipelines.rows, &gradients.rows, &resources);
        if let (Some(sinks), Some(d_sinks)) = (&pipelines.sinks, d_sinks) {
            run(sinks, &gradients.sinks, &[(1, packed()), (6, d_sinks)]);
        }
        let walks = [(&pipelines.queries, &gradients.queries, dq), (&pipelines.keys, &gradients.keys, dkv)];
        for (pipeline, launches, into) in walks {
            for (shard, launch) in launches {
                let Some(Shard { k, v }) = shards.get(*shard) else { continue };
                let mut resources =
                    vec![(1, packed()), (2, k.as_entire_binding()), (3, v.as_entire_binding())];
                resources.push((6, into.as_entire_binding()));
                resources.push((7, step.buffers.words.as_entire_binding()));
                resources.extend(self.fetches.as_ref().map(|b| (9, b.as_entire_binding())));
                run(pipeline, launch, &resources);
            }
        }
        for ((launch, tensor), from) in gradients.store.iter().zip(stored).zip([dq, dkv, dkv]) {
            run(&pipelines.store, launch, &[(4, tensor), (6, from.as_entire_binding())]);
        }
        Ok(())
    }
}
