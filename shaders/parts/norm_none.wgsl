// Queries and keys as they are.

fn measure(slot: u32, source: u32) {}

fn norms_measured() {}

fn norm_of(slot: u32) -> f32 {
    return 1.0;
}

fn weighed(source: u32, element: u32) -> f32 {
    return raw(source + element);
}
