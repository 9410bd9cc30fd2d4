// The same, but no compiler knows it: written out, eight parts take llvmpipe 10 (backward_q) to 20 s (backward_kv) to compile.

fn bound(parts: u32) -> u32 {
    return parts + work.params.zero;
}
