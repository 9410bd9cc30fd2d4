//! Merging partial results: attention over some keys and attention over others become attention over both.

use crate::attention::check_apart;
use crate::caps::Caps;
use crate::device::create_filled;
use crate::error::Error;
use crate::layout::{Layout, Shape};
use crate::params::Params;
use crate::pipeline::{Build, Pipeline, bind};
use crate::plan::{Options, Plan, WorkLists};
use crate::shader::Variant;
use crate::spec::AttentionSpec;
use crate::step::unique_id;

/// Merges partial results `(out, LSE)` of the same queries over different keys, on the GPU: for a prefix that several sequences
/// share, for parts of a context on several devices.
///
/// `l = ln(exp(l1) + exp(l2))`, `out = out1 exp(l1 - l) + out2 exp(l2 - l)` (FlashInfer, arXiv 2501.01005): commutative, and
/// associative to rounding. A row whose LSE is -inf has seen no key and changes nothing. Sinks take part once: results that are
/// to be merged come from specs without, but for one. [`reference::merge`](crate::reference::merge) is the definition.
///
/// ```
/// # use gqa::{AttentionSpec, Layout, Merge, MergeLayout, Partial};
/// # let (device, _queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
/// # let tensor = |elements: u64| {
/// #     let usage = wgpu::BufferUsages::STORAGE;
/// #     let descriptor = wgpu::BufferDescriptor { label: None, size: elements * 4, usage, mapped_at_creation: false };
/// #     device.create_buffer(&descriptor)
/// # };
/// # let (prefix_out, prefix_lse, out, lse) = (tensor(7 * 8 * 64), tensor(7 * 8), tensor(7 * 8 * 64), tensor(7 * 8));
/// let spec = AttentionSpec::builder(8, 2, 64).build()?;
/// let merge = Merge::new(&device, &spec)?;
/// let layout = MergeLayout { tokens: 7, out: Layout::tokens_heads(8, 64), lse: Layout::tokens_heads(8, 1) };
/// let step = merge.prepare(&layout)?;
/// let mut encoder = device.create_command_encoder(&Default::default());
/// let part = |out, lse| Partial {
///     out: wgpu::Buffer::as_entire_buffer_binding(out),
///     lse: wgpu::Buffer::as_entire_buffer_binding(lse),
/// };
/// merge.record(&mut encoder, &step, &part(&prefix_out, &prefix_lse), &part(&out, &lse))?;
/// # Ok::<(), gqa::Error>(())
/// ```
#[derive(Debug)]
pub struct Merge {
    id: u64,
    device: wgpu::Device,
    caps: Caps,
    variant: Variant,
    pipeline: Pipeline,
}

/// Where the rows of partial results lie, the same for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeLayout {
    /// Tokens.
    pub tokens: u32,
    /// Outputs: `(token, q_heads, v_head_dim)`.
    pub out: Layout,
    /// Log-sum-exp: `(token, q_heads, 1)`.
    pub lse: Layout,
}

/// A partial result: outputs in the spec's `q_dtype`, LSE in f32.
#[derive(Debug, Clone)]
pub struct Partial<'a> {
    /// Outputs.
    pub out: wgpu::BufferBinding<'a>,
    /// Log-sum-exp, natural.
    pub lse: wgpu::BufferBinding<'a>,
}

/// A [`MergeLayout`] on the GPU, made by [`Merge::prepare`], used for every layer.
#[derive(Debug)]
pub struct MergeStep {
    /// The merge that prepared it: another has other heads and dims.
    merge: u64,
    params: wgpu::Buffer,
    grid: [u32; 3],
    needs: [u64; 2],
}

impl Merge {
    /// Compiles the kernel for the heads and dims of `spec`.
    ///
    /// # Errors
    /// [`Error::Limit`] when there are more heads than workgroups in a dimension, [`Error::Shader`] when the device refuses the kernel.
    pub fn new(device: &wgpu::Device, spec: &AttentionSpec) -> Result<Self, Error> {
        Self::with_cache(device, spec, None)
    }

    /// The same, compiling through a cache of the device's, as [`Attention::with_cache`](crate::Attention::with_cache).
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_cache(
        device: &wgpu::Device,
        spec: &AttentionSpec,
        cache: Option<wgpu::PipelineCache>,
    ) -> Result<Self, Error> {
        let caps = Caps::of(device);
        let variant = Plan::new(spec, &caps, &Options::default())?.merge();
        let build = Build { device: device.clone(), checked: false, cache };
        let pipeline = Pipeline::new(&build, &variant)?;
        Ok(Self { id: unique_id(), device: device.clone(), caps, variant, pipeline })
    }

    /// Prepares merging rows that lie as `layout` says.
    ///
    /// # Errors
    /// [`Error::Field`] for a layout that cannot be or too many rows, [`Error::OutOfMemory`].
    pub fn prepare(&self, layout: &MergeLayout) -> Result<MergeStep, Error> {
        let spec = &self.variant.spec;
        let MergeLayout { tokens, out, lse } = *layout;
        let shape = |dim| Shape { tokens, heads: spec.q_heads(), dim };
        for (name, layout, shape) in [("out", out, shape(spec.v_head_dim())), ("lse", lse, shape(1))] {
            layout.check_reach(name, shape)?;
            layout.check_disjoint(name, shape)?;
        }
        let params = Params {
            items: tokens,
            out_offset: out.offset,
            out_token: out.token_stride,
            out_head: out.head_stride,
            lse_offset: lse.offset,
            lse_token: lse.token_stride,
            lse_head: lse.head_stride,
            ..Params::default()
        };
        let rows = u64::from(tokens) * u64::from(spec.q_heads());
        let workgroups = rows.div_ceil(u64::from(self.variant.tile.threads));
        let most = u64::from(self.caps.workgroups);
        if rows > u64::from(u32::MAX) || workgroups.div_ceil(most) > most {
            return Err(Error::field("tokens", tokens, "there are too many rows: merge them in parts"));
        }
        let usage = wgpu::BufferUsages::STORAGE;
        Ok(MergeStep {
            merge: self.id,
            params: create_filled(&self.device, "gqa.merge", usage, bytemuck::bytes_of(&params))?,
            grid: WorkLists::grid(workgroups as usize, 1, self.caps.workgroups),
            needs: [out.extent(shape(spec.v_head_dim())), lse.extent(shape(1))],
        })
    }

    /// Records `into := into + from`.
    ///
    /// # Errors
    /// [`Error::Field`] when another merge prepared the step, [`Error::Buffer`] for a view that is too small, misaligned, lacks a
    /// usage or has both roles.
    pub fn record(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        step: &MergeStep,
        from: &Partial<'_>,
        into: &Partial<'_>,
    ) -> Result<(), Error> {
        if step.merge != self.id {
            return Err(Error::field("step", "prepared by another merge", "use the merge that prepared it"));
        }
        let bytes = self.variant.spec.q_dtype().bytes();
        let [out, lse] = step.needs;
        let resources = [
            (0, step.params.as_entire_binding()),
            (1, self.caps.view("from.out", &from.out, out, bytes)?),
            (2, self.caps.view("from.lse", &from.lse, lse, 4)?),
            (4, self.caps.view("into.out", &into.out, out, bytes)?),
            (5, self.caps.view("into.lse", &into.lse, lse, 4)?),
        ];
        check_apart(
            &[("into.out", into.out.buffer), ("into.lse", into.lse.buffer)],
            &[("from.out", from.out.buffer), ("from.lse", from.lse.buffer)],
        )?;
        let [x, y, z] = step.grid;
        if x == 0 {
            return Ok(());
        }
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("gqa.merge"),
            timestamp_writes: None,
        });
        pass.set_pipeline(&self.pipeline.pipeline);
        pass.set_bind_group(0, &bind(&self.device, &self.pipeline, &resources), &[]);
        pass.dispatch_workgroups(x, y, z);
        Ok(())
    }
}
