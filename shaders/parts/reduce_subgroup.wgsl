// Adds up the dot products of a team by shuffles. Needs subgroups of a multiple of 8 lanes; an invocation is numbered by its
// place in its subgroup, because local_invocation_index need not follow the lanes.

struct Invocation {
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
}

fn thread_index(invocation: Invocation) -> u32 {
    return invocation.subgroup * invocation.size + invocation.lane;
}

fn team_scores(item: WorkItem, at: Score, dots: ptr<function, array<f32, ROWS>>) {
    let team = at.thread / TEAM;
    let key = at.tile + at.pass_key + team;
    for (var r = 0u; r < ROWS; r++) {
        var sum = (*dots)[r];
        sum += subgroupShuffleXor(sum, 1u);
        sum += subgroupShuffleXor(sum, 2u);
        sum += subgroupShuffleXor(sum, 4u);
        if at.thread % TEAM == r % TEAM {
            let row = row_of(item, at.kv_head, item.row_begin + r);
            scores[r * KEYS + at.pass_key + team] = logit(sum, row, key, at.kind);
        }
    }
}
