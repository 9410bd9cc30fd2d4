//! Structs that cross to the GPU. Each exists once here and once in `shaders/parts/*.wgsl`; a naga test compares the two.

use bytemuck::{Pod, Zeroable};

/// Marks a [`WorkItem`] whose rows need no [`CombineItem`]: it writes the output itself.
pub const WHOLE: u32 = u32::MAX;

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
    /// Slots of a sequence in the cache: rows from one KV head to the next.
    pub slots: u32,
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
    /// Where the maps begin in the step's masks, in words.
    pub maps: u32,
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
    /// Keys of the sequence.
    pub kv_len: u32,
    /// Position of the sequence's first query among its keys; negative where queries outnumber keys.
    pub q_start: i32,
    /// The sequence's first row in the cache.
    pub cache_row: u32,
    /// Where the chunk's states go, in rows of the state buffer, or [`WHOLE`].
    pub state: u32,
    /// Position in the sequence of key 0: more than 0 in a document that is not the first.
    pub origin: u32,
    /// First word of its mask in the step's masks.
    pub mask: u32,
    /// Words of the mask from a query head to the next; 0 where heads share it.
    pub mask_head: u32,
    /// Words of the mask from a query token to the next; 0 where it has none.
    pub mask_token: u32,
    /// The mask's column of key 0.
    pub mask_key: i32,
    /// First word of its map, from [`Params::maps`] on.
    pub map: u32,
}

/// A tile of rows whose chunks are to be merged, for every KV head. `CombineItem` in `shaders/combine.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct CombineItem {
    /// The sequence's first token in the output.
    pub token: u32,
    /// First row of the tile.
    pub row_begin: u32,
    /// Past the last row.
    pub row_end: u32,
    /// The first chunk's states, in rows of the state buffer.
    pub state: u32,
    /// Chunks: each is `kv_heads * (row_end - row_begin)` rows behind the one before.
    pub chunks: u32,
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
    /// The sequence's first row in the cache.
    pub cache_row: u32,
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
    /// First word in the step's masks.
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
