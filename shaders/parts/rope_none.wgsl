// No rotation.

fn turned(source: u32, element: u32, position: i32) -> f32 {
    return weighed(source, element);
}
