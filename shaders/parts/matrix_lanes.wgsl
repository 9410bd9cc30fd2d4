// The same products in plain arithmetic, where an adapter has no matrix units: slow, and there to prove the kernel right.
// Lane l has row l % 16 of the left matrix and, of that row of the sums, groups of four columns from l / 16 * FOURS on.

alias Half = f32;
alias Left = array<vec4<f32>, 4>;
alias Sums = array<vec4<f32>, FOURS>;

// Not rounded: what differs from the reference is the kernel's fault.
fn halves(x: vec4<f32>) -> vec4<f32> {
    return x;
}

// What lies in workgroup memory is read where it is used: nothing overwrites it before.
struct Right {
    at: u32,
    pitch: u32,
}

struct Invocation {
    @builtin(local_invocation_index) thread: u32,
}

fn thread_of(invocation: Invocation) -> u32 {
    return invocation.thread;
}

// What those who share a row have found.
var<workgroup> shares: array<f32, THREADS>;

fn shares_of(x: f32, thread: u32) -> vec4<f32> {
    shares[thread] = x;
    // All shares are there.
    workgroupBarrier();
    let first = thread / SHARERS * SHARERS;
    let all = vec4(shares[first], shares[first + 1u], shares[first + 2u], shares[first + 3u]);
    // The next ones overwrite them.
    workgroupBarrier();
    return all;
}

fn shared_max(x: f32, thread: u32) -> f32 {
    let all = shares_of(x, thread);
    return max(max(all.x, all.y), max(all.z, all.w));
}

fn shared_sum(x: f32, thread: u32) -> f32 {
    let all = shares_of(x, thread);
    return all.x + all.y + all.z + all.w;
}

struct Team {
    nth: u32,
    count: u32,
    row: u32,
    four: u32,
}

// Subgroups have 16 to 64: groups differ in it, so that checks see teams that share rows, and such that do not.
const TEAM_LANES: u32 = 64u >> (GROUP % 3u);
const FOURS: u32 = SIDE * SIDE4 / TEAM_LANES;

fn team_of(invocation: Invocation) -> Team {
    let lane = invocation.thread % TEAM_LANES;
    return Team(invocation.thread / TEAM_LANES, THREADS / TEAM_LANES, lane % SIDE, lane / SIDE * FOURS);
}

fn load_queries(at: u32, team: Team) -> Left {
    let row = at + team.row * QUERIES_PITCH;
    return Left(staged[row], staged[row + 1u], staged[row + 2u], staged[row + 3u]);
}

fn load_weights(at: u32, team: Team) -> Left {
    let row = at + team.row * WEIGHTS_PITCH;
    return Left(weights[row], weights[row + 1u], weights[row + 2u], weights[row + 3u]);
}

fn load_keys(at: u32) -> Right {
    return Right(at, KEYS_PITCH);
}

fn load_values(at: u32) -> Right {
    return Right(at, VALUES_PITCH);
}

fn load_sums(at: u32, team: Team) -> Sums {
    var sums: Sums;
    for (var i = 0u; i < FOURS; i++) {
        sums[i] = logits[at + team.row * LOGITS_PITCH + team.four + i];
    }
    return sums;
}

fn store_sums(at: u32, sums: Sums, team: Team) {
    var all = sums;
    for (var i = 0u; i < FOURS; i++) {
        logits[at + team.row * LOGITS_PITCH + team.four + i] = all[i];
    }
}

fn product(left: Left, right: Right, sums: Sums, team: Team) -> Sums {
    var all = sums;
    var row = left;
    // Four, in a form that compilers do not unroll: lavapipe took half a minute to compile what comes of it.
    let fours = min(work.params.items + 3u, SIDE4);
    for (var i = 0u; i < FOURS; i++) {
        for (var e = 0u; e < fours; e++) {
            let column = (team.four + i) * 4u + e;
            for (var c = 0u; c < fours; c++) {
                all[i][e] += dot(row[c], staged[right.at + column * right.pitch + c]);
            }
        }
    }
    return all;
}
