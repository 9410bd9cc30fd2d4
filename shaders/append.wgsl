// Append: writes new keys and values into the cache: keys normalised and turned to their positions, both converted to the
// cache's storage type, the padding of their rows zeroed.
// Workgroup (x, z: run of tokens, y: KV head); an invocation writes whole words, so none is shared. Barrier: in `norm_rms`.
//
// Bindings: 0 work list, 1 new keys, 2 new values, 3 keys, 4 values of the cache, 8 table.
// Prelude: THREADS, ROWS (tokens of a run), K_WORDS and V_WORDS (32-bit words of a row). Parts: `turned` is an element of a new
// key at its position, `encode_word` makes a word of the cache.

struct AppendItem {
    token: u32,
    tokens: u32,
    slot: u32,
    position: i32,
    cache_row: u32,
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
    let cache_row = item.cache_row + kv_head * params.slots + item.slot;
    let first = params.q_offset + item.token * params.q_token + kv_head * params.q_head;

    if NORM {
        for (var token = thread; token < item.tokens; token += THREADS) {
            measure(token, first + token * params.q_token);
        }
        norms_measured();
    }
    for (var i = thread; i < item.tokens * K_WORDS; i += THREADS) {
        let token = i / K_WORDS;
        let element = (i % K_WORDS) * PER_WORD;
        let source = first + token * params.q_token;
        var x = vec2(0.0);
        for (var e = 0u; e < PER_WORD; e++) {
            if element + e < HEAD_DIM {
                x[e] = turned(source, element + e, item.position + i32(token)) * norm_of(token);
            }
        }
        k_cache[(cache_row + token) * K_WORDS + i % K_WORDS] = encode_word(x);
    }
    append_values(item, kv_head, thread);
}
