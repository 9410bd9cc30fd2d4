//! The caller's tensors: what a layer reads and writes, and the checks of its views.

use crate::caps::Caps;
use crate::error::Error;
use crate::plan::Plan;
use crate::shader::{Access, TableLayout, Variant};
use crate::step::Step;

/// Tensors of one layer. Bindings may have any offset that obeys `min_storage_buffer_offset_alignment`; the layouts of the
/// [`Batch`](crate::Batch) say where the elements lie behind it. `q` must not share a buffer with `out` or `lse`,
/// unless [`Options::pooled`](crate::Options::pooled) says so.
#[derive(Debug, Clone)]
pub struct Io<'a> {
    /// Queries, in the spec's `q_dtype`: `[tokens, q_heads, head_dim]` unless the batch says otherwise.
    pub q: wgpu::BufferBinding<'a>,
    /// Outputs, in `q_dtype`: `[tokens, q_heads, v_head_dim]`.
    pub out: wgpu::BufferBinding<'a>,
    /// Log-sum-exp, natural, in f32: `[tokens, q_heads]`; needed exactly when the batch has a layout for it.
    pub lse: Option<wgpu::BufferBinding<'a>>,
}

/// New keys and values of one layer, in the spec's `q_dtype`; the layouts of the [`Batch`](crate::Batch) say where the elements lie.
#[derive(Debug, Clone)]
pub struct NewKv<'a> {
    /// New keys, `[new tokens, kv_heads, head_dim]`: neither normalised nor turned where the spec asks for that.
    pub k: wgpu::BufferBinding<'a>,
    /// New values, `[new tokens, kv_heads, v_head_dim]`. Where values lie in keys it is not read: give the new keys again.
    pub v: wgpu::BufferBinding<'a>,
}

/// Tensors of one layer, bound: [`Attention::bind`](crate::Attention::bind) once, [`Attention::dispatch`](crate::Attention::dispatch) as often as the step is used.
#[derive(Debug, Clone)]
pub struct Bindings {
    pub(super) stamp: u64,
    pub(super) embed: Option<wgpu::BindGroup>,
    pub(super) shards: Vec<ShardBindings>,
    pub(super) combine: Option<wgpu::BindGroup>,
}

impl Bindings {
    /// Whether they are good for `step` as it is now. They are not for another step, nor where
    /// [`Attention::update`](crate::Attention::update) has left the memory that they are of, because a batch was larger than any before.
    pub fn fit(&self, step: &Step) -> bool {
        self.stamp == step.stamp
    }
}

/// What reads one shard of the layer.
#[derive(Debug, Clone)]
pub(super) struct ShardBindings {
    pub(super) prefill: Option<wgpu::BindGroup>,
    pub(super) decode: Option<wgpu::BindGroup>,
}

impl Caps {
    /// A caller's view, checked and cut to the elements that the step reaches.
    pub(crate) fn view<'a>(
        &self,
        name: &'static str,
        view: &wgpu::BufferBinding<'a>,
        elements: u64,
        bytes: u32,
    ) -> Result<wgpu::BindingResource<'a>, Error> {
        let fail =
            |problem, needed: String, found: String| Err(Error::Buffer { name, problem, needed, found });
        if !view.buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return fail(
                "it cannot be bound",
                "BufferUsages::STORAGE".to_owned(),
                format!("{:?}", view.buffer.usage()),
            );
        }
        let alignment = u64::from(self.offset_alignment);
        if !view.offset.is_multiple_of(alignment) {
            return fail(
                "its offset is misaligned",
                format!("a multiple of {alignment}"),
                view.offset.to_string(),
            );
        }
        let room = view.buffer.size().saturating_sub(view.offset);
        let room = view.size.map_or(room, |size| size.get().min(room));
        // Bindings are whole words; empty ones are not allowed.
        let needed = (elements * u64::from(bytes)).next_multiple_of(4).max(4);
        if needed > room {
            return fail("it is too small", format!("{needed} bytes"), format!("{room} bytes"));
        }
        if needed > self.binding_size {
            let found = format!("{needed} bytes");
            return fail(
                "it exceeds one storage binding",
                format!("at most {} bytes", self.binding_size),
                found,
            );
        }
        let size = std::num::NonZeroU64::new(needed);
        Ok(wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: view.buffer,
            offset: view.offset,
            size,
        }))
    }
}

/// That what goes together with something else is given exactly where that is.
pub(super) fn check_together(
    name: &'static str,
    problem: &'static str,
    [needed, found]: [bool; 2],
) -> Result<(), Error> {
    let words = |given| if given { "a binding" } else { "none" }.to_owned();
    match needed == found {
        true => Ok(()),
        false => Err(Error::Buffer { name, problem, needed: words(needed), found: words(found) }),
    }
}

/// That no buffer has both roles in one dispatch, which wgpu forbids whatever the ranges.
pub(crate) fn check_apart(
    these: &[(&'static str, &wgpu::Buffer)],
    others: &[(&'static str, &wgpu::Buffer)],
) -> Result<(), Error> {
    let shared = |(name, this): &(&'static str, &wgpu::Buffer)| {
        others.iter().find(|(_, other)| other == this).map(|(other, _)| (*name, *other))
    };
    match these.iter().find_map(shared) {
        None => Ok(()),
        Some((name, other)) => Err(Error::Buffer {
            name,
            problem: "one buffer cannot be read and written in one dispatch",
            needed: "a buffer of its own".to_owned(),
            found: format!("the buffer of {other}"),
        }),
    }
}

/// That what is read and what is written do not overlap, where they may share a buffer.
pub(super) fn check_ranges<const N: usize, const M: usize>(
    these: [(&'static str, &wgpu::BindingResource<'_>); N],
    others: [(&'static str, &wgpu::BindingResource<'_>); M],
) -> Result<(), Error> {
    let range = |resource: &wgpu::BindingResource<'_>| match resource {
        wgpu::BindingResource::Buffer(view) => {
            let size = view.size.map_or(view.buffer.size().saturating_sub(view.offset), |size| size.get());
            Some((view.buffer.clone(), view.offset..view.offset + size))
        }
        _ => None,
    };
    for (name, this) in these {
        for (other_name, other) in others {
            let (Some((this, these)), Some((other, others))) = (range(this), range(other)) else { continue };
            if this == other && these.start < others.end && others.start < these.end {
                return Err(Error::Buffer {
                    name,
                    problem: "it overlaps what is written",
                    needed: format!("bytes apart from those of {other_name}, {others:?}"),
                    found: format!("{these:?}"),
                });
            }
        }
    }
    Ok(())
}

/// That the device has what every WebGPU device has, and what this plan needs beyond.
pub(super) fn check_limits(device: &wgpu::Device, caps: &Caps, plan: &Plan) -> Result<(), Error> {
    let minimal = Caps::minimal();
    let limits = device.limits();
    let storage = |variant: &&Variant| {
        variant.bindings().iter().filter(|(_, access)| *access != Access::Uniform).count() as u64
    };
    let buffers = plan.variants().iter().map(storage).max().unwrap_or(0);
    let table = u64::from(TableLayout::of(plan.spec()).words) * 4;
    let needs = [
        ("max_compute_workgroup_storage_size", caps.workgroup_memory.into(), minimal.workgroup_memory.into()),
        ("max_compute_invocations_per_workgroup", caps.invocations.into(), 128),
        ("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage.into(), buffers),
        ("max_uniform_buffer_binding_size", limits.max_uniform_buffer_binding_size, table),
    ];
    match needs.into_iter().find(|(_, found, needed)| found < needed) {
        None => Ok(()),
        Some((limit, found, needed)) => Err(Error::Limit {
            what: "this spec with these options".to_owned(),
            limit,
            needed,
            found,
            hint: "create the device with gqa::device_descriptor, or with wgpu::Limits::default()",
        }),
    }
}
