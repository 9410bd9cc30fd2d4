//! A dense mask of the caller's, brought into the step's own form.

use std::sync::atomic::Ordering;

use super::Attention;
use crate::error::Error;
use crate::pipeline::{Pipeline, bind};
use crate::spec::Mask;
use crate::step::Step;
use crate::upload::Launch;

impl Attention {
    /// Records packing a dense mask for all layers of the step, and finding out which tiles of it need not be read: once before
    /// the first [`Self::record`], or again where the next layer has another mask. [`Batch::mask`](crate::Batch::mask) says where
    /// its elements lie: bytes for [`Mask::Keep`], numbers of the spec's `q_dtype` for [`Mask::Add`].
    ///
    /// ```
    /// # use gqa::{Attention, AttentionSpec, Batch, CacheShape, KvCache, Mask, MaskLayout, Options, Sequence};
    /// # let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    /// # let size = 2 * 50 * 50;
    /// # let usage = wgpu::BufferUsages::STORAGE;
    /// # let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
    /// # let mask = device.create_buffer(&descriptor);
    /// let spec = AttentionSpec::builder(8, 2, 64).mask(Mask::Keep).causal(false).build()?;
    /// let attention = Attention::new(&device, spec.clone(), Options::default())?;
    /// let mut cache = KvCache::new(&device, &spec, CacheShape { layers: 1, sequences: 2, capacity: 50 })?;
    /// let (a, b) = (cache.open()?, cache.open()?);
    /// let mut encoder = device.create_command_encoder(&Default::default());
    /// cache.extend(&mut encoder, &[(a, 50), (b, 50)])?;
    /// // One mask of 50 x 50 bytes for each sequence, the same for all heads.
    /// let sequences = [Sequence::new(a, 50), Sequence::new(b, 50)];
    /// let batch = Batch::new(&spec, &sequences).with_mask(MaskLayout::dense([2, 1, 50, 50]));
    /// let step = attention.prepare(&queue, &cache, &batch)?;
    /// attention.mask(&mut encoder, &step, mask.as_entire_buffer_binding())?;
    /// # Ok::<(), gqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Field`] when the spec has no dense mask or the step is another attention's, [`Error::Buffer`], [`Error::Shader`].
    pub fn mask(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        step: &Step,
        mask: wgpu::BufferBinding<'_>,
    ) -> Result<(), Error> {
        self.check_step(step)?;
        let (Some((pack, classify)), Some(elements)) = (&self.mask, step.needs.mask) else {
            return Err(Error::field("mask", "given", "the spec's mask is neither Keep nor Add"));
        };
        let bytes = match self.plan.spec().mask() {
            Mask::Keep => 1,
            _ => self.plan.spec().q_dtype().bytes(),
        };
        let view = self.caps.view("mask", &mask, elements, bytes)?;
        let (pack, classify) = (pack.get()?, classify.get()?);
        step.masked.store(true, Ordering::Relaxed);
        let words = step.buffers.words.as_entire_binding();
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("gqa.mask"),
            timestamp_writes: None,
        });
        let mut dispatch = |pipeline: &Pipeline, launch: &Launch| {
            if let Some([x, y, z]) = launch.get() {
                let resources = [(0, step.list(launch)), (1, view.clone()), (7, words.clone())];
                pass.set_pipeline(&pipeline.pipeline);
                pass.set_bind_group(0, &bind(&self.device, pipeline, &resources), &[]);
                pass.dispatch_workgroups(x, y, z);
            }
        };
        dispatch(pack, &step.pack);
        for launch in step.attends() {
            dispatch(classify, launch);
        }
        Ok(())
    }
}
