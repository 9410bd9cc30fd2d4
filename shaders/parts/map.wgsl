// The map that `classify` has made of a dense mask: what a tile is, so that one which nothing sees is not read.

fn tile_kind(item: WorkItem, kv_head: u32, key: u32) -> u32 {
    let tile = (key - item.key_begin) / MAP_KEYS;
    let word = words[map_word(item, kv_head, tile)];
    return (word >> (tile % MAP_TILES * 2u)) & 3u;
}
