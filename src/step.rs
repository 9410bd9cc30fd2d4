//! One forward call, prepared: work lists in GPU buffers, used by every layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::batch::{Batch, Resolved};
use crate::cache::Layer;
use crate::params::Params;
use crate::plan::{Plan, Traffic, WorkLists};
use crate::shader::row_fours;

/// A prepared forward call. Made by [`Attention::prepare`](crate::Attention::prepare), recorded once per layer.
#[derive(Debug)]
pub struct Step {
    /// Tells bindings of this preparation from those of others.
    pub(crate) stamp: u64,
    pub(crate) prefill: Launch,
    pub(crate) decode: Launch,
    pub(crate) combine: Launch,
    pub(crate) append: Launch,
    pub(crate) states: Option<wgpu::Buffer>,
    pub(crate) layers: Arc<[Layer]>,
    pub(crate) needs: Needs,
    traffic: Traffic,
}

/// Elements that each tensor must hold.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    pub(crate) q: u64,
    pub(crate) out: u64,
    pub(crate) lse: Option<u64>,
    pub(crate) new_k: u64,
    pub(crate) new_v: u64,
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
        self.work.as_ref().filter(|_| self.grid[0] > 0).map(|work| (work, self.grid))
    }

    fn fill(&mut self, upload: &Upload<'_>, bytes: &[u8], grid: [u32; 3]) {
        self.grid = grid;
        if grid[0] == 0 {
            return;
        }
        let buffer = upload.reserve(self.work.take(), bytes.len() as u64, "gqa.work");
        upload.queue.write_buffer(&buffer, 0, bytes);
        self.work = Some(buffer);
    }
}

/// Where work lists are written to.
pub(crate) struct Upload<'a> {
    pub(crate) device: &'a wgpu::Device,
    pub(crate) queue: &'a wgpu::Queue,
    pub(crate) workgroups: u32,
}

impl Upload<'_> {
    /// `old` where it is large enough, else a buffer with some room to grow.
    fn reserve(&self, old: Option<wgpu::Buffer>, size: u64, label: &str) -> wgpu::Buffer {
        if let Some(buffer) = old.filter(|b| b.size() >= size) {
            return buffer;
        }
        // Powers of two, so that a growing batch settles; but never beyond what a binding may hold.
        let limit = self.device.limits().max_storage_buffer_binding_size;
        let roomy = size.next_power_of_two().max(256);
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: if roomy <= limit { roomy } else { size },
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }
}

impl Step {
    pub(crate) fn empty(layers: Arc<[Layer]>) -> Self {
        Self {
            stamp: 0,
            prefill: Launch::default(),
            decode: Launch::default(),
            combine: Launch::default(),
            append: Launch::default(),
            states: None,
            layers,
            needs: Needs::default(),
            traffic: Traffic::default(),
        }
    }

    /// What the step moves and computes at least, in one layer.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Workgroups of prefill, decode, combine and append, in one layer.
    pub fn workgroups(&self) -> [u64; 4] {
        [&self.prefill, &self.decode, &self.combine, &self.append]
            .map(|launch| launch.grid.iter().map(|n| u64::from(*n)).product())
    }

    /// Fills every work list, reusing buffers that are large enough.
    pub(crate) fn fill(&mut self, upload: &Upload<'_>, plan: &Plan, batch: &Batch<'_>, resolved: &Resolved) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.stamp = NEXT.fetch_add(1, Ordering::Relaxed);
        let spec = plan.spec();
        let lists = plan.work(&resolved.sequences);
        self.traffic = Traffic::of(spec, &resolved.sequences);
        self.needs = needs(plan, batch, resolved);

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
        let grid = |items| WorkLists::grid(items, spec.kv_heads(), upload.workgroups);
        self.prefill.fill(upload, &WorkLists::bytes(params, &lists.prefill), grid(lists.prefill.len()));
        self.decode.fill(upload, &WorkLists::bytes(params, &lists.decode), grid(lists.decode.len()));
        self.append.fill(upload, &WorkLists::bytes(append, &lists.append), grid(lists.append.len()));
        let columns = lists.combine_rows * row_fours(spec.v_head_dim());
        let combine_grid =
            [columns.div_ceil(plan.combine().tile.threads), spec.kv_heads(), lists.combine.len() as u32];
        self.combine.fill(upload, &WorkLists::bytes(params, &lists.combine), combine_grid);
        if lists.state_rows > 0 {
            let size = lists.state_rows * plan.state_row_bytes();
            self.states = Some(upload.reserve(self.states.take(), size, "gqa.states"));
        }
    }
}

fn needs(plan: &Plan, batch: &Batch<'_>, resolved: &Resolved) -> Needs {
    let [q, out, new_k, new_v, lse] = resolved.shapes(plan.spec());
    Needs {
        q: batch.q.extent(q),
        out: batch.out.extent(out),
        lse: batch.lse.map(|layout| layout.extent(lse)),
        new_k: batch.new_k.extent(new_k),
        new_v: batch.new_v.extent(new_v),
    }
}
