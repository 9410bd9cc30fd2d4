//! Blocks of numbers as `least + scale * quant`: the same as `encode_block.wgsl` and `four_block.wgsl`, except that a GPU's
//! division may be off by 2.5 units in the last place.

/// What larger numbers, infinities too, are stored as: it keeps every range, and so all arithmetic, finite.
const LARGEST: f32 = 1e38;
/// The number that a NaN is counted as, so that it outlives a maximum.
const NAN_MARK: f32 = 2e38;
/// The header of a block that had a NaN: all of it is NaN.
const NAN_HEADER: u32 = 0x7fc0_7fc0;

/// The largest quant of `bits` bits.
pub(super) fn most(bits: u32) -> u32 {
    (1 << bits) - 1
}

/// A number as a block counts it.
pub(super) fn number(x: f32) -> f32 {
    if x.is_nan() { NAN_MARK } else { x.clamp(-LARGEST, LARGEST) }
}

/// The header of `numbers`, which are at least one.
pub(super) fn header_of(numbers: &[f32], bits: u32) -> u32 {
    let (mut least, mut greatest) = (LARGEST, -LARGEST);
    for &x in numbers {
        least = least.min(number(x));
        greatest = greatest.max(number(x));
    }
    header(least, greatest, most(bits) as f32)
}

/// The header of a block from its least and its greatest [`number`] and the steps between them. The least is rounded down and
/// the scale up, so that every number lies within the steps.
fn header(least: f32, greatest: f32, steps: f32) -> u32 {
    if greatest > LARGEST {
        return NAN_HEADER;
    }
    let bits = least.to_bits();
    // Away from zero where negative: 16 bits that are not all zero carry. Subnormals are 0, as GPUs may take them.
    let carry = if bits >> 31 == 1 { 0xffff } else { 0 };
    let low = if bits & 0x7f80_0000 == 0 { 0 } else { (bits + carry) & 0xffff_0000 };
    let scale = (greatest - f32::from_bits(low)) / steps;
    let scale = if scale < f32::MIN_POSITIVE { 0 } else { (scale.to_bits() + 0xffff) >> 16 };
    low | scale
}

/// The quant, at most `most`, of a [`number`].
pub(super) fn quant(x: f32, header: u32, most: u32) -> u32 {
    // All numbers of the block are the same, or none is one.
    if header & 0xffff == 0 || header == NAN_HEADER {
        return 0;
    }
    let (scale, least) = (f32::from_bits(header << 16), f32::from_bits(header & 0xffff_0000));
    ((x - least) / scale + 0.5).floor().clamp(0.0, most as f32) as u32
}

/// The number behind a quant. 8 bits of scale times 8 of quant are exact in f32, so fused or not it is the same everywhere.
pub(super) fn value(quant: u32, header: u32) -> f32 {
    let (scale, least) = (f32::from_bits(header << 16), f32::from_bits(header & 0xffff_0000));
    least + scale * quant as f32
}
