// Append: writes new keys and values into the cache: keys normalised and turned to their positions, both rotated where the spec asks
// for it, converted to the cache's storage types, the padding of their rows zeroed.
// Workgroup (x, z: run of tokens, y: KV head). A run's rows are staged in workgroup memory; then an invocation stores whole units,
// a word or a block with its header, so no word is shared.
//
// Linked as `embed`, the same brings queries into the form of a rotated cache: the heads are query heads, the cache is a buffer of
// f32 rows (parts/slot_flat.wgsl).
//
// Bindings: 0 work list, 1 new keys, 2 new values, 3 keys, 4 values of the cache, 7 words, 8 table.
// Prelude: THREADS, ROWS (tokens of a run), K_FORMAT and the like (parts/encode_rows.wgsl), K_PITCH (elements of a staged row).
// Parts: `turned` is an element of a new key at its position, `slot_row` its row in the cache.

struct AppendItem {
    token: u32,
    tokens: u32,
    slot: u32,
    position: i32,
    pages: u32,
}

struct AppendWork {
    params: Params,
    items: array<AppendItem>,
}

@group(0) @binding(0) var<storage, read> work: AppendWork;
@group(0) @binding(3) var<storage, read_write> k_cache: array<u32>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;
    let params = work.params;
    let first = params.q_offset + item.token * params.q_token + kv_head * params.q_head;

    if NORM {
        for (var token = thread; token < item.tokens; token += THREADS) {
            measure(token, first + token * params.q_token);
        }
        norms_measured();
    }
    for (var i = thread; i < item.tokens * K_PITCH; i += THREADS) {
        let token = i / K_PITCH;
        let element = i % K_PITCH;
        var x = 0.0;
        if element < HEAD_DIM {
            x = turned(first + token * params.q_token, element, item.position + i32(token)) * norm_of(token);
        }
        rows[i] = x;
    }
    // The rows are whole.
    workgroupBarrier();
    rotate_rows(item.tokens, K_PITCH, HEAD_DIM, thread);
    for (var i = thread; i < item.tokens * K_UNITS; i += THREADS) {
        let token = i / K_UNITS;
        let unit = i % K_UNITS;
        store_k(slot_row(item, kv_head, token), token * K_PITCH, unit);
    }
    append_values(item, kv_head, thread);
}

// A unit of a key whose elements are staged from `first` on.
fn store_k(row: u32, first: u32, unit: u32) {
    if K_BLOCK == 1u {
        k_cache[row * K_WORDS + unit] = encode_word(K_FORMAT, first + unit * K_PER_UNIT);
        return;
    }
    let at = first + unit * K_PER_UNIT;
    let header = measure_block(at, min(K_PER_UNIT, HEAD_DIM - unit * K_PER_UNIT), K_BITS);
    k_cache[work.params.k_headers + row * K_UNITS + unit] = header;
    for (var word = 0u; word < min(K_BITS, K_WORDS - unit * K_BITS); word++) {
        k_cache[row * K_WORDS + unit * K_BITS + word] = block_word(at + word * (32u / K_BITS), header, K_BITS);
    }
}
