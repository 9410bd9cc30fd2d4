// Four elements of a key or value as matrices have them.

fn half_k(row: u32, four: u32) -> vec4<Half> {
    return halves(load_k(row, four));
}

fn half_v(row: u32, four: u32) -> vec4<Half> {
    return halves(load_v(row, four));
}
