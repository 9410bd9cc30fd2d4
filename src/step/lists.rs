//! Lays the work lists of a step out in the image of its buffer.

use super::memory::Maker;
use super::{Host, ShardLaunches};
use crate::batch::{Batch, Resolved};
use crate::cache::Kind;
use crate::caps::Caps;
use crate::error::Error;
use crate::layout::Layout;
use crate::params::{AppendItem, PackHead, PackItem, Params};
use crate::plan::{Plan, StepSequence, WorkLists};
use crate::shader::row_fours;
use crate::upload::{Image, Launch};

/// Words of a mask that one workgroup packs.
const PACK_WORDS: u64 = 1024;

/// The launches of a step, as they are laid out.
#[derive(Default)]
pub(super) struct Launches {
    pub(super) shards: Vec<ShardLaunches>,
    pub(super) combine: Launch,
    pub(super) embed: Launch,
    pub(super) pack: Launch,
}

impl Launches {
    /// Writes every list into the image of the work buffer.
    pub(super) fn lay_out(
        &mut self,
        maker: Maker<'_>,
        batch: &Batch<'_>,
        host: &mut Host,
    ) -> Result<(), Error> {
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
        (host.params, host.new) = (params, append);
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
                pages,
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
    let lse = batch.lse.unwrap_or_else(|| Layout::tokens_heads(0, 0));
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
        tokens: resolved.tokens,
        ..Params::default()
    }
}

/// How rotated queries lie: as `embed` writes them.
pub(crate) fn embedded(plan: &Plan) -> Layout {
    Layout::tokens_heads(plan.spec().q_heads(), row_fours(plan.spec().head_dim()) * 4)
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
