// Which unit of LANES neighbours a lane loads: they take turns.

const UNIT_OF = array(0u, 1u, 2u, 3u, 4u, 5u, 6u, 7u);

fn unit_of(lane: u32) -> u32 {
    return lane;
}
