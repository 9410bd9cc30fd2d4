//! How numbers are stored.

use crate::error::Error;

/// How a number is stored in a buffer. Arithmetic is f32 always.
///
/// Queries and outputs are [`F32`](Self::F32) or [`F16`](Self::F16). How a row of each type lies in the cache is
/// [`RowLayout`](crate::RowLayout)'s to say, and which numbers come back from it [`quant`](crate::quant)'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32 (8 exponent bits, 7 mantissa bits).
    Bf16,
    /// OCP E4M3 (4 exponent bits of bias 7, 3 mantissa bits): up to 448, no infinity (OCP 8-bit Floating Point
    /// Specification 1.0; Micikevicius et al., arXiv 2209.05433).
    Fp8,
    /// Blocks of 32 elements of a row, each `least + scale * quant` with a quant of 8 bits.
    Q8,
    /// Blocks of 32 elements of a row, each `least + scale * quant` with a quant of 4 bits.
    Q4,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Bf16, Self::Fp8, Self::Q8, Self::Q4];

    /// Bits of one element, headers of blocks not counted.
    pub const fn bits_per_element(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Fp8 | Self::Q8 => 8,
            Self::Q4 => 4,
        }
    }

    /// Bytes of one element of a caller's tensor, which is f32 or f16. Elements of the cache may share a byte (of q4 two do, and this is
    /// 1), and have headers: see [`RowLayout`](crate::RowLayout).
    pub const fn bytes(self) -> u32 {
        self.bits_per_element().div_ceil(8)
    }

    /// Whether elements are stored in blocks, each with a header.
    pub const fn is_blocked(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4)
    }

    /// Half a unit in the last place, relative: the rounding error of one stored number. Relative to the number itself, or, of
    /// types with blocks, to the range of its block.
    pub const fn epsilon(self) -> f64 {
        match self {
            Self::F32 => 5.960_464_477_539_063e-8,
            Self::F16 => 4.882_812_5e-4,
            Self::Bf16 => 3.906_25e-3,
            Self::Fp8 => 0.062_5,
            Self::Q8 => 0.5 / 255.0,
            Self::Q4 => 0.5 / 15.0,
        }
    }

    /// The name used by the command line and in shader file names: `f32`, `f16`, `bf16`, `fp8`, `q8`, `q4`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Dtype {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|d| d.name() == s)
            .ok_or_else(|| Error::field("dtype", s, "it must be f32, f16, bf16, fp8, q8 or q4"))
    }
}
