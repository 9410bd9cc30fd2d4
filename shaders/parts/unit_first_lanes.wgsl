// Which unit of 8 neighbours a lane loads, for units of 16 bytes: lanes 0 and 1 take the first of either cache line, 0 and 4.
//
// Mesa's 64-bit loads of the other lanes become masked ones (AVX-512), which no prefetcher of AMD's follows: with lines first touched by them
// decode waited for memory most of the time (11 ms for 3).

fn unit_of(lane: u32) -> u32 {
    return select(select(lane - u32(lane < 5u), 4u, lane == 1u), 0u, lane == 0u);
}
