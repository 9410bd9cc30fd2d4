//! Attention over Burn tensors.

use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::{Bool, Tensor};
use gqa::wgpu;
use gqa::{Attention, AttentionSpec, Io, KvCache, Mask, NewKv, Options, Sequence};

use crate::WgpuSetup;
use crate::error::Error;
use crate::step::{Layouts, Step};
use crate::view::{View, bool, check_dtype, float};

/// Grouped-query attention on the device that Burn uses, for one [`AttentionSpec`].
#[derive(Debug)]
pub struct GqaAttention {
    id: u64,
    attention: Attention,
    device: wgpu::Device,
    queue: wgpu::Queue,
    alignment: u32,
}

impl GqaAttention {
    /// Plans `spec` on Burn's device: once per spec. Kernels compile with the first call that wants them, or by
    /// `inner().warm_up()`.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn new(setup: &WgpuSetup, spec: AttentionSpec) -> Result<Self, Error> {
        Self::with_options(setup, spec, Options::default())
    }

    /// The same with options; [`Options::pooled`] is always on, since Burn's tensors share buffers.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn with_options(setup: &WgpuSetup, spec: AttentionSpec, options: Options) -> Result<Self, Error> {
        let options = Options { pooled: true, ..options };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            attention: Attention::new(&setup.device, spec, options)?,
            device: setup.device.clone(),
            queue: setup.queue.clone(),
            alignment: setup.device.limits().min_storage_buffer_offset_alignment,
        })
    }

    /// The library's attention: its plan, its weights.
    pub fn inner(&self) -> &Attention {
        &self.attention
    }

    /// The same, to [set weights](Attention::set_weights): sinks, norms of queries and keys.
    pub fn inner_mut(&mut self) -> &mut Attention {
        &mut self.attention
    }

    /// What was asked for.
    pub fn spec(&self) -> &AttentionSpec {
        self.attention.plan().spec()
    }

    /// Begins a forward call: makes room in the cache for the new tokens of each sequence. Models with layers of several kinds begin
    /// once, with any of their attentions, and give the step to each.
    ///
    /// The new tokens count from here on: when a [`Self::forward`] fails, [`Step::undo`] takes them back.
    ///
    /// # Errors
    /// As [`KvCache::extend`]; then the cache is as before.
    pub fn begin<'a>(&self, cache: &mut KvCache, sequences: &[Sequence<'a>]) -> Result<Step<'a>, Error> {
        let new: Vec<_> = sequences.iter().map(|s| (s.id, s.new_len)).collect();
        let mut encoder = self.encoder();
        cache.extend(&mut encoder, &new)?;
        // Copies of shared pages come before what this call appends.
        self.queue.submit([encoder.finish()]);
        let lengths = sequences.iter().map(|s| cache.len(s.id)).collect::<Result<_, _>>()?;
        Ok(Step { sequences: sequences.to_vec(), lengths, mask: None, prepared: Vec::new() })
    }

    /// Gives the step a dense mask that is added to the logits, where the spec has [`Mask::Add`](gqa::Mask::Add): before the first
    /// layer, `[sequences, q_heads, q_len, kv_len]` in the spec's `q_dtype`; an extent of 1 stands for all.
    ///
    /// # Errors
    /// [`Error::Tensor`] and [`Error::Backend`].
    pub fn add_mask(&self, step: &mut Step<'_>, mask: Tensor<4>) -> Result<(), Error> {
        self.check_mask(Mask::Add)?;
        let mask = float("mask", mask)?;
        check_dtype("mask", &mask, self.spec().q_dtype())?;
        let bytes = self.spec().q_dtype().bytes();
        step.mask(self.spec(), View::new("mask", &mask, (bytes, self.alignment))?, 1)
    }

    /// Gives the step a dense mask of the keys that may be seen, where the spec has [`Mask::Keep`](gqa::Mask::Keep), of the same shapes.
    ///
    /// Burn's own attention names the keys that are hidden: `mask.bool_not()` turns one into the other.
    ///
    /// # Errors
    /// [`Error::Tensor`] and [`Error::Backend`].
    pub fn keep_mask(&self, step: &mut Step<'_>, mask: Tensor<4, Bool>) -> Result<(), Error> {
        self.check_mask(Mask::Keep)?;
        let mask = bool("mask", mask)?;
        // The library reads a byte of each element, the low one: in bytes, an element of Burn's has this length.
        let bytes = mask.dtype.size() as u32;
        step.mask(self.spec(), View::new("mask", &mask, (1, self.alignment))?, bytes)
    }

    /// Writes `k` and `v`, the new tokens of all sequences one behind the other, into `layer` of the cache and attends with `q`.
    ///
    /// `q` is `[tokens, q_heads, head_dim]`, `k` `[tokens, kv_heads, head_dim]`, `v` `[tokens, kv_heads, v_head_dim]`, with any
    /// strides between tokens and heads, in the spec's `q_dtype`, on the device of the setup; the result is
    /// `[tokens, q_heads, v_head_dim]`, dense. Where values lie in keys `v` is not read: give the keys again.
    ///
    /// # Errors
    /// [`Error::Tensor`], [`Error::Backend`] and [`Error::Memory`] for a tensor that does not fit, [`Error::Stale`], and what
    /// [`Attention::append`] and [`Attention::record`] say.
    pub fn forward(
        &self,
        cache: &KvCache,
        step: &mut Step<'_>,
        layer: u32,
        [q, k, v]: [Tensor<3>; 3],
    ) -> Result<Tensor<3>, Error> {
        let spec = self.spec();
        let (heads, kv_heads, dim) = (spec.q_heads(), spec.kv_heads(), spec.head_dim());
        let v_dim = if spec.v_in_k() { dim } else { spec.v_head_dim() };
        let shape = [q.dims()[0], heads as usize, spec.v_head_dim() as usize];
        step.check_tokens([&q, &k, &v].map(|x| x.dims()[0]))?;
        let device = q.device();
        let q = self.view("q", q)?;
        let out: Tensor<3> = Tensor::empty(shape, (&device, q.dtype));
        let (k, v, written) = (self.view("k", k)?, self.view("v", v)?, self.view("out", out.clone())?);
        let layouts = Layouts {
            q: q.layout("q", heads, dim)?,
            out: written.layout("out", heads, spec.v_head_dim())?,
            lse: None,
            new_k: k.layout("k", kv_heads, dim)?,
            new_v: v.layout("v", kv_heads, v_dim)?,
        };
        let step = &step.of(self, cache, layouts)?.step;
        let mut encoder = self.encoder();
        self.attention.append(&mut encoder, step, layer, NewKv { k: k.binding(), v: v.binding() })?;
        let io = Io { q: q.binding(), out: written.binding(), lse: None };
        self.attention.record(&mut encoder, step, layer, io)?;
        // Behind all that Burn has submitted, before all that it will: one queue. The views have kept the memory until here.
        self.queue.submit([encoder.finish()]);
        Ok(out)
    }

    fn check_mask(&self, given: Mask) -> Result<(), Error> {
        let asked = self.spec().mask();
        if asked == given {
            return Ok(());
        }
        let [needed, found] = [asked, given].map(|mask| format!("Mask::{mask:?}"));
        Err(Error::Tensor { name: "mask", problem: "the spec asks for another", needed, found })
    }

    pub(crate) fn view(&self, name: &'static str, tensor: Tensor<3>) -> Result<View, Error> {
        let tensor = float(name, tensor)?;
        check_dtype(name, &tensor, self.spec().q_dtype())?;
        View::new(name, &tensor, (self.spec().q_dtype().bytes(), self.alignment))
    }

    #[cfg(feature = "autodiff")]
    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.device
    }

    #[cfg(feature = "autodiff")]
    pub(crate) fn alignment(&self) -> u32 {
        self.alignment
    }

    pub(crate) fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// Tells the steps of one attention from those of another.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("gqa.burn") })
    }
}
