// Schedule: turns lengths that live on the GPU into the work lists of a step and the arguments of its dispatches.
//   chunk = keys of all tiles / workgroups that fill the device;  a tile of n keys becomes ceil(n / chunk) items, of whole steps
// One workgroup does it all. Each invocation has a span of tiles: it counts their keys, then their items, and a running sum over
// invocations says where it writes.
//
// Bindings: 0 what stays the same (head, tiles, patches), 1 lengths, 2 the step's work lists, 3 its words, 4 dispatch arguments.
// Prelude: THREADS, KV_HEADS, GROUP, CAUSAL, WINDOW_LEFT, WINDOW_RIGHT, ALWAYS_MERGED (rotated outputs are finished by `combine`).

struct LoopHead {
    tiles: u32,
    patches: u32,
    sequences: u32,
    // Least and most keys of a chunk, what its keys are a multiple of (a power of two), and how many chunks fill the device.
    least_chunk: u32,
    most_chunk: u32,
    chunk_step: u32,
    fill: u32,
    // Where the lists of items and of tiles to be merged begin, in words; their first word is the number of items.
    items: u32,
    merges: u32,
    // Words of their heads.
    head_words: u32,
    // Where parts begin among the step's words.
    parts: u32,
    // First words of the entries: tiles, patches, sequences.
    tiles_at: u32,
    patches_at: u32,
    sequences_at: u32,
}

struct LoopInput {
    head: LoopHead,
    entries: array<u32>,
}

@group(0) @binding(0) var<storage, read> input: LoopInput;
@group(0) @binding(1) var<storage, read_write> lengths: array<u32>;
@group(0) @binding(2) var<storage, read_write> lists: array<u32>;
@group(0) @binding(3) var<storage, read_write> words: array<u32>;
@group(0) @binding(4) var<storage, read_write> arguments: array<u32>;

// Items, rows of states, merges: of an invocation's tiles.
var<workgroup> counts: array<vec3<u32>, THREADS>;
var<workgroup> keys_of: array<u32, THREADS>;

struct LoopTile {
    sequence: u32,
    token: u32,
    row_begin: u32,
    row_end: u32,
    pages: u32,
}

fn tile_at(nth: u32) -> LoopTile {
    let at = input.head.tiles_at + nth * 5u;
    return LoopTile(
        input.entries[at], input.entries[at + 1u], input.entries[at + 2u], input.entries[at + 3u], input.entries[at + 4u],
    );
}

// A field of `LoopSequence`.
fn of_sequence(sequence: u32, field: u32) -> u32 {
    return input.entries[input.head.sequences_at + sequence * 5u + field];
}

// Tokens before the step, between what was there and what is reserved: what lies on the GPU is nobody's promise.
fn length_of(sequence: u32) -> u32 {
    return clamp(lengths[sequence], of_sequence(sequence, 0u), of_sequence(sequence, 1u));
}

fn new_len(sequence: u32) -> u32 {
    return of_sequence(sequence, 2u);
}

fn q_start(sequence: u32) -> i32 {
    return i32(length_of(sequence) + new_len(sequence)) - i32(of_sequence(sequence, 3u));
}

// Keys that the rows of a tile see, from x to y.
fn keys_seen(tile: LoopTile) -> vec2<u32> {
    let len = i32(length_of(tile.sequence) + new_len(tile.sequence));
    let first = q_start(tile.sequence) + i32(tile.row_begin / GROUP);
    let last = q_start(tile.sequence) + i32((tile.row_end - 1u) / GROUP);
    var end = len;
    if CAUSAL {
        end = min(end, last + 1);
    }
    if WINDOW_RIGHT >= 0 {
        end = min(end, last + WINDOW_RIGHT + 1);
    }
    end = max(end, 0);
    var begin = i32(of_sequence(tile.sequence, 4u));
    if WINDOW_LEFT >= 0 {
        begin = max(begin, first - WINDOW_LEFT);
    }
    return vec2(u32(min(begin, end)), u32(end));
}

// Keys of each chunk of a tile's: of equal length, in whole steps. At least 1.
fn even_chunk(keys: vec2<u32>, chunk: u32) -> u32 {
    let len = max(keys.y - keys.x, 1u);
    let even = ceiling(len, ceiling(len, chunk));
    let mask = input.head.chunk_step - 1u;
    return (even + mask) & ~mask;
}

fn chunks_of(keys: vec2<u32>, even: u32) -> u32 {
    return max(ceiling(keys.y - keys.x, even), 1u);
}

fn ceiling(x: u32, y: u32) -> u32 {
    return (x + y - 1u) / y;
}

fn is_merged(chunks: u32) -> bool {
    return ALWAYS_MERGED || chunks > 1u;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) thread: u32) {
    let head = input.head;
    let each = ceiling(head.tiles, THREADS);
    let first = min(thread * each, head.tiles);
    let last = min(first + each, head.tiles);

    var keys = 0u;
    for (var t = first; t < last; t++) {
        let seen = keys_seen(tile_at(t));
        keys += seen.y - seen.x;
    }
    keys_of[thread] = keys;
    // Every invocation's keys are there.
    workgroupBarrier();
    var all = 0u;
    for (var i = 0u; i < THREADS; i++) {
        all += keys_of[i];
    }
    let chunk = clamp(ceiling(all, head.fill), head.least_chunk, head.most_chunk);

    var count = vec3(0u);
    for (var t = first; t < last; t++) {
        let tile = tile_at(t);
        let seen = keys_seen(tile);
        let chunks = chunks_of(seen, even_chunk(seen, chunk));
        count.x += chunks;
        if is_merged(chunks) {
            count += vec3(0u, chunks * KV_HEADS * (tile.row_end - tile.row_begin), 1u);
        }
    }
    counts[thread] = count;
    // Every invocation's counts are there.
    workgroupBarrier();
    var at = vec3(0u);
    for (var i = 0u; i < thread; i++) {
        at += counts[i];
    }
    for (var t = first; t < last; t++) {
        at += write_tile(tile_at(t), chunk, at);
    }
    if thread == THREADS - 1u {
        finish_lists(at.x, at.z);
    }
    for (var i = thread; i < head.patches; i += THREADS) {
        let patch_at = head.patches_at + i * 3u;
        lists[input.entries[patch_at]] = length_of(input.entries[patch_at + 1u]) + input.entries[patch_at + 2u];
    }
    // All have read the lengths.
    storageBarrier();
    for (var s = thread; s < head.sequences; s += THREADS) {
        lengths[s] = length_of(s) + new_len(s);
    }
}

// Writes the items of a tile, and what merges them; returns how far each list has grown.
fn write_tile(tile: LoopTile, chunk: u32, at: vec3<u32>) -> vec3<u32> {
    let head = input.head;
    let seen = keys_seen(tile);
    let even = even_chunk(seen, chunk);
    let chunks = chunks_of(seen, even);
    let rows = tile.row_end - tile.row_begin;
    let merged = is_merged(chunks);
    for (var i = 0u; i < chunks; i++) {
        let state = at.y + i * KV_HEADS * rows - tile.row_begin;
        let item = WorkItem(
            tile.token, tile.row_begin, tile.row_end, min(seen.x + i * even, seen.y), min(seen.x + (i + 1u) * even, seen.y),
            q_start(tile.sequence), tile.pages, state, select(WHOLE, rows, merged), 0u, 0u, 0u, 0u, i32(-2147483647), 0u, NO_LIST,
        );
        write_item(head.items + head.head_words + (at.x + i) * ITEM_WORDS, item);
        words[head.parts + (at.x + i) * 2u] = state;
        words[head.parts + (at.x + i) * 2u + 1u] = rows;
    }
    if !merged {
        return vec3(chunks, 0u, 0u);
    }
    let merge = head.merges + head.head_words + at.z * 5u;
    lists[merge] = tile.token;
    lists[merge + 1u] = tile.row_begin;
    lists[merge + 2u] = tile.row_end;
    lists[merge + 3u] = head.parts + at.x * 2u;
    lists[merge + 4u] = chunks;
    return vec3(chunks, chunks * KV_HEADS * rows, 1u);
}

const ITEM_WORDS: u32 = 16u;

fn write_item(at: u32, item: WorkItem) {
    lists[at] = item.token;
    lists[at + 1u] = item.row_begin;
    lists[at + 2u] = item.row_end;
    lists[at + 3u] = item.key_begin;
    lists[at + 4u] = item.key_end;
    lists[at + 5u] = bitcast<u32>(item.q_start);
    lists[at + 6u] = item.pages;
    lists[at + 7u] = item.state;
    lists[at + 8u] = item.state_stride;
    lists[at + 9u] = item.origin;
    lists[at + 10u] = item.mask;
    lists[at + 11u] = item.mask_head;
    lists[at + 12u] = item.mask_token;
    lists[at + 13u] = bitcast<u32>(item.mask_key);
    lists[at + 14u] = item.map;
    lists[at + 15u] = item.list;
}

// Numbers of items, in the heads of the lists and in the dispatches: x and z hold items, or z tiles to be merged.
fn finish_lists(items: u32, merges: u32) {
    lists[input.head.items] = items;
    lists[input.head.merges] = merges;
    arguments[0] = min(items, MAX_WORKGROUPS);
    arguments[2] = ceiling(items, MAX_WORKGROUPS);
    arguments[5] = merges;
}
