// Products of 16 x 16 matrices by the matrix units of a subgroup (SPV_KHR_cooperative_matrix): f16 times f16, added up in f32.
//
// Matrices lie in workgroup memory in rows of whole groups of four; `Right` is the transpose of what lies there.

alias Half = f16;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

fn halves(x: vec4<f32>) -> vec4<f16> {
    return vec4<f16>(x);
}

struct Invocation {
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane: u32,
}

// Lanes of a subgroup follow each other, so those who share a row are neighbours in it.
fn thread_of(invocation: Invocation) -> u32 {
    return invocation.subgroup * invocation.lanes + invocation.lane;
}

fn shared_max(x: f32, thread: u32) -> f32 {
    let two = max(x, subgroupShuffleXor(x, 1u));
    return max(two, subgroupShuffleXor(two, 2u));
}

fn shared_sum(x: f32, thread: u32) -> f32 {
    let two = x + subgroupShuffleXor(x, 1u);
    return two + subgroupShuffleXor(two, 2u);
}

struct Team {
    nth: u32,
    count: u32,
}

fn team_of(invocation: Invocation) -> Team {
    return Team(invocation.subgroup, THREADS / invocation.lanes);
}

fn load_queries(at: u32, team: Team) -> Left {
    return coopLoadT<coop_mat16x16<f16, A>>(&staged[at], QUERIES_PITCH);
}

fn load_weights(at: u32, team: Team) -> Left {
    return coopLoadT<coop_mat16x16<f16, A>>(&weights[at], WEIGHTS_PITCH);
}

fn load_keys(at: u32) -> Right {
    return coopLoad<coop_mat16x16<f16, B>>(&staged[at], KEYS_PITCH);
}

fn load_values(at: u32) -> Right {
    return coopLoad<coop_mat16x16<f16, B>>(&staged[at], VALUES_PITCH);
}

fn load_sums(at: u32, team: Team) -> Sums {
    return coopLoadT<coop_mat16x16<f32, C>>(&logits[at], LOGITS_PITCH);
}

fn store_sums(at: u32, sums: Sums, team: Team) {
    coopStoreT(sums, &logits[at], LOGITS_PITCH);
}

fn product(left: Left, right: Right, sums: Sums, team: Team) -> Sums {
    return coopMultiplyAdd(left, right, sums);
}
