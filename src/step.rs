//! One forward call, prepared: work lists in GPU buffers, used by every layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::batch::{Batch, Resolved};
use crate::cache::{Kind, Layer};
use crate::caps::Caps;
use crate::device::create_buffer;
use crate::error::Error;
use crate::params::{AppendItem, PackHead, PackItem, Params};
use crate::pipeline::Pipeline;
use crate::plan::{Plan, StepSequence, Traffic, WorkLists};
use crate::shader::row_fours;
use crate::upload::{Image, Region};

/// A prepared forward call. Made by [`Attention::prepare`](crate::Attention::prepare), recorded once per layer, made anew by
/// [`Attention::update`](crate::Attention::update).
///
/// It keeps the places that its sequences had in the cache: record it before they are truncated, evicted, closed or defragmented.
#[derive(Debug)]
pub struct Step {
    /// The attention that prepared it: work lists mean something to its kernels only.
    pub(crate) attention: u64,
    /// Tells bindings of this step from those of others.
    pub(crate) stamp: u64,
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
}

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
    pub(crate) lists: WorkLists,
    image: Image,
    pub(crate) embed: Vec<AppendItem>,
    shards: Vec<ShardLaunches>,
}

/// Words of a mask that one workgroup packs.
const PACK_WORDS: u64 = 1024;

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

/// A work list's place in the step's buffer, and the dispatch that takes it.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) region: Region,
    pub(crate) grid: [u32; 3],
    /// Where its arguments are, if the GPU makes them.
    pub(crate) arguments: Option<u64>,
}

impl Launch {
    /// The dispatch, where there is work.
    pub(crate) fn get(&self) -> Option<[u32; 3]> {
        (self.grid[0] > 0).then_some(self.grid)
    }
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
struct Sizes {
    words: u64,
    states: u64,
    queries: u64,
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
        let Region { offset, size } = launch.region;
        let size = std::num::NonZeroU64::new(size);
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer: &self.buffers.work, offset, size })
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

    /// The same for another batch, which `self.host` has resolved: in the same memory where it fits.
    pub(crate) fn renew(&mut self, maker: Maker<'_>, batch: &Batch<'_>) -> Result<(), Error> {
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

/// The launches of a step, as they are laid out.
#[derive(Default)]
struct Launches {
    shards: Vec<ShardLaunches>,
    combine: Launch,
    embed: Launch,
    pack: Launch,
}

impl Launches {
    /// Writes every list into the image of the work buffer.
    fn lay_out(&mut self, maker: Maker<'_>, batch: &Batch<'_>, host: &mut Host) -> Result<(), Error> {
        let Maker { caps, plan, kind: (_, kind), .. } = maker;
        let (spec, lists) = (plan.spec(), &host.lists);
        let image = &mut host.image;
        image.clear();
        let grid = |items: usize| WorkLists::grid(items, spec.kv_heads(), caps.workgroups);
        let params = params(plan, batch, &host.resolved, kind);
        let append = Params {
            q_offset: batch.new_k.offset,
            q_token: batch.new_k.token_stride,
            q_head: batch.new_k.head_stride,
            out_offset: batch.new_v.offset,
            out_token: batch.new_v.token_stride,
            out_head: batch.new_v.head_stride,
            ..params
        };
        self.shards.clear();
        for (nth, ((prefill, decode), new)) in
            lists.prefill.iter().zip(&lists.decode).zip(&lists.append).enumerate()
        {
            let pages = kind.pages_of(nth as u32);
            let [k_headers, v_headers] = kind.headers_at(nth as u32);
            let of = |params: Params, items: usize| Params {
                items: items as u32,
                pages,
                k_headers,
                v_headers,
                ..params
            };
            self.shards.push(ShardLaunches {
                prefill: image.launch(caps, (&of(params, prefill.len()), prefill), grid(prefill.len()))?,
                decode: image.launch(caps, (&of(params, decode.len()), decode), grid(decode.len()))?,
                append: image.launch(caps, (&of(append, new.len()), new), grid(new.len()))?,
            });
        }
        let of = |params: Params, items: usize| Params { items: items as u32, ..params };
        self.combine = image.launch(
            caps,
            (&of(params, lists.combine.len()), &lists.combine),
            combine_grid(plan, lists.combine_rows, lists.combine.len() as u32),
        )?;
        host.embed.clear();
        if let Some(embed) = plan.embed() {
            for s in &host.resolved.input.sequences {
                embed_runs(s, &host.resolved, embed.tile.rows, &mut host.embed);
            }
        }
        let queries = Params {
            items: host.embed.len() as u32,
            q_offset: batch.q.offset,
            q_token: batch.q.token_stride,
            q_head: batch.q.head_stride,
            ..Params::default()
        };
        let [x, _, z] = grid(host.embed.len());
        self.embed = image.launch(caps, (&queries, &host.embed), [x, spec.q_heads(), z])?;
        self.pack = pack(caps, batch, &host.resolved, image)?;
        Ok(())
    }
}

/// What all items of a step share, but for what belongs to a shard.
fn params(plan: &Plan, batch: &Batch<'_>, resolved: &Resolved, kind: &Kind) -> Params {
    let lse = batch.lse.unwrap_or_else(|| crate::Layout::tokens_heads(0, 0));
    let q = match plan.embed() {
        Some(_) => embedded(plan),
        None => batch.q,
    };
    // A page of another size is a whole sequence.
    let shift = if kind.pool.page.is_power_of_two() { kind.pool.page.ilog2() } else { 31 };
    Params {
        slots: kind.pool.page,
        page_shift: shift,
        page_mask: (1 << shift) - 1,
        lse: u32::from(batch.lse.is_some()),
        q_offset: q.offset,
        q_token: q.token_stride,
        q_head: q.head_stride,
        out_offset: batch.out.offset,
        out_token: batch.out.token_stride,
        out_head: batch.out.head_stride,
        lse_offset: lse.offset,
        lse_token: lse.token_stride,
        lse_head: lse.head_stride,
        maps: (resolved.input.dense + resolved.input.words.len() as u64) as u32,
        ..Params::default()
    }
}

/// How rotated queries lie: as `embed` writes them.
pub(crate) fn embedded(plan: &Plan) -> crate::Layout {
    crate::Layout::tokens_heads(plan.spec().q_heads(), row_fours(plan.spec().head_dim()) * 4)
}

/// The dispatch that merges `items` tiles of at most `rows` rows.
pub(crate) fn combine_grid(plan: &Plan, rows: u32, items: u32) -> [u32; 3] {
    let spec = plan.spec();
    let x = match spec.rotated() {
        true => rows,
        false => (rows * row_fours(spec.v_head_dim())).div_ceil(plan.combine().tile.threads),
    };
    [x, spec.kv_heads(), items]
}

/// The queries of a sequence in runs, for `embed`: in one position after the other, but for those of a tree.
fn embed_runs(s: &StepSequence, resolved: &Resolved, run: u32, all: &mut Vec<AppendItem>) {
    let run = if resolved.input.has_tree(s) { 1 } else { run };
    all.extend((0..s.q_len).step_by(run as usize).map(|at| AppendItem {
        token: s.token + at,
        tokens: run.min(s.q_len - at),
        position: s.origin as i32 + resolved.input.turn(s, at, &resolved.input.words),
        ..AppendItem::default()
    }));
}

/// The work of packing dense masks: x shares out the words of a sequence, y and z hold the sequences.
fn pack(caps: &Caps, batch: &Batch<'_>, resolved: &Resolved, image: &mut Image) -> Result<Launch, Error> {
    let Some(layout) = batch.mask else { return Ok(Launch::default()) };
    let head = PackHead {
        items: resolved.pack.len() as u32,
        head_stride: layout.head_stride,
        token_stride: layout.token_stride,
        key_stride: layout.key_stride,
    };
    let words = |item: &PackItem| u64::from(item.heads) * u64::from(item.q_len) * u64::from(item.pitch);
    let most = resolved.pack.iter().map(words).max().unwrap_or(0);
    let x = most.div_ceil(PACK_WORDS).min(u64::from(caps.workgroups)) as u32;
    let [y, _, z] = WorkLists::grid(resolved.pack.len(), 1, caps.workgroups);
    image.launch(caps, (&head, &resolved.pack), [x, y, z])
}

impl Maker<'_> {
    fn sizes(&self, host: &Host) -> Sizes {
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
    fn new(maker: Maker<'_>, image: &Image, sizes: Sizes) -> Result<Self, Error> {
        use wgpu::BufferUsages as Usage;
        let make = |what: &'static str, size: u64, usage: Usage, hint: &'static str| {
            let found = maker.caps.binding_size;
            if size > found {
                let limit = "max_storage_buffer_binding_size";
                return Err(Error::Limit { what: what.to_owned(), limit, needed: size, found, hint });
            }
            // Some room to grow into.
            let size = size.max(4).next_power_of_two().min(found / 4 * 4);
            create_buffer(maker.device, what, size, Usage::STORAGE | usage)
        };
        let hint = "split the batch, or leave Options::chunk to the plan";
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
    fn hold(&self, image: &Image, sizes: Sizes) -> bool {
        let room = |buffer: &Option<wgpu::Buffer>| buffer.as_ref().map_or(0, wgpu::Buffer::size);
        image.len() <= self.work.size()
            && sizes.words <= self.words.size()
            && sizes.states <= room(&self.states)
            && sizes.queries <= room(&self.queries)
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
