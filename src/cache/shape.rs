//! Shapes of caches: what a user asks for, and how it lies in buffers.

use crate::caps::Caps;
use crate::error::Error;
use crate::pages::PoolShape;
use crate::spec::{AttentionSpec, Dtype, RowLayout};

/// Shape of a contiguous [`KvCache`](crate::KvCache): a sequence has one page, as long as its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers of the model; each has buffers of its own.
    pub layers: u32,
    /// Sequences that can be open at once.
    pub sequences: u32,
    /// Tokens that each sequence can hold.
    pub capacity: u32,
}

/// Shape of a paged [`KvCache`](crate::KvCache): sequences share a pool of pages and may be of any length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagedShape {
    /// Sequences that can be open at once.
    pub sequences: u32,
    /// Slots of a page: a power of two. 16 or 32 waste little and suit every kernel.
    pub page: u32,
    /// Slots of the pool of every layer, for all sequences together; rounded up to whole pages.
    pub tokens: u32,
    /// Most tokens that one sequence grows by at once, or reserves. Layers with a window get `window + longest_step` slots for a sequence,
    /// however long its text. A longer step is taken while their pool has room, and is [`Error::CacheFull`] when it has not.
    pub longest_step: u32,
}

impl PagedShape {
    /// Slots of a page that suit most uses.
    pub const PAGE: u32 = 16;
}

/// What of a spec a layer of a cache depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    kv_heads: u32,
    head_dim: u32,
    /// 0 where values lie in keys.
    v_head_dim: u32,
    k_dtype: Dtype,
    v_dtype: Dtype,
    rotated: bool,
}

impl Entry {
    /// KV heads.
    pub(crate) fn kv_heads(&self) -> u32 {
        self.kv_heads
    }

    pub(crate) fn of(spec: &AttentionSpec) -> Self {
        Self {
            kv_heads: spec.kv_heads(),
            head_dim: spec.head_dim(),
            v_head_dim: if spec.v_in_k() { 0 } else { spec.v_head_dim() },
            k_dtype: spec.k_dtype(),
            v_dtype: spec.v_dtype(),
            rotated: spec.rotated(),
        }
    }
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kv_heads, head_dim, v_head_dim, k_dtype, v_dtype, rotated } = self;
        write!(f, "{kv_heads} KV heads of {head_dim} in {k_dtype} and {v_head_dim} in {v_dtype}")?;
        f.write_str(if *rotated { ", rotated" } else { "" })
    }
}

/// A kind of layers: those that hold the same and let go of the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) entry: Entry,
    /// Keys before its own that a query sees, where pages behind that are let go.
    pub(crate) window: Option<u32>,
    pub(crate) pool: PoolShape,
}

impl Kind {
    /// How many shards a layer has.
    pub(crate) fn shards(&self) -> u32 {
        self.pool.pages.div_ceil(self.pool.pages_per_shard)
    }

    /// Pages of a shard: the last one may have fewer.
    pub(crate) fn pages_of(&self, shard: u32) -> u32 {
        let before = shard * self.pool.pages_per_shard;
        self.pool.pages.saturating_sub(before).min(self.pool.pages_per_shard)
    }

    /// Rows of a page, of all KV heads.
    pub(crate) fn rows_per_page(&self) -> u64 {
        u64::from(self.entry.kv_heads) * u64::from(self.pool.page)
    }

    /// Rows of keys and of values.
    pub(crate) fn rows(&self) -> [RowLayout; 2] {
        let Entry { head_dim, v_head_dim, k_dtype, v_dtype, .. } = self.entry;
        [RowLayout::of(k_dtype, head_dim), RowLayout::of(v_dtype, v_head_dim)]
    }

    /// Where the headers of keys and values begin in a shard's buffers, in words: behind the numbers of all rows.
    pub(crate) fn headers_at(&self, shard: u32) -> [u32; 2] {
        let rows = u64::from(self.pages_of(shard)) * self.rows_per_page();
        self.rows().map(|row| (rows * u64::from(row.words)) as u32)
    }

    /// Bytes of a shard's buffers of keys and values.
    pub(crate) fn shard_bytes(&self, shard: u32) -> [u64; 2] {
        let rows = u64::from(self.pages_of(shard)) * self.rows_per_page();
        self.rows().map(|row| buffer_bytes(row, rows))
    }

    /// The parts of a page of keys (0) or values (1) in its shard's buffer, one for each KV head, as offset and size in bytes: of its
    /// numbers (plane 0), or of its headers (plane 1), of which there may be none.
    pub(crate) fn parts(
        &self,
        page: u32,
        side: usize,
        plane: usize,
    ) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (shard, local) = (page / self.pool.pages_per_shard, page % self.pool.pages_per_shard);
        let row = self.rows()[side];
        let (at, words) = match plane {
            0 => (0, row.words),
            _ => (u64::from(self.headers_at(shard)[side]) * 4, row.headers),
        };
        let size = u64::from(self.pool.page) * u64::from(words) * 4;
        let pages = u64::from(self.pages_of(shard));
        let part = move |head: u32| (at + (u64::from(head) * pages + u64::from(local)) * size, size);
        (0..self.entry.kv_heads).map(part).filter(|(_, size)| *size > 0)
    }
}

/// The kinds of a model's layers, and the kind of each layer.
pub(crate) fn kinds_of(
    layers: &[&AttentionSpec],
    shape: PagedShape,
    caps: &Caps,
) -> Result<(Vec<Kind>, Vec<u32>), Error> {
    let PagedShape { sequences, page, tokens, longest_step } = shape;
    for (field, value) in [("sequences", sequences), ("tokens", tokens), ("longest_step", longest_step)] {
        if value == 0 {
            return Err(Error::field(field, value, "it must be at least 1"));
        }
    }
    if !page.is_power_of_two() || page > MAX_PAGE {
        return Err(Error::field("page", page, format!("it must be a power of two of at most {MAX_PAGE}")));
    }
    if layers.is_empty() {
        return Err(Error::field("layers", 0, "it must be at least 1"));
    }
    let pages = tokens.div_ceil(page);
    let (mut kinds, mut of_layers): (Vec<Kind>, Vec<u32>) = (Vec::new(), Vec::new());
    for spec in layers {
        let (entry, window) = (Entry::of(spec), spec.window_left());
        let known = kinds.iter().position(|kind| kind.entry == entry && kind.window == window);
        let kind = match known {
            Some(kind) => kind,
            None => {
                // What a sequence keeps may begin and end within pages.
                let kept = |window: u32| {
                    let slots = u64::from(window) + u64::from(longest_step);
                    (slots.div_ceil(u64::from(page)) + 1).saturating_mul(u64::from(sequences))
                };
                let pages = window.map_or(pages, |window| kept(window).min(u64::from(pages)) as u32);
                kinds.push(kind(entry, window, (page, pages), caps)?);
                kinds.len() - 1
            }
        };
        of_layers.push(kind as u32);
    }
    Ok((kinds, of_layers))
}

/// Bytes of a buffer of `rows` rows: kernels may read headers as parts of units of 16 bytes, so the last unit is whole.
fn buffer_bytes(row: RowLayout, rows: u64) -> u64 {
    let bytes = u128::from(rows) * u128::from(row.bytes());
    let whole = if row.headers > 0 { bytes.next_multiple_of(16) } else { bytes };
    u64::try_from(whole).unwrap_or(u64::MAX)
}

/// Slots of a page at most: more is a contiguous cache.
const MAX_PAGE: u32 = 1 << 16;

/// A kind whose layers are cut into shards that a binding can hold.
pub(crate) fn kind(
    entry: Entry,
    window: Option<u32>,
    (page, pages): (u32, u32),
    caps: &Caps,
) -> Result<Kind, Error> {
    let pool = PoolShape { page, pages, pages_per_shard: pages, window };
    let kind = Kind { entry, window, pool };
    let needed =
        kind.rows().map(|row| buffer_bytes(row, kind.rows_per_page())).into_iter().max().unwrap_or(0);
    let limits = [
        ("max_storage_buffer_binding_size", caps.binding_size),
        ("max_buffer_size", caps.buffer_size),
        // Shader indices are u32 and count words.
        ("32-bit index", u64::from(u32::MAX) * 4),
    ];
    if let Some((limit, found)) = limits.into_iter().find(|(_, found)| needed > *found) {
        return Err(Error::Limit {
            what: format!("K or V of one page of {page} tokens in one layer"),
            limit,
            needed,
            found,
            hint: "use a paged cache, a smaller capacity or a smaller kv_dtype, or request a higher limit from the adapter",
        });
    }
    let room = limits.map(|(_, found)| found).into_iter().min().unwrap_or(needed);
    // Row numbers are u32, too.
    let rows = u64::from(u32::MAX) / kind.rows_per_page().max(1);
    let per_shard = (room / needed.max(1)).min(rows).clamp(1, u64::from(pages.max(1))) as u32;
    Ok(Kind { pool: PoolShape { pages_per_shard: per_shard, ..pool }, ..kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_with_headers_are_whole_units() {
        let row = |dtype| RowLayout::of(dtype, 32);
        // 8 words and a header.
        assert_eq!([1, 3, 4].map(|rows| buffer_bytes(row(Dtype::Q8), rows)), [48, 112, 144]);
        assert_eq!(buffer_bytes(RowLayout::of(Dtype::F16, 4), 3), 24);
        assert_eq!(buffer_bytes(row(Dtype::Q8), u64::MAX), u64::MAX);
    }
}
