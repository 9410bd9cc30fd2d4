// Values are the first V_HEAD_DIM elements of the keys (absorbed MLA). The last group may hold more: it is not written out.

fn load_v(row: u32, four: u32) -> vec4<f32> {
    return load_k(row, four);
}
