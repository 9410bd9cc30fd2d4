//! Structs that cross to the GPU. Each exists once here and once in `shaders/parts/*.wgsl`; a naga test compares the two.

use bytemuck::{Pod, Zeroable};

/// The [`WorkItem::state_stride`] of an item whose rows need no [`CombineItem`]: it writes the output itself.
pub const WHOLE: u32 = 0;
/// The [`WorkItem::list`] of an item whose rows are of one sequence.
pub const NO_LIST: u32 = u32::MAX;
/// Words of a token in the list of an item whose rows are of several sequences: token, place, position that it turns to.
pub const LIST_WORDS: u32 = 3;
/// Words of a part of a [`CombineItem`]: base and stride of its states.
pub const PART_WORDS: u32 = 2;

/// Keys of a tile in the map of a dense mask, and of the tiles of kernels that stage keys: each asks for one kind.
pub const MAP_KEYS: u32 = 32;
/// Tiles whose kinds share a word of the map.
pub const MAP_TILES: u32 = 16;

/// What all items of a step share: the head of every work list. `Params` in `shaders/parts/params.wgsl`.
///
/// Offsets and strides are in elements of the tensor that they name.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct Params {
    /// Items that follow.
    pub items: u32,
    /// Slots of a page.
    pub slots: u32,
    /// A slot's bits that tell its page begin here; 31 where a page is a whole sequence.
    pub page_shift: u32,
    /// The other bits of a slot: its place in the page.
    pub page_mask: u32,
    /// Pages of the shard: as many rows as they have lie from one KV head to the next.
    pub pages: u32,
    /// Where the headers of keys begin in their buffer, in words.
    pub k_headers: u32,
    /// Where the headers of values begin in theirs.
    pub v_headers: u32,
    /// 1 where the LSE is wanted.
    pub lse: u32,
    /// First element of the queries (new keys in `append`).
    pub q_offset: u32,
    /// Between tokens of the queries (new keys in `append`).
    pub q_token: u32,
    /// Between heads of the queries (new keys in `append`).
    pub q_head: u32,
    /// First element of the output (new values in `append`).
    pub out_offset: u32,
    /// Between tokens of the output (new values in `append`).
    pub out_token: u32,
    /// Between heads of the output (new values in `append`).
    pub out_head: u32,
    /// First element of the LSE.
    pub lse_offset: u32,
    /// Between tokens of the LSE.
    pub lse_token: u32,
    /// Between heads of the LSE.
    pub lse_head: u32,
    /// Where the maps begin in the step's words.
    pub maps: u32,
    /// Query tokens of the step.
    pub tokens: u32,
    /// Always 0, which compilers do not know: what it is added to, or joined with, they can neither foresee nor narrow.
    pub zero: u32,
}

/// A tile of rows and a chunk of keys of one sequence, for every KV head: what one workgroup walks.
/// `WorkItem` in `shaders/parts/item.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct WorkItem {
    /// The sequence's first token in the queries and the output.
    pub token: u32,
    /// First row of the tile; row `r` is token `r / group`, head `r % group` of the KV head's group.
    pub row_begin: u32,
    /// Past the last row.
    pub row_end: u32,
    /// First key of the chunk.
    pub key_begin: u32,
    /// Past the last key.
    pub key_end: u32,
    /// Position of the sequence's first query among its keys; negative where queries outnumber keys.
    pub q_start: i32,
    /// The sequence's page table in the step's words, less the pages that it no longer has in front (modulo 2^32).
    pub pages: u32,
    /// Row of the state buffer where the state of row 0 of KV head 0 would go (modulo 2^32).
    pub state: u32,
    /// Rows of the state buffer from a KV head to the next, or [`WHOLE`].
    pub state_stride: u32,
    /// Position in the sequence of key 0: more than 0 in a document that is not the first.
    pub origin: u32,
    /// First word of its mask in the step's words.
    pub mask: u32,
    /// Words of the mask from a query head to the next; 0 where heads share it.
    pub mask_head: u32,
    /// Words of the mask from a query token to the next; 0 where it has none.
    pub mask_token: u32,
    /// The mask's column of key 0.
    pub mask_key: i32,
    /// First word of its map, from [`Params::maps`] on.
    pub map: u32,
    /// Where its rows are of several sequences, the list of their tokens in the step's words, else [`NO_LIST`].
    pub list: u32,
}

/// A tile of rows whose parts are to be merged, for every KV head. `CombineItem` in `shaders/parts/merge_states.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct CombineItem {
    /// The sequence's first token in the output.
    pub token: u32,
    /// First row of the tile.
    pub row_begin: u32,
    /// Past the last row.
    pub row_end: u32,
    /// First word of the parts: base and stride of each, as [`WorkItem::state`] and [`WorkItem::state_stride`].
    pub parts: u32,
    /// Parts.
    pub count: u32,
}

/// A run of new tokens of one sequence. `AppendItem` in `shaders/append.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct AppendItem {
    /// First token of the run in the new keys and values.
    pub token: u32,
    /// Tokens of the run.
    pub tokens: u32,
    /// Place of the first in the sequence.
    pub slot: u32,
    /// Position that the first is turned to.
    pub position: i32,
    /// The sequence's page table, as [`WorkItem::pages`].
    pub pages: u32,
}

/// Head of the work list of `pack`: strides of the caller's mask, in elements. `PackHead` in `shaders/pack.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct PackHead {
    /// Items that follow.
    pub items: u32,
    /// Between query heads.
    pub head_stride: u32,
    /// Between query tokens.
    pub token_stride: u32,
    /// Between keys.
    pub key_stride: u32,
}

/// The mask of one sequence. `PackItem` in `shaders/pack.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct PackItem {
    /// First word in the step's words.
    pub word: u32,
    /// Words of a query token.
    pub pitch: u32,
    /// Planes: 1 where heads share one.
    pub heads: u32,
    /// Query tokens: 1 where they share a row.
    pub q_len: u32,
    /// Keys.
    pub kv_len: u32,
    /// First element in the caller's mask.
    pub source: u32,
}

/// Head of what `schedule` reads. `LoopHead` in `shaders/schedule.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct LoopHead {
    /// Tiles of rows.
    pub tiles: u32,
    /// Patches.
    pub patches: u32,
    /// Sequences.
    pub sequences: u32,
    /// Least keys of a chunk.
    pub least_chunk: u32,
    /// Most keys of a chunk.
    pub most_chunk: u32,
    /// What the keys of a chunk are a multiple of, but for the last.
    pub chunk_step: u32,
    /// Chunks that fill the device.
    pub fill: u32,
    /// First word of the list of items.
    pub items: u32,
    /// First word of the list of tiles to be merged.
    pub merges: u32,
    /// Words of the heads of both.
    pub head_words: u32,
    /// First word of the parts among the step's words.
    pub parts: u32,
    /// First word of the [`LoopTile`]s behind this head.
    pub tiles_at: u32,
    /// First word of the [`LoopPatch`]es.
    pub patches_at: u32,
    /// First word of the [`LoopSequence`]s.
    pub sequences_at: u32,
}

/// A tile of rows of a loop. Read as five words by `shaders/schedule.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct LoopTile {
    /// Which sequence of the batch.
    pub sequence: u32,
    /// As [`WorkItem::token`].
    pub token: u32,
    /// First row.
    pub row_begin: u32,
    /// Past the last row.
    pub row_end: u32,
    /// As [`WorkItem::pages`].
    pub pages: u32,
}

/// A word of the work lists that is a sequence's length and something. Read as three words by `shaders/schedule.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct LoopPatch {
    /// Which word.
    pub word: u32,
    /// Which sequence of the batch.
    pub sequence: u32,
    /// What is added to its length, modulo 2^32.
    pub add: u32,
}

/// A sequence of a loop. Read as five words by `shaders/schedule.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct LoopSequence {
    /// Its length when the loop was prepared, and the least that counts: pages in front may be shared with forks, or given back.
    pub least: u32,
    /// Tokens that it may have before a step.
    pub room: u32,
    /// New tokens of a step.
    pub new_len: u32,
    /// Query tokens of a step.
    pub q_len: u32,
    /// Tokens before this one were evicted.
    pub begin: u32,
}

/// Head of the work list of `backward_store`. `StoreHead` in `shaders/backward_store.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct StoreHead {
    /// Items that follow.
    pub items: u32,
    /// Elements of a head.
    pub dim: u32,
    /// Elements of the rows of f32 from a token to the next.
    pub token: u32,
    /// From a head to the next.
    pub head: u32,
    /// In front of the first.
    pub first: u32,
    /// 1 where gradients turn back.
    pub turns: u32,
    /// First element of the caller's tensor.
    pub out_offset: u32,
    /// Its elements from a token to the next.
    pub out_token: u32,
    /// From a head to the next.
    pub out_head: u32,
}

/// A run of tokens whose gradients are stored. `StoreItem` in `shaders/backward_store.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct StoreItem {
    /// The first token.
    pub token: u32,
    /// Tokens.
    pub tokens: u32,
    /// Position that the first was turned to; the others follow.
    pub position: i32,
}
