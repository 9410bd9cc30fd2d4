//! A step's buffers on the GPU, and who makes them.

use std::sync::Arc;

use super::Host;
use crate::cache::{Kind, Layer};
use crate::caps::Caps;
use crate::device::create_buffer;
use crate::error::Error;
use crate::plan::Plan;
use crate::shader::row_fours;
use crate::upload::Image;

/// A step's memory on the GPU.
#[derive(Debug)]
pub(crate) struct Buffers {
    /// Every work list.
    pub(crate) work: wgpu::Buffer,
    /// Dense masks, page tables, trees, lists, parts, maps.
    pub(crate) words: wgpu::Buffer,
    pub(crate) states: Option<wgpu::Buffer>,
    /// Rotated queries.
    pub(crate) queries: Option<wgpu::Buffer>,
}

/// Who prepares a step, for which layers.
#[derive(Clone, Copy)]
pub(crate) struct Maker<'a> {
    pub(crate) device: &'a wgpu::Device,
    pub(crate) queue: &'a wgpu::Queue,
    pub(crate) caps: &'a Caps,
    pub(crate) plan: &'a Plan,
    pub(crate) attention: u64,
    pub(crate) layers: &'a Arc<[Layer]>,
    pub(crate) kind: (u32, &'a Kind),
}

/// Bytes that a step's buffers must hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sizes {
    pub(super) words: u64,
    pub(super) states: u64,
    pub(super) queries: u64,
}

impl Maker<'_> {
    pub(super) fn sizes(&self, host: &Host) -> Sizes {
        let (input, lists) = (&host.resolved.input, &host.lists);
        let row = row_fours(self.plan.spec().head_dim()) as u64 * 16;
        let queries = match self.plan.embed() {
            Some(_) => u64::from(host.resolved.tokens) * u64::from(self.plan.spec().q_heads()) * row,
            None => 0,
        };
        Sizes {
            words: (input.dense + input.words.len() as u64 + lists.map_words) * 4,
            states: lists.state_rows * self.plan.state_row_bytes(),
            queries,
        }
    }
}

impl Buffers {
    pub(super) fn new(maker: Maker<'_>, image: &Image, sizes: Sizes) -> Result<Self, Error> {
        use wgpu::BufferUsages as Usage;
        let make = |what: &'static str, size: u64, usage: Usage, hint: &'static str| {
            let found = maker.caps.binding_size;
            if size > found {
                let limit = "max_storage_buffer_binding_size";
                return Err(Error::Limit { what: what.to_owned(), limit, needed: size, found, hint });
            }
            // Some room to grow into.
            let most = found.min(maker.caps.buffer_size) / 4 * 4;
            let size = size.max(4).next_power_of_two().min(most.max(size));
            create_buffer(maker.device, what, size, Usage::STORAGE | usage)
        };
        let hint = "split the batch or its long prefills, leave Options::chunk to the plan, or defragment a cache of several shards";
        let optional = |what, size| match size {
            0 => Ok(None),
            size => make(what, size, Usage::COPY_SRC, hint).map(Some),
        };
        Ok(Self {
            work: make("gqa.work", image.len(), Usage::COPY_DST, hint)?,
            words: make(
                "gqa.words",
                sizes.words,
                Usage::COPY_DST | Usage::COPY_SRC,
                "broadcast what is the same for heads of a mask, or split the batch",
            )?,
            states: optional("gqa.states", sizes.states)?,
            queries: optional("gqa.queries", sizes.queries)?,
        })
    }

    /// Whether they have room.
    pub(super) fn hold(&self, image: &Image, sizes: Sizes) -> bool {
        let room = |buffer: &Option<wgpu::Buffer>| buffer.as_ref().map_or(0, wgpu::Buffer::size);
        image.len() <= self.work.size()
            && sizes.words <= self.words.size()
            && sizes.states <= room(&self.states)
            && sizes.queries <= room(&self.queries)
    }
}
