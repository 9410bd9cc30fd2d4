//! Attention on the caller's device: compiled once, prepared once per forward call, recorded once per layer.

use crate::batch::Batch;
use crate::cache::{Entry, KvCache, Layer};
use crate::caps::Caps;
use crate::device::create_buffer;
use crate::error::Error;
use crate::pipeline::{Pipeline, bind};
use crate::plan::{Options, Plan};
use crate::spec::{AttentionSpec, Dtype};
use crate::step::{Step, Upload, unique_id};

/// Compiled attention for one [`AttentionSpec`] on one device.
///
/// It never submits, polls, blocks or maps: commands go into the caller's encoder, results stay in the caller's buffers.
#[derive(Debug)]
pub struct Attention {
    id: u64,
    device: wgpu::Device,
    caps: Caps,
    plan: Plan,
    prefill: Pipeline,
    decode: Pipeline,
    combine: Pipeline,
    append: Pipeline,
    /// Bound where a step has no states, and where no LSE is wanted: the layout has the bindings in any case.
    no_states: wgpu::Buffer,
    no_lse: wgpu::Buffer,
    fetches: Option<wgpu::Buffer>,
}

/// Tensors of one layer. Bindings may have any offset that obeys `min_storage_buffer_offset_alignment`; the layouts of the
/// [`Batch`] say where the elements lie behind it. `q` must not share a buffer with `out` or `lse`.
#[derive(Debug, Clone)]
pub struct Io<'a> {
    /// Queries.
    pub q: wgpu::BufferBinding<'a>,
    /// Outputs.
    pub out: wgpu::BufferBinding<'a>,
    /// Log-sum-exp; needed exactly when the batch has a layout for it.
    pub lse: Option<wgpu::BufferBinding<'a>>,
}

/// New keys and values of one layer, in the spec's `q_dtype`; the layouts of the [`Batch`] say where the elements lie.
#[derive(Debug, Clone)]
pub struct NewKv<'a> {
    /// New keys.
    pub k: wgpu::BufferBinding<'a>,
    /// New values.
    pub v: wgpu::BufferBinding<'a>,
}

/// Tensors of one layer, bound: [`Attention::bind`] once, [`Attention::dispatch`] as often as the step is used.
#[derive(Debug, Clone)]
pub struct Bindings {
    stamp: u64,
    prefill: Option<wgpu::BindGroup>,
    decode: Option<wgpu::BindGroup>,
    combine: Option<wgpu::BindGroup>,
}

impl Attention {
    /// Plans `spec` for `device` and compiles its kernels. Slow: once per spec.
    ///
    /// # Errors
    /// [`Error::Field`] when `options` ask for what the device cannot do, [`Error::Limit`] when the device is below
    /// WebGPU's minimum, [`Error::Shader`] when it refuses a kernel.
    pub fn new(device: &wgpu::Device, spec: AttentionSpec, options: Options) -> Result<Self, Error> {
        let caps = Caps::of(device);
        check_minimum(device, &caps)?;
        let plan = Plan::new(&spec, &caps, &options)?;
        log::debug!("{plan}");
        let decode = Pipeline::new(device, plan.decode(), options.checked)?;
        let prefill = match plan.prefill() == plan.decode() {
            true => decode.clone(),
            false => Pipeline::new(device, plan.prefill(), options.checked)?,
        };
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer = |label| create_buffer(device, label, 16, usage);
        Ok(Self {
            id: unique_id(),
            device: device.clone(),
            prefill,
            decode,
            combine: Pipeline::new(device, plan.combine(), options.checked)?,
            append: Pipeline::new(device, plan.append(), options.checked)?,
            no_states: buffer("gqa.no_states")?,
            no_lse: buffer("gqa.no_lse")?,
            fetches: options.count_fetches.then(|| buffer("gqa.fetches")).transpose()?,
            caps,
            plan,
        })
    }

    /// Which kernels, tiles and chunks, and why.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// With [`Options::count_fetches`]: a u32, incremented for every four K or V elements that a kernel reads. The caller
    /// clears and reads it.
    pub fn fetch_counter(&self) -> Option<&wgpu::Buffer> {
        self.fetches.as_ref()
    }

    /// Turns a batch into work for all layers: once per forward call, after [`KvCache::extend`].
    ///
    /// # Errors
    /// [`Error::CacheMismatch`], [`Error::StaleSequence`], [`Error::RepeatedSequence`], [`Error::Field`] for a length,
    /// position or layout that cannot be, [`Error::Limit`] for a batch beyond the device's limits, [`Error::OutOfMemory`].
    pub fn prepare(&self, queue: &wgpu::Queue, cache: &KvCache, batch: &Batch<'_>) -> Result<Step, Error> {
        let spec = self.plan.spec();
        let (needed, found) = (Entry::of(spec), cache.entry());
        if needed != found {
            return Err(Error::CacheMismatch { needed: needed.to_string(), found: found.to_string() });
        }
        let resolved = batch.resolve(spec, cache.table())?;
        let upload = Upload { device: &self.device, queue, caps: &self.caps };
        Step::new(&upload, (self.id, &self.plan), cache.shared_layers(), (batch, &resolved))
    }

    /// Records writing the step's new keys and values into `layer` of the cache, converted to its storage type.
    ///
    /// # Errors
    /// [`Error::NoSuchLayer`], [`Error::Buffer`].
    pub fn append(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        step: &Step,
        layer: u32,
        new: NewKv<'_>,
    ) -> Result<(), Error> {
        let Layer { k, v } = self.layer(step, layer)?;
        let Some((work, [x, y, z])) = step.append.get() else { return Ok(()) };
        let dtype = self.plan.spec().q_dtype();
        let new_k = self.view("new_k", &new.k, step.needs.new_k, dtype)?;
        let new_v = self.view("new_v", &new.v, step.needs.new_v, dtype)?;
        check_apart(
            &[("new_k", new.k.buffer), ("new_v", new.v.buffer)],
            &[("the cache", k), ("the cache", v)],
        )?;
        let resources =
            [work.as_entire_binding(), new_k, new_v, k.as_entire_binding(), v.as_entire_binding()];
        let group = bind(&self.device, &self.append, &resources);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("gqa.append"),
            timestamp_writes: None,
        });
        pass.set_pipeline(&self.append.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(x, y, z);
        Ok(())
    }

    /// Records attention of the step over `layer` of the cache, in a compute pass of its own.
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn record(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        step: &Step,
        layer: u32,
        io: Io<'_>,
    ) -> Result<(), Error> {
        let bindings = self.bind(step, layer, io)?;
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("gqa.attention"),
            timestamp_writes: None,
        });
        self.dispatch(&mut pass, step, &bindings)
    }

    /// Binds the tensors of one layer, to be dispatched any number of times.
    ///
    /// # Errors
    /// [`Error::NoSuchLayer`]; [`Error::Buffer`] for a view that is too small, misaligned or lacks a usage.
    pub fn bind(&self, step: &Step, layer: u32, io: Io<'_>) -> Result<Bindings, Error> {
        let Layer { k, v } = self.layer(step, layer)?;
        let mut bindings = Bindings { stamp: step.stamp, prefill: None, decode: None, combine: None };
        if step.needs.lse.is_some() != io.lse.is_some() {
            let [needed, found] = [step.needs.lse.is_some(), io.lse.is_some()]
                .map(|b| if b { "a binding" } else { "none" }.to_owned());
            let problem = "Io::lse and Batch::lse go together";
            return Err(Error::Buffer { name: "lse", problem, needed, found });
        }
        if step.prefill.get().is_none() && step.decode.get().is_none() {
            return Ok(bindings);
        }
        let dtype = self.plan.spec().q_dtype();
        let q = self.view("q", &io.q, step.needs.q, dtype)?;
        let out = self.view("out", &io.out, step.needs.out, dtype)?;
        let lse = match (&io.lse, step.needs.lse) {
            (Some(lse), Some(needed)) => self.view("lse", lse, needed, Dtype::F32)?,
            _ => self.no_lse.as_entire_binding(),
        };
        let mut written = vec![("out", io.out.buffer)];
        written.extend(io.lse.as_ref().map(|lse| ("lse", lse.buffer)));
        check_apart(&written, &[("q", io.q.buffer), ("the cache", k), ("the cache", v)])?;
        let states = step.states.as_ref().unwrap_or(&self.no_states).as_entire_binding();
        let attend = |pipeline: &Pipeline, launch: &crate::step::Launch| {
            launch.get().map(|(work, _)| {
                let mut resources = vec![work.as_entire_binding(), q.clone(), k.as_entire_binding()];
                resources.extend([v.as_entire_binding(), out.clone(), lse.clone(), states.clone()]);
                resources.extend(self.fetches.as_ref().map(|b| b.as_entire_binding()));
                bind(&self.device, pipeline, &resources)
            })
        };
        bindings.prefill = attend(&self.prefill, &step.prefill);
        bindings.decode = attend(&self.decode, &step.decode);
        bindings.combine = step.combine.get().map(|(work, _)| {
            let resources = [work.as_entire_binding(), out.clone(), lse.clone(), states.clone()];
            bind(&self.device, &self.combine, &resources)
        });
        Ok(bindings)
    }

    /// Records bound attention into a compute pass of the caller's, replacing its pipeline and its bind group 0.
    ///
    /// # Errors
    /// [`Error::Field`] when `bindings` were made for another step, or the step by another attention.
    pub fn dispatch(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        step: &Step,
        bindings: &Bindings,
    ) -> Result<(), Error> {
        self.check_step(step)?;
        if bindings.stamp != step.stamp {
            return Err(Error::field(
                "bindings",
                "made for another step",
                "call Attention::bind with this step",
            ));
        }
        let launches = [
            (&self.prefill, &bindings.prefill, &step.prefill),
            (&self.decode, &bindings.decode, &step.decode),
            (&self.combine, &bindings.combine, &step.combine),
        ];
        for (pipeline, group, launch) in launches {
            if let (Some(group), Some((_, [x, y, z]))) = (group, launch.get()) {
                pass.set_pipeline(&pipeline.pipeline);
                pass.set_bind_group(0, group, &[]);
                pass.dispatch_workgroups(x, y, z);
            }
        }
        Ok(())
    }

    /// That the work lists of `step` are for these kernels.
    fn check_step(&self, step: &Step) -> Result<(), Error> {
        match step.attention == self.id {
            true => Ok(()),
            false => Err(Error::field(
                "step",
                "prepared by another attention",
                "use the attention that prepared it",
            )),
        }
    }

    fn layer<'a>(&self, step: &'a Step, layer: u32) -> Result<&'a Layer, Error> {
        self.check_step(step)?;
        let layers = step.layers.len() as u32;
        step.layers.get(layer as usize).ok_or(Error::NoSuchLayer { layer, layers })
    }

    /// A caller's view, checked and cut to the elements that the step reaches.
    fn view<'a>(
        &self,
        name: &'static str,
        view: &wgpu::BufferBinding<'a>,
        elements: u64,
        dtype: Dtype,
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
        let alignment = u64::from(self.caps.offset_alignment);
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
        let needed = (elements * u64::from(dtype.bytes())).next_multiple_of(4).max(4);
        if needed > room {
            return fail("it is too small", format!("{needed} bytes"), format!("{room} bytes"));
        }
        if needed > self.caps.binding_size {
            let found = format!("{needed} bytes");
            return fail(
                "it exceeds one storage binding",
                format!("at most {} bytes", self.caps.binding_size),
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

/// That no buffer has both roles in one dispatch, which wgpu forbids whatever the ranges.
fn check_apart(
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

/// That the device has what every WebGPU device has: kernels count on it.
fn check_minimum(device: &wgpu::Device, caps: &Caps) -> Result<(), Error> {
    let minimal = Caps::minimal();
    let limits = [
        ("max_compute_workgroup_storage_size", caps.workgroup_memory, minimal.workgroup_memory),
        ("max_compute_invocations_per_workgroup", caps.invocations, 128),
        ("max_storage_buffers_per_shader_stage", device.limits().max_storage_buffers_per_shader_stage, 8),
    ];
    for (limit, found, needed) in limits {
        if found < needed {
            return Err(Error::Limit {
                what: "every kernel".to_owned(),
                limit,
                needed: u64::from(needed),
                found: u64::from(found),
                hint: "create the device with gqa::device_descriptor, or with wgpu::Limits::default()",
            });
        }
    }
    Ok(())
}
