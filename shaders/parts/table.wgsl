// Numbers of a layer that belong to a head or to an element: sinks, slopes, weights of the norm, turns per token.

@group(0) @binding(8) var<uniform> table: array<vec4<u32>, TABLE4>;

fn table_word(index: u32) -> u32 {
    return table[index / 4u][index % 4u];
}

fn table_number(index: u32) -> f32 {
    return bitcast<f32>(table_word(index));
}
