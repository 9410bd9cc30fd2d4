// Appends values, which the cache has apart from keys.

@group(0) @binding(4) var<storage, read_write> v_cache: array<u32>;

fn append_values(item: AppendItem, kv_head: u32, thread: u32) {
    let cache_row = item.cache_row + kv_head * work.params.slots + item.slot;
    for (var i = thread; i < item.tokens * V_WORDS; i += THREADS) {
        let token = i / V_WORDS;
        let element = (i % V_WORDS) * PER_WORD;
        let source = work.params.out_offset + (item.token + token) * work.params.out_token
            + kv_head * work.params.out_head;
        var x = vec2(0.0);
        for (var e = 0u; e < PER_WORD; e++) {
            if element + e < V_HEAD_DIM {
                x[e] = load_new_v(source + element + e);
            }
        }
        v_cache[(cache_row + token) * V_WORDS + i % V_WORDS] = encode_word(x);
    }
}
