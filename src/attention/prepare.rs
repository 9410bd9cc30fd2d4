//! From a batch to a step: once per forward call.

use std::sync::Arc;

use super::Attention;
use crate::batch::{Batch, Pool};
use crate::cache::{Kind, KvCache, Layer};
use crate::error::Error;
use crate::step::{Host, Maker, Step};

impl Attention {
    /// Turns a batch into work for all layers: once per forward call, after [`KvCache::extend`].
    ///
    /// # Errors
    /// [`Error::CacheMismatch`], [`Error::StaleSequence`], [`Error::RepeatedSequence`], [`Error::Field`] for a length,
    /// position or layout that cannot be, [`Error::Limit`] for a batch beyond the device's limits, [`Error::OutOfMemory`].
    pub fn prepare(&self, queue: &wgpu::Queue, cache: &KvCache, batch: &Batch<'_>) -> Result<Step, Error> {
        let mut host = Host::default();
        let kind = self.resolve((cache, false), batch, &mut host)?;
        let layers = cache.shared_layers();
        Step::new(self.maker(queue, &layers, (kind.0, &kind.1)), batch, host)
    }

    /// Prepares another batch in the memory of a step, allocating only where it has never been as large: for servers, whose batches come one
    /// after the other. (On the host two memories take turns, so what is larger than ever allocates twice.) Submit what was recorded with the
    /// step before.
    ///
    /// Bindings stay good as long as they can ([`Bindings::fit`](crate::Bindings::fit)); then [`Self::dispatch`] refuses them. Tensors must reach as far as the largest batch
    /// that the step has held in the same memory. After an error the step is as before.
    ///
    /// # Errors
    /// As [`Self::prepare`]; [`Error::Field`] when another attention prepared the step.
    pub fn update(
        &self,
        queue: &wgpu::Queue,
        cache: &KvCache,
        batch: &Batch<'_>,
        step: &mut Step,
    ) -> Result<(), Error> {
        self.check_step(step)?;
        if step.resident.is_some() {
            return Err(Error::field("step", "of a loop on the GPU", "call Attention::prepare_loop anew"));
        }
        step.renew(|step| {
            let kind = self.resolve((cache, false), batch, &mut step.host)?;
            let layers = cache.shared_layers();
            step.lay_out(self.maker(queue, &layers, (kind.0, &kind.1)), batch)
        })
    }

    /// Looks a batch up in the cache, for the kind of layers that the spec is for. Sequences are as long as they are, or `reserved`: as
    /// they can become.
    pub(super) fn resolve(
        &self,
        (cache, reserved): (&KvCache, bool),
        batch: &Batch<'_>,
        host: &mut Host,
    ) -> Result<(u32, Kind), Error> {
        if *cache.device() != self.device {
            return Err(Error::field(
                "cache",
                "of another device",
                "create it on the device of the attention",
            ));
        }
        let (index, kind) = cache.kind_of(self.plan.spec())?;
        batch.resolve(&self.plan, Pool { table: cache.table(), index, reserved }, &mut host.resolved)?;
        Ok((index as u32, kind))
    }

    pub(super) fn maker<'a>(
        &'a self,
        queue: &'a wgpu::Queue,
        layers: &'a Arc<[Layer]>,
        kind: (u32, &'a Kind),
    ) -> Maker<'a> {
        let Self { device, caps, plan, id, .. } = self;
        Maker { device, queue, caps, plan, attention: *id, layers, kind }
    }
}
