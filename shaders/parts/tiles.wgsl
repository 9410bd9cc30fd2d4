// The map of an item: two bits for each MAP_KEYS keys, MAP_TILES of them in a word, for each KV head.

const SKIP: u32 = 0u;
const PARTIAL: u32 = 1u;
const FULL: u32 = 2u;

fn map_tiles(item: WorkItem) -> u32 {
    return (item.key_end - item.key_begin + MAP_KEYS - 1u) / MAP_KEYS;
}

fn map_word(item: WorkItem, kv_head: u32, tile: u32) -> u32 {
    let words = (map_tiles(item) + MAP_TILES - 1u) / MAP_TILES;
    return work.params.maps + item.map + kv_head * words + tile / MAP_TILES;
}
