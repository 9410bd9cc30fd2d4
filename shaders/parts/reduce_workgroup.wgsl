// Adds up the dot products of a team through workgroup memory.

struct Invocation {
    @builtin(local_invocation_index) index: u32,
}

fn thread_index(invocation: Invocation) -> u32 {
    return invocation.index;
}

var<workgroup> team_dots: array<f32, ROWS * THREADS>;

fn team_scores(item: WorkItem, at: Score, dots: ptr<function, array<f32, ROWS>>) {
    for (var r = 0u; r < ROWS; r++) {
        team_dots[r * THREADS + at.thread] = (*dots)[r];
    }
    // Every invocation's share of every row is there.
    workgroupBarrier();
    for (var i = at.thread; i < ROWS * TEAMS; i += THREADS) {
        let r = i / TEAMS;
        let t = i % TEAMS;
        var sum = 0.0;
        for (var l = 0u; l < TEAM; l++) {
            sum += team_dots[r * THREADS + t * TEAM + l];
        }
        let key = at.tile + at.pass_key + t;
        let row = row_of(item, at.kv_head, item.row_begin + r);
        scores[r * KEYS + at.pass_key + t] = logit(sum, row, key, at.kind);
    }
    // The next pass overwrites the shares.
    workgroupBarrier();
}
