//! What a row of the cache takes.

use super::Dtype;

/// A row of the cache, one token's elements of one KV head, in 32-bit words.
///
/// The cache holds the numbers of all rows, then the headers of all rows: so numbers stay aligned to 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowLayout {
    /// Words of numbers: whole groups of four elements in whole words, padded with zero bits. Padding reads as 0, but of a
    /// blocked type as the least number of its block.
    pub words: u32,
    /// Words of headers: one for each block, so 0 for types without blocks.
    pub headers: u32,
}

impl RowLayout {
    /// Consecutive elements of a row that share a header; the last block of a row may have fewer.
    pub const BLOCK: u32 = 32;

    /// A row of `dim` elements.
    pub const fn of(dtype: Dtype, dim: u32) -> Self {
        let fours = dim.div_ceil(4);
        // Not by bits, which would not fit 32 bits where elements of a whole tensor are taken as one row.
        let words = match dtype.bits_per_element() {
            4 => fours.div_ceil(2),
            bits => fours * (bits / 8),
        };
        let headers = if dtype.is_blocked() { dim.div_ceil(Self::BLOCK) } else { 0 };
        Self { words, headers }
    }

    /// Bytes of numbers and headers.
    pub const fn bytes(self) -> u32 {
        (self.words + self.headers) * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_whole_fours_in_whole_words() {
        let words = |dtype| [1, 4, 5, 33, 36, 40, 64].map(|dim| RowLayout::of(dtype, dim).words);
        assert_eq!(words(Dtype::F32), [4, 4, 8, 36, 36, 40, 64]);
        assert_eq!(words(Dtype::F16), [2, 2, 4, 18, 18, 20, 32]);
        assert_eq!(words(Dtype::Bf16), words(Dtype::F16));
        assert_eq!(words(Dtype::Fp8), [1, 1, 2, 9, 9, 10, 16]);
        assert_eq!(words(Dtype::Q8), words(Dtype::Fp8));
        assert_eq!(words(Dtype::Q4), [1, 1, 1, 5, 5, 5, 8]);
    }

    #[test]
    fn blocks_have_headers() {
        for dtype in Dtype::ALL {
            let headers = [1, 32, 33, 64, 576].map(|dim| RowLayout::of(dtype, dim).headers);
            assert_eq!(headers, if dtype.is_blocked() { [1, 1, 2, 2, 18] } else { [0; 5] });
        }
        assert_eq!(RowLayout::of(Dtype::Q4, 128).bytes(), 64 + 16);
        assert_eq!(RowLayout::of(Dtype::Q8, 128).bytes(), 128 + 16);
    }
}
