// Which unit of LANES neighbours a lane loads: they take turns.

fn unit_of(lane: u32) -> u32 {
    return lane;
}
