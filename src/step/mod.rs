//! One forward call, prepared: work lists in GPU buffers, used by every layer.

mod lists;
mod memory;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::batch::{Batch, Resolved};
use crate::cache::Layer;
use crate::error::Error;
use crate::params::{AppendItem, Params};
use crate::pipeline::Pipeline;
use crate::plan::{Plan, Traffic, WorkLists};
use crate::upload::{Image, Launch};

use lists::Launches;
pub(crate) use memory::{Buffers, Maker};

/// A prepared forward call. Made by [`Attention::prepare`](crate::Attention::prepare), recorded once per layer, made anew by
/// [`Attention::update`](crate::Attention::update).
///
/// It keeps the places that its sequences had in the cache: record it, and submit what was recorded, before they are truncated, evicted,
/// closed or moved, and before they grow again where layers have a window (which lets go of a page now and then) or forks share their last
/// page. After that recording is refused ([`Error::StaleStep`]) until the step is updated.
#[derive(Debug)]
pub struct Step {
    /// The attention that prepared it: work lists mean something to its kernels only.
    pub(crate) attention: u64,
    /// Tells bindings of this step from those of others.
    pub(crate) stamp: u64,
    /// Tells this batch from those that the step has held before.
    pub(crate) batch: u64,
    pub(crate) shards: Vec<ShardLaunches>,
    pub(crate) combine: Launch,
    pub(crate) embed: Launch,
    pub(crate) pack: Launch,
    pub(crate) buffers: Buffers,
    /// Whether a dense mask has been recorded.
    pub(crate) masked: AtomicBool,
    pub(crate) layers: Arc<[Layer]>,
    /// The kind of layers that it is for.
    pub(crate) kind: u32,
    /// Elements that each tensor must hold: those of the largest batch that the buffers have held.
    pub(crate) needs: Needs,
    pub(crate) host: Host,
    /// Where lengths live on the GPU.
    pub(crate) resident: Option<Resident>,
    traffic: Traffic,
}

/// What reads or writes one shard of the cache.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct ShardLaunches {
    pub(crate) prefill: Launch,
    pub(crate) decode: Launch,
    pub(crate) append: Launch,
    /// Pages of the shard.
    pub(crate) pages: u32,
}

/// What makes the work of a step on the GPU.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) pipeline: Pipeline,
    /// What stays the same from step to step.
    pub(crate) input: wgpu::Buffer,
    /// Of the dispatches that attend, and of the one that merges.
    pub(crate) arguments: wgpu::Buffer,
    pub(crate) sequences: u32,
}

/// A step's memory on the host, kept to be filled again.
#[derive(Debug, Default)]
pub(crate) struct Host {
    pub(crate) resolved: Resolved,
    /// The batch before, whose memory the next one takes.
    before: Resolved,
    /// Where the tensors of the batch lie: queries, outputs and LSE.
    pub(crate) params: Params,
    /// New keys and values.
    pub(crate) new: Params,
    pub(crate) lists: WorkLists,
    pub(super) image: Image,
    pub(crate) embed: Vec<AppendItem>,
    shards: Vec<ShardLaunches>,
}

/// Elements that each tensor must hold.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Needs {
    pub(crate) q: u64,
    pub(crate) out: u64,
    pub(crate) lse: Option<u64>,
    pub(crate) new_k: u64,
    pub(crate) new_v: u64,
    /// Where the spec has a dense mask.
    pub(crate) mask: Option<u64>,
}

impl Needs {
    fn max(self, other: Self) -> Self {
        Self {
            q: self.q.max(other.q),
            out: self.out.max(other.out),
            lse: self.lse.max(other.lse),
            new_k: self.new_k.max(other.new_k),
            new_v: self.new_v.max(other.new_v),
            mask: self.mask.max(other.mask),
        }
    }
}

impl Step {
    /// What the step moves and computes at least, in one layer.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Workgroups of prefill, decode, combine and append, in one layer.
    pub fn workgroups(&self) -> [u64; 4] {
        let count = |launch: &Launch| launch.grid.iter().map(|n| u64::from(*n)).product::<u64>();
        let over = |of: fn(&ShardLaunches) -> &Launch| self.shards.iter().map(|s| count(of(s))).sum();
        [over(|s| &s.prefill), over(|s| &s.decode), count(&self.combine), over(|s| &s.append)]
    }

    /// A work list, to be bound.
    pub(crate) fn list(&self, launch: &Launch) -> wgpu::BindingResource<'_> {
        launch.list(&self.buffers.work)
    }

    /// Whether its memory has no room for any work of attention.
    pub(crate) fn is_void(&self) -> bool {
        let launches = self.shards.iter().flat_map(|shard| [&shard.prefill, &shard.decode]);
        launches.chain([&self.combine, &self.embed]).all(|launch| launch.region.size == 0)
    }

    /// Launches of kernels that read keys for queries, where there is work.
    pub(crate) fn attends(&self) -> impl Iterator<Item = &Launch> {
        let launches = self.shards.iter().flat_map(|shard| [&shard.prefill, &shard.decode]);
        launches.filter(|launch| launch.get().is_some())
    }

    /// Bytes of GPU memory that the step holds for itself.
    pub fn size(&self) -> u64 {
        let Buffers { work, words, states, queries } = &self.buffers;
        let optional = [states, queries].into_iter().flatten().map(wgpu::Buffer::size);
        work.size() + words.size() + optional.sum::<u64>()
    }

    /// Work lists of the batch that `host` has resolved.
    pub(crate) fn new(maker: Maker<'_>, batch: &Batch<'_>, mut host: Host) -> Result<Self, Error> {
        host.lists.fill(maker.plan, &mut host.resolved.input);
        Self::of_lists(maker, batch, host)
    }

    /// Of work lists that are filled, or that a kernel will fill.
    pub(crate) fn of_lists(maker: Maker<'_>, batch: &Batch<'_>, mut host: Host) -> Result<Self, Error> {
        let mut launches = Launches::default();
        launches.lay_out(maker, batch, &mut host)?;
        let needs = needs(maker.plan, batch, &host.resolved);
        let sizes = maker.sizes(&host);
        let buffers = Buffers::new(maker, &host.image, sizes)?;
        let mut step = Self {
            attention: maker.attention,
            stamp: unique_id(),
            batch: unique_id(),
            shards: Vec::new(),
            combine: Launch::default(),
            embed: Launch::default(),
            pack: Launch::default(),
            buffers,
            masked: AtomicBool::new(false),
            layers: Arc::clone(maker.layers),
            kind: maker.kind.0,
            needs,
            host,
            resident: None,
            traffic: Traffic::default(),
        };
        step.adopt(maker, launches);
        Ok(step)
    }

    /// Lets `make` prepare another batch. After an error the step knows the batch before, whose gradients may still be asked for.
    pub(crate) fn renew(&mut self, make: impl FnOnce(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        let Host { params, new, .. } = self.host;
        std::mem::swap(&mut self.host.resolved, &mut self.host.before);
        let made = make(self);
        if made.is_err() {
            (self.host.params, self.host.new) = (params, new);
            std::mem::swap(&mut self.host.resolved, &mut self.host.before);
        }
        made
    }

    /// The step of the batch that `self.host` has resolved: in the same memory where it fits.
    pub(crate) fn lay_out(&mut self, maker: Maker<'_>, batch: &Batch<'_>) -> Result<(), Error> {
        self.host.lists.fill(maker.plan, &mut self.host.resolved.input);
        let mut launches = Launches { shards: std::mem::take(&mut self.host.shards), ..Launches::default() };
        launches.lay_out(maker, batch, &mut self.host)?;
        let (sizes, needs) = (maker.sizes(&self.host), needs(maker.plan, batch, &self.host.resolved));
        let fits = self.layers.as_ptr() == maker.layers.as_ptr()
            && self.kind == maker.kind.0
            && needs.lse.is_some() == self.needs.lse.is_some()
            && needs.max(self.needs) == self.needs
            && !self.host.image.moved()
            && self.buffers.hold(&self.host.image, sizes);
        if !fits {
            self.buffers = Buffers::new(maker, &self.host.image, sizes)?;
            self.stamp = unique_id();
            self.layers = Arc::clone(maker.layers);
            self.kind = maker.kind.0;
            self.needs = needs;
        }
        self.adopt(maker, launches);
        Ok(())
    }

    /// Lets the GPU make the work of each step.
    pub(crate) fn make_resident(&mut self, resident: Resident, is_decode: bool) {
        for shard in &mut self.shards {
            let launch = if is_decode { &mut shard.decode } else { &mut shard.prefill };
            launch.arguments = Some(0);
        }
        self.combine.arguments = Some(12);
        self.resident = Some(resident);
    }

    /// Takes over what was laid out, and uploads it.
    fn adopt(&mut self, maker: Maker<'_>, launches: Launches) {
        let Launches { shards, combine, embed, pack } = launches;
        self.host.shards = std::mem::replace(&mut self.shards, shards);
        (self.combine, self.embed, self.pack) = (combine, embed, pack);
        self.masked = AtomicBool::new(false);
        self.batch = unique_id();
        let resolved = &self.host.resolved;
        self.traffic = Traffic::of(maker.plan.spec(), &resolved.input);
        self.host.image.write(maker.queue, &self.buffers.work);
        self.host.image.settle();
        let words: &[u8] = bytemuck::cast_slice(&resolved.input.words);
        if !words.is_empty() {
            maker.queue.write_buffer(&self.buffers.words, resolved.input.dense * 4, words);
        }
    }
}

/// A number that no other step, attention or cache of this process has.
pub(crate) fn unique_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn needs(plan: &Plan, batch: &Batch<'_>, resolved: &Resolved) -> Needs {
    let [q, out, new_k, new_v, lse] = resolved.shapes(plan.spec());
    Needs {
        q: batch.q.extent(q),
        out: batch.out.extent(out),
        lse: batch.lse.map(|layout| layout.extent(lse)),
        new_k: batch.new_k.extent(new_k),
        new_v: batch.new_v.extent(new_v),
        mask: batch.mask.map(|_| resolved.mask_extent),
    }
}
