// Which unit of 8 neighbours a lane loads where they are 64-bit numbers: of 16 bytes, lanes 0 and 1 take the first of either cache line,
// units 0 and 4. (Shorter ones share a line, wide ones are of adapters without masked loads: any order serves them.)
//
// LLVM 15 with AVX-512 makes masked loads of those of the other lanes. With lines first touched by them decode waited for memory most of
// the time on an EPYC (11 ms for 3): its prefetchers seem not to follow them.

const UNIT_OF = array(0u, 4u, 1u, 2u, 3u, 5u, 6u, 7u);

// The same for a lane that is known on the GPU only.
fn unit_of(lane: u32) -> u32 {
    return select(select(lane - u32(lane < 5u), 4u, lane == 1u), 0u, lane == 0u);
}
