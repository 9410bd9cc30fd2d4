// The walk of prefill_subgroup.wgsl over the keys of an item. A lane owns ROWS_EACH whole rows; the lanes load KEYS keys together, a unit
// each, and broadcast their parts, so a K/V element is fetched once for all rows, and an output loaded and stored once for all KEYS.
// The running max moves only when a logit of a row of the lane exceeds its own by 8 (FlashAttention-4): weights stay below 2^8.
//
// Loops marked `// written out` are, by the linker, since an array that a loop indexes lies in memory (src/shader/write_out.rs).
// The first loop and the last stay rolled (ROLLED turns or more, src/shader/prelude.rs): rows beyond the tile are zero and go nowhere. The
// walk uses copies of their arrays.
//
// The linker adds this text once more, as `attend_few`, with a smaller number in the place of ROWS_EACH, for tiles that are half empty. So
// nothing here is declared beside `attend`, and what depends on the rows of a lane is written with ROWS_EACH.

fn attend(item: WorkItem, kv_head: u32, lane: u32) {
    var loaded: array<vec4<f32>, max(ROWS_EACH * K_WIDE, ROLLED)>;
    for (var i = 0u; i < max(ROWS_EACH * K_WIDE, ROLLED); i++) {
        loaded[i] = query_four(item, kv_head, item.row_begin + i / K_WIDE * LANES + lane, i % K_WIDE);
    }
    var q: array<vec4<f32>, ROWS_EACH * K_WIDE>;
    var o: array<vec4<f32>, ROWS_EACH * V_WIDE>;
    var m: array<f32, ROWS_EACH>;
    var d: array<f32, ROWS_EACH>;
    var rows: array<Row, ROWS_EACH>;
    for (var r = 0u; r < ROWS_EACH; r++) { // written out
        rows[r] = row_of(item, kv_head, item.row_begin + r * LANES + lane);
        m[r] = HIDDEN;
        d[r] = 0.0;
        for (var c = 0u; c < K_WIDE; c++) { // written out
            q[r * K_WIDE + c] = loaded[r * K_WIDE + c];
        }
        for (var c = 0u; c < V_WIDE; c++) { // written out
            o[r * V_WIDE + c] = vec4(0.0);
        }
    }

    var cache_row = 0u;
    var run = 0u;
    var count = 0u;
    var kind = PARTIAL;
    for (var key = item.key_begin; key < item.key_end; key += count) {
        // The page table is read once a page.
        if run == 0u {
            cache_row = kv_row(item.pages, kv_head, item.origin + key);
            run = kv_run(item.origin + key);
        }
        // KEYS keys of one page, and of one tile of the map.
        count = min(min(KEYS, item.key_end - key), run);
        if MAPPED {
            count = min(count, MAP_KEYS - (key - item.key_begin) % MAP_KEYS);
        }
        if MAPPED && (key - item.key_begin) % MAP_KEYS == 0u {
            kind = tile_kind(item, kv_head, key);
            if kind == SKIP {
                count = MAP_KEYS;
                run = 0u;
                continue;
            }
        }
        let first = cache_row;
        cache_row += count;
        run -= count;
        // All loads come before the products: each brings branches, and LLVM carries products across those through memory.
        // In the place of a key beyond the count comes the last one again, but where reads are counted.
        var k: array<vec4<f32>, KEYS * K_PART>;
        for (var u = 0u; u < KEYS; u++) { // written out
            if !COUNTED || u < count {
                for (var i = 0u; i < K_LOADS; i++) { // written out
                    let unit = load_k_unit(first + min(u, count - 1u), i * LANES + unit_of(lane));
                    for (var c = 0u; c < K_FOURS; c++) { // written out
                        k[u * K_PART + i * K_FOURS + c] = unit[c];
                    }
                }
            }
        }
        var dots: array<vec4<f32>, ROWS_EACH * KEYS>;
        for (var i = 0u; i < K_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { // written out
                wide[u] = broadcast(k[u * K_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                const four = (i / K_FOURS * LANES + UNIT_OF[j]) * K_FOURS + i % K_FOURS;
                for (var r = 0u; r < ROWS_EACH; r++) { // written out
                    let x = q[r * K_WIDE + four];
                    for (var u = 0u; u < KEYS; u++) { // written out
                        dots[r * KEYS + u] += x * wide[u][j];
                    }
                }
            }
        }
        // One branch for all rows, for the same reason.
        var s: array<f32, ROWS_EACH * KEYS>;
        var top: array<f32, ROWS_EACH>;
        var grows = false;
        for (var r = 0u; r < ROWS_EACH; r++) { // written out
            top[r] = m[r];
            for (var u = 0u; u < KEYS; u++) { // written out
                let at = r * KEYS + u;
                let dot = dots[at];
                // Beyond the count lie none of its keys.
                s[at] = select(HIDDEN, logit(dot.x + dot.y + dot.z + dot.w, rows[r], key + u, kind), u < count);
                top[r] = max(top[r], s[at]);
            }
            grows |= top[r] > m[r] + 8.0;
        }
        if grows {
            for (var r = 0u; r < ROWS_EACH; r++) { // written out
                let shrink = exp2(m[r] - top[r]);
                for (var c = 0u; c < V_WIDE; c++) { // written out
                    o[r * V_WIDE + c] *= shrink;
                }
                d[r] *= shrink;
                m[r] = top[r];
            }
        }
        var v: array<vec4<f32>, KEYS * V_PART>;
        for (var u = 0u; u < KEYS; u++) { // written out
            if !COUNTED || u < count {
                for (var i = 0u; i < V_LOADS; i++) { // written out
                    let unit = load_v_unit(first + min(u, count - 1u), i * LANES + unit_of(lane));
                    for (var c = 0u; c < V_FOURS; c++) { // written out
                        v[u * V_PART + i * V_FOURS + c] = unit[c];
                    }
                }
            }
        }
        var p: array<f32, ROWS_EACH * KEYS>;
        for (var r = 0u; r < ROWS_EACH; r++) { // written out
            for (var u = 0u; u < KEYS; u++) { // written out
                p[r * KEYS + u] = weight(s[r * KEYS + u], m[r]);
                d[r] += p[r * KEYS + u];
            }
        }
        for (var i = 0u; i < V_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { // written out
                wide[u] = broadcast(v[u * V_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                const four = (i / V_FOURS * LANES + UNIT_OF[j]) * V_FOURS + i % V_FOURS;
                for (var r = 0u; r < ROWS_EACH; r++) { // written out
                    var sum = vec4(0.0);
                    for (var u = 0u; u < KEYS; u++) { // written out
                        sum += p[r * KEYS + u] * wide[u][j];
                    }
                    o[r * V_WIDE + four] += sum;
                }
            }
        }
    }

    var outs: array<vec4<f32>, max(ROWS_EACH * V_WIDE, ROLLED)>;
    var sums: array<vec2<f32>, max(ROWS_EACH, ROLLED)>;
    for (var r = 0u; r < ROWS_EACH; r++) { // written out
        sums[r] = vec2(m[r], d[r]);
        for (var c = 0u; c < V_WIDE; c++) { // written out
            outs[r * V_WIDE + c] = o[r * V_WIDE + c];
        }
    }
    for (var i = 0u; i < max(ROWS_EACH * V_WIDE, ROLLED); i++) {
        let r = i / V_WIDE;
        let row = item.row_begin + r * LANES + lane;
        emit(item, kv_head, row, i % V_WIDE, outs[i], sums[r]);
        if i % V_WIDE == 0u {
            emit_sums(item, kv_head, row, sums[r]);
        }
    }
}
