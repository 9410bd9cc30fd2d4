// Called once for every four K or V values that are read: counts them, which proves how often the cache is read.

@group(0) @binding(9) var<storage, read_write> fetches: atomic<u32>;

fn fetched() {
    atomicAdd(&fetches, 1u);
}
