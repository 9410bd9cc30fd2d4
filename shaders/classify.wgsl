// Classify: makes the map of an item from the packed mask: what each MAP_KEYS keys are to the rows of the tile.
//   all rows see all of them unchanged: full;  none sees any: skip;  else partial
// Workgroup (x, z: item, y: KV head); an invocation judges one tile at a time, sixteen meet in a word.
//
// Bindings: 0 the work list of the kernel that will use the map, 7 the step's words.
// Prelude: THREADS (a multiple of MAP_TILES), MAP_KEYS. Part: `judge` (judge_bits, judge_add).

@group(0) @binding(7) var<storage, read_write> words: array<u32>;

var<workgroup> kinds: array<u32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;
    let tiles = map_tiles(item);
    for (var first = 0u; first < tiles; first += THREADS) {
        let tile = first + thread;
        kinds[thread] = SKIP;
        if tile < tiles {
            let key = item.key_begin + tile * MAP_KEYS;
            let keys = min(MAP_KEYS, item.key_end - key);
            // Whether some row sees one of the keys, and whether some row does not see one unchanged.
            var seen = false;
            var changed = false;
            for (var row = item.row_begin; row < item.row_end; row++) {
                let place = item.mask + query_head(kv_head, row) * item.mask_head + row / GROUP * item.mask_token;
                let found = judge(place, u32(i32(key) + item.mask_key), keys);
                seen |= found.x;
                changed |= found.y;
            }
            kinds[thread] = select(SKIP, select(FULL, PARTIAL, changed), seen);
        }
        // The kinds of sixteen tiles are there.
        workgroupBarrier();
        if thread % MAP_TILES == 0u && tile < tiles {
            var word = 0u;
            for (var i = 0u; i < MAP_TILES; i++) {
                word |= kinds[thread + i] << (2u * i);
            }
            words[map_word(item, kv_head, tile)] = word;
        }
        // The next tiles overwrite them.
        workgroupBarrier();
    }
}
