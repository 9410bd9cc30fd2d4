//! Attention on the caller's device: compiled once, prepared once per forward call, recorded once per layer.

mod backward;
mod io;
mod mask;
mod prepare;
mod resident;

use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use crate::cache::{Layer, Shard};
use crate::caps::Caps;
use crate::device::{create_buffer, create_filled};
use crate::error::Error;
use crate::pipeline::{Build, Lazy, bind};
use crate::plan::{Options, Plan};
use crate::shader::Variant;
use crate::spec::AttentionSpec;
use crate::step::{Step, unique_id};
use crate::upload::Launch;
use crate::weights::LayerWeights;

use backward::BackwardPipelines;
pub use backward::{BackwardIo, BackwardStep};
use io::ShardBindings;
pub(crate) use io::check_apart;
pub use io::{Bindings, Io, NewKv};

/// Layers that can have weights: their number is the length of a list.
const MAX_LAYERS: u32 = 1 << 16;

/// Attention for one [`AttentionSpec`] on one device. A kernel is compiled where it is first recorded, or by [`Self::warm_up`].
///
/// It never submits and never waits for the GPU: commands go into the caller's encoder, results stay in the caller's buffers. Compiling a
/// kernel for the first time takes the calling thread's time.
#[derive(Debug)]
pub struct Attention {
    id: u64,
    device: wgpu::Device,
    caps: Caps,
    plan: Plan,
    build: Build,
    prefill: Lazy,
    decode: Lazy,
    combine: Lazy,
    append: Lazy,
    /// With a rotated cache.
    embed: Option<Lazy>,
    /// For loops on the GPU.
    scheduler: Lazy,
    /// For gradients, from the first step on that asks for them.
    backward: OnceLock<BackwardPipelines>,
    pooled: bool,
    /// With a dense mask: `pack` and `classify`.
    mask: Option<(Lazy, Lazy)>,
    /// Tables of the layers; where no layer has weights of its own, the first is for all.
    tables: Vec<Option<wgpu::Buffer>>,
    /// Bound where a step has no states, and where no LSE is wanted: the layout has the bindings in any case.
    no_states: wgpu::Buffer,
    no_lse: wgpu::Buffer,
    fetches: Option<wgpu::Buffer>,
}

impl Attention {
    /// Plans `spec` for `device`: once per spec.
    ///
    /// # Errors
    /// [`Error::Field`] when `options` ask for what the device cannot do, [`Error::Limit`] when the device is below
    /// WebGPU's minimum, [`Error::OutOfMemory`].
    pub fn new(device: &wgpu::Device, spec: AttentionSpec, options: Options) -> Result<Self, Error> {
        Self::with_cache(device, spec, options, None)
    }

    /// The same, compiling through a cache of the device's ([`wgpu::Features::PIPELINE_CACHE`]): what that holds from an earlier run is not
    /// compiled again.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_cache(
        device: &wgpu::Device,
        spec: AttentionSpec,
        options: Options,
        cache: Option<wgpu::PipelineCache>,
    ) -> Result<Self, Error> {
        let caps = Caps::of(device);
        let plan = Plan::new(&spec, &caps, &options)?;
        io::check_limits(device, &caps, &plan)?;
        log::debug!("{plan}");
        let build = Build { device: device.clone(), checked: options.checked, cache };
        let kernel = |variant: &Variant| Lazy::new(&build, variant.clone());
        let decode = kernel(plan.decode());
        let prefill = if plan.prefill() == plan.decode() { decode.clone() } else { kernel(plan.prefill()) };
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer = |label| create_buffer(device, label, 16, usage);
        Ok(Self {
            id: unique_id(),
            device: device.clone(),
            prefill,
            decode,
            combine: kernel(plan.combine()),
            append: kernel(plan.append()),
            embed: plan.embed().map(kernel),
            scheduler: kernel(&plan.schedule()),
            backward: OnceLock::new(),
            pooled: options.pooled,
            mask: plan.mask().map(|(pack, classify)| (kernel(pack), kernel(classify))),
            tables: match spec.has_weights() {
                true => Vec::new(),
                false => vec![table(device, &LayerWeights::default().table(&spec))?],
            },
            no_states: buffer("gqa.no_states")?,
            no_lse: buffer("gqa.no_lse")?,
            fetches: options.count_fetches.then(|| buffer("gqa.fetches")).transpose()?,
            caps,
            plan,
            build,
        })
    }

    /// Compiles now what [`Self::append`], [`Self::mask`] and [`Self::record`] would compile with the first step that wants it: seconds, with
    /// some drivers. Gradients have kernels of their own ([`Self::warm_up_backward`]), and so have loops on the GPU: theirs comes with the first one.
    ///
    /// ```
    /// # use gqa::{Attention, AttentionSpec, Options};
    /// # let (device, _queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    /// let attention = Attention::new(&device, AttentionSpec::builder(32, 8, 128).build()?, Options::default())?;
    /// attention.warm_up()?;
    /// # Ok::<(), gqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shader`] when the device refuses a kernel.
    pub fn warm_up(&self) -> Result<(), Error> {
        let mut kernels = vec![&self.append, &self.decode, &self.prefill, &self.combine];
        kernels.extend(&self.embed);
        kernels.extend(self.mask.iter().flat_map(|(pack, classify)| [pack, classify]));
        kernels.into_iter().try_for_each(|kernel| kernel.get().map(drop))
    }

    /// Sets what `layer` has learned, where the spec [has weights](AttentionSpec::has_weights): once, before the layer is recorded.
    ///
    /// ```
    /// # use gqa::{Attention, AttentionSpec, LayerWeights, Options, Rope};
    /// # let (device, _queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    /// // As in gpt-oss: a sink for each of 64 query heads, every second layer with a window.
    /// let spec = AttentionSpec::builder(64, 8, 64).sinks(true).window(127, None).rope(Rope::new(64)).build()?;
    /// let mut attention = Attention::new(&device, spec, Options::default())?;
    /// attention.set_weights(0, &LayerWeights { sinks: &[0.5; 64], ..LayerWeights::default() })?;
    /// # Ok::<(), gqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Field`] for a wrong length or number, or a spec without weights; [`Error::OutOfMemory`].
    pub fn set_weights(&mut self, layer: u32, weights: &LayerWeights<'_>) -> Result<(), Error> {
        let spec = self.plan.spec();
        if !spec.has_weights() {
            return Err(Error::field("weights", "given", "this spec has neither sinks nor qk_norm"));
        }
        if layer >= MAX_LAYERS {
            return Err(Error::field("layer", layer, format!("it must be below {MAX_LAYERS}")));
        }
        weights.check(spec)?;
        let table = table(&self.device, &weights.table(spec))?;
        let layer = layer as usize;
        if self.tables.len() <= layer {
            self.tables.resize(layer + 1, None);
        }
        self.tables[layer] = table;
        Ok(())
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

    /// Records writing the step's new keys and values into `layer` of the cache, converted to its storage type.
    ///
    /// # Errors
    /// [`Error::NoSuchLayer`], [`Error::StaleStep`], [`Error::Buffer`]; [`Error::Field`] when the layer is of another kind or its weights are
    /// not set, or another attention prepared the step; [`Error::Shader`] when the device refuses the kernel.
    pub fn append(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        step: &Step,
        layer: u32,
        new: NewKv<'_>,
    ) -> Result<(), Error> {
        let shards = &self.layer(step, layer)?.shards;
        if step.shards.iter().all(|shard| shard.append.get().is_none()) {
            return Ok(());
        }
        let bytes = self.plan.spec().q_dtype().bytes();
        let new_k = self.caps.view("new_k", &new.k, step.needs.new_k, bytes)?;
        let new_v = self.caps.view("new_v", &new.v, step.needs.new_v, bytes)?;
        let table = self.table(layer)?;
        for Shard { k, v } in shards {
            check_apart(
                &[("new_k", new.k.buffer), ("new_v", new.v.buffer)],
                &[("the cache", k), ("the cache", v)],
            )?;
        }
        let append = self.append.get()?;
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("gqa.append"),
            timestamp_writes: None,
        });
        pass.set_pipeline(&append.pipeline);
        for (Shard { k, v }, launches) in shards.iter().zip(&step.shards) {
            let Some([x, y, z]) = launches.append.get() else { continue };
            let mut resources =
                vec![(0, step.list(&launches.append)), (1, new_k.clone()), (2, new_v.clone())];
            resources.extend([(3, k.as_entire_binding()), (4, v.as_entire_binding())]);
            resources.push((7, step.buffers.words.as_entire_binding()));
            resources.extend(table.clone());
            pass.set_bind_group(0, &bind(&self.device, append, &resources), &[]);
            pass.dispatch_workgroups(x, y, z);
        }
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
    /// [`Error::NoSuchLayer`], [`Error::StaleStep`]; [`Error::Buffer`] for a view that is too small, misaligned or lacks a usage;
    /// [`Error::Field`] when the layer is of another kind or its weights are not set, another attention prepared the step, or [`Self::mask`]
    /// has not been called for it; [`Error::Shader`] when the device refuses a kernel.
    pub fn bind(&self, step: &Step, layer: u32, io: Io<'_>) -> Result<Bindings, Error> {
        let shards = &self.layer(step, layer)?.shards;
        let mut bindings = Bindings { stamp: step.stamp, embed: None, shards: Vec::new(), combine: None };
        let given = [step.needs.lse.is_some(), io.lse.is_some()];
        io::check_together("lse", "Io::lse and Batch::lse go together", given)?;
        // A step that holds nothing now may hold something later, in the same memory: then these bindings are still good.
        if step.is_void() {
            return Ok(bindings);
        }
        self.check_masked(step)?;
        let bytes = self.plan.spec().q_dtype().bytes();
        let q = self.caps.view("q", &io.q, step.needs.q, bytes)?;
        let out = self.caps.view("out", &io.out, step.needs.out, bytes)?;
        let lse = match (&io.lse, step.needs.lse) {
            (Some(lse), Some(needed)) => self.caps.view("lse", lse, needed, 4)?,
            _ => self.no_lse.as_entire_binding(),
        };
        let mut written = vec![("out", io.out.buffer)];
        written.extend(io.lse.as_ref().map(|lse| ("lse", lse.buffer)));
        match self.pooled {
            true => io::check_ranges([("q", &q)], [("out", &out), ("lse", &lse)])?,
            false => check_apart(&written, &[("q", io.q.buffer)])?,
        }
        for Shard { k, v } in shards {
            check_apart(&written, &[("the cache", k), ("the cache", v)])?;
        }
        let buffers = &step.buffers;
        let states = buffers.states.as_ref().unwrap_or(&self.no_states).as_entire_binding();
        let mut resources = vec![(4, out), (5, lse), (6, states), (7, buffers.words.as_entire_binding())];
        resources.extend(self.table(layer)?);
        resources.extend(self.fetches.as_ref().map(|b| (9, b.as_entire_binding())));
        let group = |kernel: &Lazy, launch: &Launch, more: &[(u32, wgpu::BindingResource<'_>)]| {
            if launch.region.size == 0 {
                return Ok(None);
            }
            let mut resources = resources.clone();
            resources.push((0, step.list(launch)));
            resources.extend_from_slice(more);
            Ok::<_, Error>(Some(bind(&self.device, kernel.get()?, &resources)))
        };
        let attended = match (&self.embed, &buffers.queries) {
            (Some(embed), Some(queries)) => {
                let rotated = queries.as_entire_binding();
                bindings.embed = group(embed, &step.embed, &[(1, q), (3, rotated.clone())])?;
                rotated
            }
            _ => q,
        };
        for (Shard { k, v }, launches) in shards.iter().zip(&step.shards) {
            let kv = [(1, attended.clone()), (2, k.as_entire_binding()), (3, v.as_entire_binding())];
            bindings.shards.push(ShardBindings {
                prefill: group(&self.prefill, &launches.prefill, &kv)?,
                decode: group(&self.decode, &launches.decode, &kv)?,
            });
        }
        bindings.combine = group(&self.combine, &step.combine, &[])?;
        Ok(bindings)
    }

    /// Records bound attention into a compute pass of the caller's, replacing its pipeline and its bind group 0.
    ///
    /// # Errors
    /// [`Error::StaleBindings`], [`Error::StaleStep`]; [`Error::Field`] when another attention prepared the step, or [`Self::mask`] has not
    /// been called for it since it was updated.
    pub fn dispatch(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        step: &Step,
        bindings: &Bindings,
    ) -> Result<(), Error> {
        self.check_step(step)?;
        step.host.resolved.changes.check()?;
        if !bindings.fit(step) {
            return Err(Error::StaleBindings);
        }
        self.check_masked(step)?;
        let mut dispatch = |kernel: &Lazy, group: &Option<wgpu::BindGroup>, launch: &Launch| {
            let (Some(group), Some([x, y, z])) = (group, launch.get()) else { return Ok(()) };
            pass.set_pipeline(&kernel.get()?.pipeline);
            pass.set_bind_group(0, group, &[]);
            match (&step.resident, launch.arguments) {
                (Some(resident), Some(offset)) => {
                    pass.dispatch_workgroups_indirect(&resident.arguments, offset);
                }
                _ => pass.dispatch_workgroups(x, y, z),
            }
            Ok::<_, Error>(())
        };
        if let Some(embed) = &self.embed {
            dispatch(embed, &bindings.embed, &step.embed)?;
        }
        for (groups, launches) in bindings.shards.iter().zip(&step.shards) {
            dispatch(&self.prefill, &groups.prefill, &launches.prefill)?;
            dispatch(&self.decode, &groups.decode, &launches.decode)?;
        }
        dispatch(&self.combine, &bindings.combine, &step.combine)
    }

    /// That a dense mask has been packed where one is to be read.
    fn check_masked(&self, step: &Step) -> Result<(), Error> {
        let masked = step.masked.load(Ordering::Relaxed) || step.attends().next().is_none();
        match step.needs.mask.is_some() && !masked {
            true => Err(Error::field("mask", "not given", "call Attention::mask for this step first")),
            false => Ok(()),
        }
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

    /// The table of a layer, where the spec has one.
    fn table(&self, layer: u32) -> Result<Option<(u32, wgpu::BindingResource<'_>)>, Error> {
        let index = if self.plan.spec().has_weights() { layer as usize } else { 0 };
        match self.tables.get(index) {
            Some(table) if table.is_some() || !self.plan.spec().has_weights() => {
                Ok(table.as_ref().map(|table| (8, table.as_entire_binding())))
            }
            _ => {
                let found = format!("not set for layer {layer}");
                Err(Error::field(
                    "weights",
                    found,
                    "call Attention::set_weights for every layer of this attention",
                ))
            }
        }
    }

    fn layer<'a>(&self, step: &'a Step, layer: u32) -> Result<&'a Layer, Error> {
        self.check_step(step)?;
        step.host.resolved.changes.check()?;
        let layers = step.layers.len() as u32;
        let found = step.layers.get(layer as usize).ok_or(Error::NoSuchLayer { layer, layers })?;
        match found.kind == step.kind {
            true => Ok(found),
            false => {
                let needed = "the step was prepared for layers of another kind: use the attention of this layer's spec";
                Err(Error::field("layer", layer, needed))
            }
        }
    }
}

/// A table in a buffer, where there is one.
fn table(device: &wgpu::Device, words: &[u32]) -> Result<Option<wgpu::Buffer>, Error> {
    if words.is_empty() {
        return Ok(None);
    }
    let bytes: &[u8] = bytemuck::cast_slice(words);
    let buffer = create_filled(device, "gqa.table", wgpu::BufferUsages::UNIFORM, bytes)?;
    Ok(Some(buffer))
}
