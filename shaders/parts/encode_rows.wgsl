// From staged rows to the words of a cache. Formats are those of `Dtype`: F32, F16, BF16, FP8 by the word, Q8 and Q4 in blocks of 32
// elements with a header of their own.

fn encode_word(format: u32, first: u32) -> u32 {
    switch format {
        case F32: {
            return bitcast<u32>(rows[first]);
        }
        case F16: {
            return encode_f16(rows[first]) | (encode_f16(rows[first + 1u]) << 16u);
        }
        case BF16: {
            return encode_bf16(rows[first]) | (encode_bf16(rows[first + 1u]) << 16u);
        }
        default: {
            return encode_fp8(rows[first]) | (encode_fp8(rows[first + 1u]) << 8u)
                | (encode_fp8(rows[first + 2u]) << 16u) | (encode_fp8(rows[first + 3u]) << 24u);
        }
    }
}

fn measure_block(first: u32, count: u32, bits: u32) -> u32 {
    var least = block_number(rows[first]);
    var most = least;
    for (var i = 1u; i < count; i++) {
        let x = block_number(rows[first + i]);
        least = min(least, x);
        most = max(most, x);
    }
    return block_header(least, most, f32((1u << bits) - 1u));
}

fn block_word(first: u32, header: u32, bits: u32) -> u32 {
    var word = 0u;
    for (var i = 0u; i < 32u / bits; i++) {
        word |= block_quant(block_number(rows[first + i]), header, (1u << bits) - 1u) << (i * bits);
    }
    return word;
}
