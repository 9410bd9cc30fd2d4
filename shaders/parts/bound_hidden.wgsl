// The same, but no compiler knows it: written out, eight parts take Mesa's software adapters 10 (backward_q) to 20 s (backward_kv).

fn bound(parts: u32) -> u32 {
    return select(parts, 0u, work.params.slots == 0u);
}
