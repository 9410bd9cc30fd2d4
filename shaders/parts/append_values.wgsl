// Values of their own, appended like the keys; neither normalised nor turned.

@group(0) @binding(4) var<storage, read_write> v_cache: array<u32>;

fn append_values(item: AppendItem, kv_head: u32, thread: u32) {
    let params = work.params;
    // The keys that were staged are stored.
    workgroupBarrier();
    for (var i = thread; i < item.tokens * V_PITCH; i += THREADS) {
        let token = i / V_PITCH;
        let element = i % V_PITCH;
        var x = 0.0;
        if element < V_HEAD_DIM {
            x = load_new_v(params.out_offset + (item.token + token) * params.out_token + kv_head * params.out_head + element);
        }
        rows[i] = x;
    }
    // The rows are whole.
    workgroupBarrier();
    rotate_rows(item.tokens, V_PITCH, V_HEAD_DIM, thread);
    for (var i = thread; i < item.tokens * V_UNITS; i += THREADS) {
        let token = i / V_UNITS;
        let unit = i % V_UNITS;
        store_v(slot_row(item, kv_head, token), token * V_PITCH, unit);
    }
}

// A unit of a value whose elements are staged from `first` on.
fn store_v(row: u32, first: u32, unit: u32) {
    if V_BLOCK == 1u {
        v_cache[row * V_WORDS + unit] = encode_word(V_FORMAT, first + unit * V_PER_UNIT);
        return;
    }
    let at = first + unit * V_PER_UNIT;
    let header = measure_block(at, min(V_PER_UNIT, V_HEAD_DIM - unit * V_PER_UNIT), V_BITS);
    v_cache[work.params.v_headers + row * V_UNITS + unit] = header;
    for (var word = 0u; word < min(V_BITS, V_WORDS - unit * V_BITS); word++) {
        v_cache[row * V_WORDS + unit * V_BITS + word] = block_word(at + word * (32u / V_BITS), header, V_BITS);
    }
}
