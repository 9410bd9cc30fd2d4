//! Copies of pages within the cache: for forks that grow, and to defragment.
//!
//! A buffer cannot be copied to itself, so a copy within a shard goes through a scratch buffer.

use super::shape::Kind;
use super::{Layer, Shard};
use crate::device::create_buffer;
use crate::error::Error;
use crate::pages::{PageCopy, PageMove, Place};

/// Copies that are to be recorded, and the scratch memory for them.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pub(super) pages: Vec<PageCopy>,
    pub(super) moves: Vec<PageMove>,
    /// Twice the largest part of a page: what is on its way, and what waits for its place.
    scratch: Option<wgpu::Buffer>,
}

/// Where a part of a page is.
#[derive(Clone, Copy)]
struct Part<'a> {
    buffer: &'a wgpu::Buffer,
    offset: u64,
    size: u64,
}

impl Copies {
    /// Makes the scratch memory, once.
    pub(super) fn make_room(&mut self, device: &wgpu::Device, kinds: &[Kind]) -> Result<(), Error> {
        if self.scratch.is_none() {
            let largest = largest_part(kinds);
            let usage = wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            self.scratch = Some(create_buffer(device, "gqa.cache.scratch", 2 * largest, usage)?);
        }
        Ok(())
    }

    /// Records the copies of `pages` in every layer of their kind.
    pub(super) fn record(&self, encoder: &mut wgpu::CommandEncoder, kinds: &[Kind], layers: &[Layer]) {
        for PageCopy { pool, from, to } in &self.pages {
            let moved = PageMove { pool: *pool, from: Place::Page(*from), to: Place::Page(*to) };
            self.record_all(encoder, (kinds, layers), &[moved]);
        }
    }

    /// Records `moves`, in their order.
    pub(super) fn record_moves(&self, encoder: &mut wgpu::CommandEncoder, kinds: &[Kind], layers: &[Layer]) {
        self.record_all(encoder, (kinds, layers), &self.moves);
    }

    fn record_all(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        (kinds, layers): (&[Kind], &[Layer]),
        moves: &[PageMove],
    ) {
        // Pages are shared only after a fork, which has made room.
        let Some(scratch) = &self.scratch else { return };
        let largest = scratch.size() / 2;
        // All moves of one part of one layer after another: what waits is one part.
        for layer in layers {
            let kind = &kinds[layer.kind as usize];
            let moves = || moves.iter().filter(|m| m.pool == layer.kind as usize);
            let heads = kind.entry.kv_heads() as usize;
            for (side, plane) in sides(layer).flat_map(|side| [(side, 0), (side, 1)]) {
                for head in 0..heads {
                    let part = |place: Place| match place {
                        Place::Page(page) => part_of(layer, kind, (page, side, plane), head),
                        Place::Spare => part_of(layer, kind, (0, side, plane), head).map(|part| Part {
                            buffer: scratch,
                            offset: largest,
                            ..part
                        }),
                    };
                    for PageMove { from, to, .. } in moves() {
                        let (Some(from), Some(to)) = (part(*from), part(*to)) else { continue };
                        copy(encoder, from, to, scratch);
                    }
                }
            }
        }
    }
}

/// Keys, and values that have buffers of their own.
pub(super) fn sides(layer: &Layer) -> std::ops::Range<usize> {
    let in_keys = layer.shards.first().is_some_and(|shard| shard.k == shard.v);
    0..if in_keys { 1 } else { 2 }
}

pub(super) fn buffer_of(shard: &Shard, side: usize) -> &wgpu::Buffer {
    if side == 0 { &shard.k } else { &shard.v }
}

fn part_of<'a>(
    layer: &'a Layer,
    kind: &Kind,
    (page, side, plane): (u32, usize, usize),
    head: usize,
) -> Option<Part<'a>> {
    let (offset, size) = kind.parts(page, side, plane).nth(head)?;
    let shard = layer.shards.get((page / kind.pool.pages_per_shard) as usize)?;
    Some(Part { buffer: buffer_of(shard, side), offset, size })
}

fn copy(encoder: &mut wgpu::CommandEncoder, from: Part<'_>, to: Part<'_>, scratch: &wgpu::Buffer) {
    let size = from.size;
    if from.buffer != to.buffer {
        encoder.copy_buffer_to_buffer(from.buffer, from.offset, to.buffer, to.offset, size);
        return;
    }
    encoder.copy_buffer_to_buffer(from.buffer, from.offset, scratch, 0, size);
    encoder.copy_buffer_to_buffer(scratch, 0, to.buffer, to.offset, size);
}

fn largest_part(kinds: &[Kind]) -> u64 {
    let of = |kind: &Kind, side, plane| kind.parts(0, side, plane).map(|(_, size)| size).max().unwrap_or(4);
    let all = [(0, 0), (0, 1), (1, 0), (1, 1)];
    kinds.iter().flat_map(|kind| all.map(|(side, plane)| of(kind, side, plane))).max().unwrap_or(4)
}
