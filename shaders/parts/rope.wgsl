// Rotary position embedding (RoFormer, arXiv 2104.09864): the pair (a, b) at position p turns by p times its frequency,
//   a' = a cos - b sin,  b' = b cos + a sin
//
// The table has the frequencies in units of 2^-64 turns: multiplied by a position in integer arithmetic the angle is exact modulo
// one turn, however far the position. Sine and cosine are polynomials on an eighth of a turn: those of WGSL may be off by 2^-11.
// Prelude: ROPE_FIRST, ROPE_DIM (elements that turn), INTERLEAVED (pairs 2i, 2i + 1; else i, i + ROPE_DIM / 2), MAGNITUDE.

fn mul_high(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let cross = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (cross & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (cross >> 16u) + (other >> 16u);
}

// Cosine and sine of a pair at a position.
fn cos_sin(pair: u32, position: i32) -> vec2<f32> {
    let high = table_word(TURNS_AT + 2u * pair);
    let low = table_word(TURNS_AT + 2u * pair + 1u);
    var phase = bitcast<u32>(position) * high + mul_high(bitcast<u32>(position), low);
    if position < 0 {
        // As u32 it is 2^32 more than it is.
        phase -= low;
    }
    // The nearest quarter, and what is left: at most an eighth either way.
    let quarter = (phase + 0x20000000u) >> 30u;
    let x = f32(bitcast<i32>(phase - (quarter << 30u))) * 1.4629180792671596e-9;
    let s = x * x;
    let sine = x + x * s * (-0.16666655 + s * (0.0083321609 - s * 0.00019515296));
    let cosine = 1.0 - 0.5 * s + s * s * (0.041666646 + s * (-0.0013887316 + s * 0.000024433157));
    switch quarter & 3u {
        case 0u: { return MAGNITUDE * vec2(cosine, sine); }
        case 1u: { return MAGNITUDE * vec2(-sine, cosine); }
        case 2u: { return MAGNITUDE * vec2(-cosine, -sine); }
        default: { return MAGNITUDE * vec2(sine, -cosine); }
    }
}

fn turned(source: u32, element: u32, position: i32) -> f32 {
    let x = weighed(source, element);
    let place = element - ROPE_FIRST;
    if element < ROPE_FIRST || place >= ROPE_DIM {
        return x;
    }
    if INTERLEAVED {
        let angle = cos_sin(place / 2u, position);
        if (place & 1u) == 0u {
            return x * angle.x - weighed(source, element + 1u) * angle.y;
        }
        return x * angle.x + weighed(source, element - 1u) * angle.y;
    }
    let half = ROPE_DIM / 2u;
    if place < half {
        let angle = cos_sin(place, position);
        return x * angle.x - weighed(source, element + half) * angle.y;
    }
    let angle = cos_sin(place - half, position);
    return x * angle.x + weighed(source, element - half) * angle.y;
}
