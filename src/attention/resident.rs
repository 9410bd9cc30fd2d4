//! Loops on the GPU's clock: lengths live in a buffer, and a kernel turns them into the work of each step.

use super::Attention;
use crate::batch::Batch;
use crate::cache::KvCache;
use crate::device::create_filled;
use crate::error::Error;
use crate::params::{
    AppendItem, CombineItem, LoopHead, LoopPatch, LoopSequence, LoopTile, PART_WORDS, Params, WorkItem,
};
use crate::pipeline::bind;
use crate::plan::{Plan, StepInput};
use crate::step::{Host, Resident, Step};

impl Attention {
    /// Prepares a loop whose lengths live on the GPU: the same sequences take the same numbers of tokens in every step, until their
    /// reserved pages ([`KvCache::reserve`]) are full. [`Self::schedule`] begins a step; then [`Self::append`] and [`Self::record`] are
    /// recorded as ever, with the same bindings. No step needs the host to know how long the sequences are.
    ///
    /// ```
    /// # use gqa::{Attention, AttentionSpec, Batch, KvCache, Options, PagedShape, Sequence};
    /// # let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    /// # let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
    /// # let lengths = device.create_buffer(&wgpu::BufferDescriptor { label: None, size: 8, usage, mapped_at_creation: false });
    /// let spec = AttentionSpec::builder(8, 2, 64).build()?;
    /// let attention = Attention::new(&device, spec.clone(), Options::default())?;
    /// let shape = PagedShape { sequences: 2, page: 16, tokens: 4096, longest_step: 1 };
    /// let mut cache = KvCache::paged(&device, &[&spec], shape)?;
    /// let (a, b) = (cache.open()?, cache.open()?);
    /// let mut encoder = device.create_command_encoder(&Default::default());
    /// cache.reserve(&mut encoder, &[(a, 1000), (b, 1000)])?;
    ///
    /// // A number for each sequence, in order: the tokens that it has.
    /// queue.write_buffer(&lengths, 0, bytemuck::cast_slice(&[0u32, 0]));
    /// let sequences = [Sequence::new(a, 1), Sequence::new(b, 1)];
    /// let step = attention.prepare_loop(&queue, &cache, &Batch::new(&spec, &sequences))?;
    /// for _ in 0..1000 {
    ///     attention.schedule(&mut encoder, &step, lengths.as_entire_buffer_binding())?;
    ///     // append and record every layer
    /// }
    /// queue.submit([encoder.finish()]);
    /// cache.advance(a, 1000)?;
    /// cache.advance(b, 1000)?;
    /// # Ok::<(), gqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::prepare`], and [`Error::Field`] for what a loop cannot have: dense masks, trees, documents, a `q_start`, a cache of
    /// several shards, more new tokens than are reserved.
    pub fn prepare_loop(
        &self,
        queue: &wgpu::Queue,
        cache: &KvCache,
        batch: &Batch<'_>,
    ) -> Result<Step, Error> {
        check_batch(&self.plan, batch)?;
        let mut host = Host::default();
        let (index, kind) = self.resolve((cache, true), batch, &mut host)?;
        if kind.shards() > 1 {
            let needed = "lengths can live on the GPU where a layer is one shard: make the pool smaller";
            return Err(Error::field("cache", format!("{} shards", kind.shards()), needed));
        }
        let pipeline = self.scheduler.get()?.clone();
        let layers = cache.shared_layers();
        let maker = self.maker(queue, &layers, (index, &kind));
        let lengths = batch.sequences.iter().map(|s| cache.len(s.id)).collect::<Result<Vec<_>, _>>()?;
        let room = Room::of(&self.plan, &host.resolved.input, &lengths)?;
        let parts = host.resolved.input.dense + host.resolved.input.words.len() as u64;
        let words = host.resolved.input.words.len() + (room.items * u64::from(PART_WORDS)) as usize;
        host.resolved.input.words.resize(words, 0);
        host.lists.reserve(room.is_decode, (room.items as usize, room.tiles.len()));
        host.lists.state_rows = room.items * u64::from(self.plan.spec().kv_heads()) * u64::from(room.rows);
        host.lists.combine_rows = room.rows;
        host.lists.append_all(&self.plan, &host.resolved.input);
        let mut step = Step::of_lists(maker, batch, host)?;

        let words_of = |offset: u64| (offset / 4) as u32;
        let shard = step.shards.first().copied().unwrap_or_default();
        let attend = if room.is_decode { shard.decode } else { shard.prefill };
        let params = (size_of::<Params>() / 4) as u32;
        let patches = patches(
            (&self.plan, &step),
            batch,
            [shard.append.region, step.embed.region].map(|r| words_of(r.offset) + params),
        );
        let mut entries: Vec<u32> = bytemuck::cast_slice(&room.tiles).to_vec();
        let patches_at = entries.len() as u32;
        entries.extend_from_slice(bytemuck::cast_slice(&patches));
        let sequences_at = entries.len() as u32;
        room.sequences.iter().for_each(|s| entries.extend_from_slice(bytemuck::cast_slice(&[*s])));
        let (least_chunk, most_chunk) = room.chunk;
        let head = LoopHead {
            tiles: room.tiles.len() as u32,
            patches: patches.len() as u32,
            sequences: room.sequences.len() as u32,
            least_chunk,
            most_chunk,
            chunk_step: self.plan.chunk_step(),
            fill: room.fill,
            items: words_of(attend.region.offset),
            merges: words_of(step.combine.region.offset),
            head_words: params,
            parts: parts as u32,
            tiles_at: 0,
            patches_at,
            sequences_at,
        };
        let mut bytes = bytemuck::bytes_of(&head).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&entries));
        let input = create_filled(&self.device, "gqa.loop", wgpu::BufferUsages::STORAGE, &bytes)?;
        let heads = self.plan.spec().kv_heads();
        let [x, _, _] = step.combine.grid;
        let arguments = [0, heads, 0, x, heads, 0];
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::INDIRECT;
        let arguments =
            create_filled(&self.device, "gqa.arguments", usage, bytemuck::cast_slice(&arguments))?;
        step.make_resident(
            Resident { pipeline, input, arguments, sequences: head.sequences },
            room.is_decode,
        );
        Ok(step)
    }

    /// Records the beginning of a step of a loop: makes its work from `lengths` (a u32 for each sequence of the batch, in order: the
    /// tokens before the step), then adds its new tokens to them. A length beyond what is reserved counts as what is reserved, a
    /// shorter one than the cache held when the loop was prepared as that length.
    ///
    /// # Errors
    /// [`Error::Field`] when the step was not made by [`Self::prepare_loop`] of this attention, [`Error::Buffer`].
    pub fn schedule(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        step: &Step,
        lengths: wgpu::BufferBinding<'_>,
    ) -> Result<(), Error> {
        self.check_step(step)?;
        step.host.resolved.changes.check()?;
        let Some(resident) = &step.resident else {
            return Err(Error::field(
                "step",
                "of one forward call",
                "call Attention::prepare_loop for a loop",
            ));
        };
        let resources = [
            (0, resident.input.as_entire_binding()),
            (1, self.caps.view("lengths", &lengths, resident.sequences.into(), 4)?),
            (2, step.buffers.work.as_entire_binding()),
            (3, step.buffers.words.as_entire_binding()),
            (4, resident.arguments.as_entire_binding()),
        ];
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("gqa.schedule"),
            timestamp_writes: None,
        });
        pass.set_pipeline(&resident.pipeline.pipeline);
        pass.set_bind_group(0, &bind(&self.device, &resident.pipeline, &resources), &[]);
        pass.dispatch_workgroups(1, 1, 1);
        Ok(())
    }
}

fn check_batch(plan: &Plan, batch: &Batch<'_>) -> Result<(), Error> {
    let refuse =
        |field, found: &str| Err(Error::field(field, found, "a loop on the GPU has none: use prepare"));
    if plan.spec().mask().is_dense() {
        return refuse("mask", "dense");
    }
    if batch.sequences.iter().all(|s| s.q_len == 0) {
        let needed = "a loop attends: use prepare for what only appends";
        return Err(Error::field("sequence.q_len", "0 in all sequences", needed));
    }
    for s in batch.sequences {
        if s.tree.is_some() {
            return refuse("sequence.tree", "given");
        }
        if s.documents.is_some() {
            return refuse("sequence.documents", "given");
        }
        if s.q_start.is_some() {
            return refuse("sequence.q_start", "given");
        }
    }
    Ok(())
}

/// What the work of any step of the loop has room in.
struct Room {
    tiles: Vec<LoopTile>,
    sequences: Vec<LoopSequence>,
    is_decode: bool,
    /// Rows of a tile at most.
    rows: u32,
    /// Items at most.
    items: u64,
    /// Chunks that fill the device, over all tiles.
    fill: u32,
    /// Least and most keys of a chunk.
    chunk: (u32, u32),
}

impl Room {
    /// At the longest: `input` has the sequences as long as they can become, `lengths` as long as they are.
    fn of(plan: &Plan, input: &StepInput, lengths: &[u32]) -> Result<Self, Error> {
        let most = input.sequences.iter().map(|s| s.q_len * plan.spec().group()).max().unwrap_or(0);
        // One kernel for all, so that one dispatch takes them.
        let (is_decode, tile_rows) = plan.tile_of(most);
        let (mut tiles, mut sequences) = (Vec::new(), Vec::new());
        let chunk = plan.chunk_bounds(input.sequences.iter().map(|s| s.kv_len).max().unwrap_or(0));
        let (mut shortest, mut longest, mut keys) = (0, 0, 0);
        for (nth, ((s, new), least)) in (0..).zip(input.sequences.iter().zip(&input.appends).zip(lengths)) {
            let (room, new_len) = (s.kv_len - new.len, new.len);
            sequences.push(LoopSequence { least: *least, room, new_len, q_len: s.q_len, begin: s.begin });
            let rows = s.q_len * plan.spec().group();
            for row_begin in (0..rows).step_by(tile_rows as usize) {
                let row_end = rows.min(row_begin + tile_rows);
                tiles.push(LoopTile { sequence: nth, token: s.token, row_begin, row_end, pages: s.pages });
                shortest += u64::from(s.kv_len.div_ceil(chunk.0).max(1));
                longest += u64::from(s.kv_len.div_ceil(chunk.1).max(1));
                keys += u64::from(s.kv_len);
            }
        }
        let fill = (plan.fill() / plan.spec().kv_heads()).max(1);
        if keys + u64::from(fill) > u64::from(u32::MAX) {
            let needed = "the GPU counts them in 32 bits: split the batch";
            return Err(Error::field("batch", format!("{keys} keys in all tiles"), needed));
        }
        // Chunks that fill the device are one for each tile more than those that fill it, unless they would be too long or too short.
        let items = shortest.min(longest.max(tiles.len() as u64 + u64::from(fill)));
        Ok(Self { tiles, sequences, is_decode, rows: tile_rows.min(most), items, fill, chunk })
    }
}

/// The words of the work lists that follow from lengths alone: slots and positions of new tokens, positions of rotated queries.
fn patches(
    (plan, step): (&Plan, &Step),
    batch: &Batch<'_>,
    [append_at, embed_at]: [u32; 2],
) -> Vec<LoopPatch> {
    const ITEM: u32 = (size_of::<AppendItem>() / 4) as u32;
    let (slot, position) = (2, 3);
    let mut patches = Vec::new();
    let input = &step.host.resolved.input;
    // Both lists have the sequences in their order, each in runs. New tokens alone do not tell whose they are: several may take the same.
    let runs = |tokens: u32, run: u32| (0..tokens).step_by(run as usize);
    let mut item = 0..;
    for (sequence, new) in (0..).zip(&input.appends) {
        for (add, nth) in runs(new.len, plan.append().tile.rows).zip(&mut item) {
            for field in [slot, position] {
                patches.push(LoopPatch { word: append_at + nth * ITEM + field, sequence, add });
            }
        }
    }
    let Some(embed) = plan.embed() else { return patches };
    let mut item = 0..;
    for ((sequence, s), of_batch) in (0..).zip(&input.sequences).zip(batch.sequences) {
        for (at, nth) in runs(s.q_len, embed.tile.rows).zip(&mut item) {
            let add = at.wrapping_add(of_batch.new_len).wrapping_sub(s.q_len);
            patches.push(LoopPatch { word: embed_at + nth * ITEM + position, sequence, add });
        }
    }
    patches
}

/// Entries are written as words by `shaders/schedule.wgsl`.
const _: () = assert!(size_of::<WorkItem>() == 16 * 4 && size_of::<CombineItem>() == 5 * 4);
