// A row that `backward_rows` has packed: K4 groups of the turned query, V4 of the gradient of its output, then (l, delta, 0, 0).

const ROW4: u32 = K4 + V4 + 1u;
