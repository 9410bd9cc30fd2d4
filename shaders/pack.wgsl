// Pack: brings a caller's dense mask into the step's own form, for every layer: a bit a key, or a logit in base 2 a key.
// An invocation makes whole words, so none is shared and there is no barrier. Invocations of the x dimension share out the words
// of one sequence; y, z: sequence.
//
// Bindings: 0 work list, 1 the mask, 7 the step's words. Prelude: THREADS, MAX_WORKGROUPS, KEYS (keys of a word).
// Part: `pack_word` (pack_keep, pack_add) makes a word of some keys.

struct PackItem {
    // First word, and words of a query token.
    word: u32,
    pitch: u32,
    // Planes: 1 where heads share one.
    heads: u32,
    q_len: u32,
    kv_len: u32,
    // First element in the caller's mask.
    source: u32,
}

struct PackHead {
    items: u32,
    head_stride: u32,
    token_stride: u32,
    key_stride: u32,
}

struct PackWork {
    head: PackHead,
    items: array<PackItem>,
}

@group(0) @binding(0) var<storage, read> work: PackWork;
@group(0) @binding(7) var<storage, read_write> words: array<u32>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = workgroup.y + workgroup.z * MAX_WORKGROUPS;
    if index >= work.head.items {
        return;
    }
    let item = work.items[index];
    let count = item.heads * item.q_len * item.pitch;
    for (var i = workgroup.x * THREADS + thread; i < count; i += workgroups.x * THREADS) {
        let row = i / item.pitch;
        let key = i % item.pitch * KEYS;
        let source = item.source + row / item.q_len * work.head.head_stride + row % item.q_len * work.head.token_stride
            + key * work.head.key_stride;
        words[item.word + i] = pack_word(source, min(KEYS, item.kv_len - key));
    }
}
