// A row that `backward_rows` has packed: K4 groups of the turned query, V4 of the gradient of its output, then (l, delta, 0, 0).
//
// Rows of a KV head lie one behind the other in the order in which kernels walk them: a stream, which processors fetch ahead. With all
// heads of a token together `backward_kv_subgroup` took 52 ms instead of 40 (1,024 x 1,024, 9/3 heads of 64).

const ROW4: u32 = K4 + V4 + 1u;

// First group of a token's row of a query head; `tokens` is the step's.
fn packed_row(tokens: u32, token: u32, head: u32) -> u32 {
    return ((head / GROUP * tokens + token) * GROUP + head % GROUP) * ROW4;
}
