// Append: writes new keys and values into the cache, converting to its storage type, and zeroes the padding of their rows.
// Workgroup (x, z: run of tokens, y: KV head); an invocation writes whole words, so none is shared and there is no barrier.
//
// Bindings: 0 work list, 1 new keys, 2 new values, 3 keys, 4 values of the cache.
// Prelude: THREADS, K_WORDS and V_WORDS (32-bit words of a row). Part: `encode_word` makes a word of the cache.

struct AppendItem {
    token: u32,
    tokens: u32,
    position: u32,
    cache_row: u32,
}

struct AppendWork {
    params: Params,
    items: array<AppendItem>,
}

@group(0) @binding(0) var<storage, read> work: AppendWork;
@group(0) @binding(3) var<storage, read_write> k_cache: array<u32>;
@group(0) @binding(4) var<storage, read_write> v_cache: array<u32>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;
    let params = work.params;
    let cache_row = item.cache_row + kv_head * params.slots + item.position;

    for (var i = thread; i < item.tokens * K_WORDS; i += THREADS) {
        let token = i / K_WORDS;
        let element = (i % K_WORDS) * PER_WORD;
        let source = params.q_offset + (item.token + token) * params.q_token + kv_head * params.q_head;
        var x = vec2(0.0);
        for (var e = 0u; e < PER_WORD; e++) {
            if element + e < HEAD_DIM {
                x[e] = load_new_k(source + element + e);
            }
        }
        k_cache[(cache_row + token) * K_WORDS + i % K_WORDS] = encode_word(x);
    }
    for (var i = thread; i < item.tokens * V_WORDS; i += THREADS) {
        let token = i / V_WORDS;
        let element = (i % V_WORDS) * PER_WORD;
        let source = params.out_offset + (item.token + token) * params.out_token + kv_head * params.out_head;
        var x = vec2(0.0);
        for (var e = 0u; e < PER_WORD; e++) {
            if element + e < V_HEAD_DIM {
                x[e] = load_new_v(source + element + e);
            }
        }
        v_cache[(cache_row + token) * V_WORDS + i % V_WORDS] = encode_word(x);
    }
}
