//! One forward call, prepared: work lists in GPU buffers, used by every layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::batch::{Batch, Masks, Resolved};
use crate::cache::Layer;
use crate::caps::Caps;
use crate::device::create_buffer;
use crate::error::Error;
use crate::params::{PackHead, PackItem, Params};
use crate::plan::{Plan, Traffic, WorkLists};
use crate::shader::row_fours;

/// A prepared forward call. Made by [`Attention::prepare`](crate::Attention::prepare), recorded once per layer.
///
/// It keeps the places that its sequences had in the cache: record it before they are truncated or closed.
#[derive(Debug)]
pub struct Step {
    /// The attention that prepared it: work lists mean something to its kernels only.
    pub(crate) attention: u64,
    /// Tells bindings of this step from those of others.
    pub(crate) stamp: u64,
    pub(crate) prefill: Launch,
    pub(crate) decode: Launch,
    pub(crate) combine: Launch,
    pub(crate) append: Launch,
    pub(crate) pack: Launch,
    pub(crate) states: Option<wgpu::Buffer>,
    /// Masks of the sequences, then the maps of dense ones.
    pub(crate) masks: Option<wgpu::Buffer>,
    /// Whether a dense mask has been recorded.
    pub(crate) masked: AtomicBool,
    pub(crate) layers: Arc<[Layer]>,
    pub(crate) needs: Needs,
    traffic: Traffic,
}

/// Words of a mask that one workgroup packs.
const PACK_WORDS: u64 = 1024;

/// Elements that each tensor must hold.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    pub(crate) q: u64,
    pub(crate) out: u64,
    pub(crate) lse: Option<u64>,
    pub(crate) new_k: u64,
    pub(crate) new_v: u64,
    /// Where the spec has a dense mask.
    pub(crate) mask: Option<u64>,
}

/// A work list in a buffer, and the dispatch that takes it.
#[derive(Debug, Default)]
pub(crate) struct Launch {
    work: Option<wgpu::Buffer>,
    grid: [u32; 3],
}

impl Launch {
    /// The work list and its dispatch, where there is work.
    pub(crate) fn get(&self) -> Option<(&wgpu::Buffer, [u32; 3])> {
        self.work.as_ref().map(|work| (work, self.grid))
    }
}

/// Where work lists are written to.
pub(crate) struct Upload<'a> {
    pub(crate) device: &'a wgpu::Device,
    pub(crate) queue: &'a wgpu::Queue,
    pub(crate) caps: &'a Caps,
}

impl Upload<'_> {
    /// The masks of a step: trees as they are, room for dense masks and their maps.
    fn masks(&self, masks: &Masks, map_words: u64) -> Result<Option<wgpu::Buffer>, Error> {
        let needed = (masks.words + map_words) * 4;
        if needed == 0 {
            return Ok(None);
        }
        if needed > self.caps.binding_size {
            return Err(Error::Limit {
                what: "the packed masks of a step".to_owned(),
                limit: "max_storage_buffer_binding_size",
                needed,
                found: self.caps.binding_size,
                hint: "broadcast what is the same for heads, or split the batch",
            });
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let buffer = create_buffer(self.device, "gqa.masks", needed, usage)?;
        if !masks.trees.is_empty() {
            self.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&masks.trees));
        }
        Ok(Some(buffer))
    }

    /// The work of packing dense masks: x shares out the words of a sequence, y and z hold the sequences.
    fn pack(&self, batch: &Batch<'_>, masks: &Masks) -> Result<Launch, Error> {
        let Some(layout) = batch.mask else { return Ok(Launch::default()) };
        let head = PackHead {
            items: masks.pack.len() as u32,
            head_stride: layout.head_stride,
            token_stride: layout.token_stride,
            key_stride: layout.key_stride,
        };
        let words = |item: &PackItem| u64::from(item.heads) * u64::from(item.q_len) * u64::from(item.pitch);
        let most = masks.pack.iter().map(words).max().unwrap_or(0);
        let x = most.div_ceil(PACK_WORDS).min(u64::from(self.caps.workgroups)) as u32;
        let [y, _, z] = WorkLists::grid(masks.pack.len(), 1, self.caps.workgroups);
        self.launch(&WorkLists::bytes(&head, &masks.pack), [x, y, z])
    }

    /// A work list in a buffer of its own. Never one that was used before: a write takes effect before the next submission,
    /// so it would change under commands that were recorded but not submitted.
    fn launch(&self, bytes: &[u8], grid: [u32; 3]) -> Result<Launch, Error> {
        if grid[0] == 0 {
            return Ok(Launch::default());
        }
        let needed = bytes.len() as u64;
        let what = || "the work list of a step".to_owned();
        let hint = "split the batch, or leave Options::chunk to the plan";
        let limit = "max_storage_buffer_binding_size";
        if needed > self.caps.binding_size {
            return Err(Error::Limit { what: what(), limit, needed, found: self.caps.binding_size, hint });
        }
        let (limit, needed, found) = ("max_compute_workgroups_per_dimension", grid[2], self.caps.workgroups);
        if needed > found {
            return Err(Error::Limit {
                what: what(),
                limit,
                needed: needed.into(),
                found: found.into(),
                hint,
            });
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let work = create_buffer(self.device, "gqa.work", bytes.len() as u64, usage)?;
        self.queue.write_buffer(&work, 0, bytes);
        Ok(Launch { work: Some(work), grid })
    }
}

impl Step {
    /// What the step moves and computes at least, in one layer.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Workgroups of prefill, decode, combine and append, in one layer.
    pub fn workgroups(&self) -> [u64; 4] {
        [&self.prefill, &self.decode, &self.combine, &self.append]
            .map(|launch| launch.grid.iter().map(|n| u64::from(*n)).product())
    }

    /// Work lists of a resolved batch, for `attention` with `plan`, over `layers`.
    pub(crate) fn new(
        upload: &Upload<'_>,
        (attention, plan): (u64, &Plan),
        layers: Arc<[Layer]>,
        (batch, resolved): (&Batch<'_>, &Resolved),
    ) -> Result<Self, Error> {
        let spec = plan.spec();
        let lists = plan.work(&resolved.sequences, &resolved.appends);
        let lse = batch.lse.unwrap_or_else(|| crate::Layout::tokens_heads(0, 0));
        let params = Params {
            items: 0,
            slots: resolved.slots,
            lse: u32::from(batch.lse.is_some()),
            q_offset: batch.q.offset,
            q_token: batch.q.token_stride,
            q_head: batch.q.head_stride,
            out_offset: batch.out.offset,
            out_token: batch.out.token_stride,
            out_head: batch.out.head_stride,
            lse_offset: lse.offset,
            lse_token: lse.token_stride,
            lse_head: lse.head_stride,
            maps: resolved.masks.words as u32,
        };
        let append = Params {
            q_offset: batch.new_k.offset,
            q_token: batch.new_k.token_stride,
            q_head: batch.new_k.head_stride,
            out_offset: batch.new_v.offset,
            out_token: batch.new_v.token_stride,
            out_head: batch.new_v.head_stride,
            ..params
        };
        let grid = |items| WorkLists::grid(items, spec.kv_heads(), upload.caps.workgroups);
        let counted = |params: Params, items: usize| Params { items: items as u32, ..params };
        let columns = lists.combine_rows * row_fours(spec.v_head_dim());
        let combine_grid =
            [columns.div_ceil(plan.combine().tile.threads), spec.kv_heads(), lists.combine.len() as u32];
        let states = match lists.state_rows * plan.state_row_bytes() {
            0 => None,
            size => Some(create_buffer(upload.device, "gqa.states", size, wgpu::BufferUsages::STORAGE)?),
        };
        Ok(Self {
            attention,
            stamp: unique_id(),
            prefill: upload.launch(
                &WorkLists::bytes(&counted(params, lists.prefill.len()), &lists.prefill),
                grid(lists.prefill.len()),
            )?,
            decode: upload.launch(
                &WorkLists::bytes(&counted(params, lists.decode.len()), &lists.decode),
                grid(lists.decode.len()),
            )?,
            combine: upload.launch(
                &WorkLists::bytes(&counted(params, lists.combine.len()), &lists.combine),
                combine_grid,
            )?,
            append: upload.launch(
                &WorkLists::bytes(&counted(append, lists.append.len()), &lists.append),
                grid(lists.append.len()),
            )?,
            pack: upload.pack(batch, &resolved.masks)?,
            states,
            masks: upload.masks(&resolved.masks, lists.map_words)?,
            masked: AtomicBool::new(false),
            layers,
            needs: needs(plan, batch, resolved),
            traffic: Traffic::of(spec, &resolved.sequences),
        })
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
        mask: batch.mask.map(|_| resolved.masks.extent),
    }
}
