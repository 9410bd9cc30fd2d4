// How many parts of a head a loop walks. A compiler knows it, writes the loop out and keeps what the parts index in registers.

fn bound(parts: u32) -> u32 {
    return parts;
}
