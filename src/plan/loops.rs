//! How far an invocation may walk where a driver counts the iterations of its loops, and ends them, without a word, when they are too many.

use crate::caps::Caps;
use crate::shader::{Kernel, Tile, Variant, row_fours, team_lanes};

/// Groups of four of a part, as in `parts/staged.wgsl`.
const PART: u32 = 8;

/// Keys (of [`Kernel::BackwardKv`] and [`Kernel::BackwardKvSubgroup`]: rows) that a workgroup of `variant` may walk on `caps`, in whole
/// tiles: half of [`Caps::loop_iterations`], since there are loops in front of the walk and behind it. `u32::MAX` where none are counted.
pub(super) fn longest_walk(variant: &Variant, caps: &Caps) -> u32 {
    let Some(iterations) = caps.loop_iterations else { return u32::MAX };
    let (step, each) = iterations_of(variant);
    (iterations / 2 / each).max(1) * step
}

/// Keys, or rows, of one turn of a kernel's walk, and the iterations of all loops that it takes at most: every loop of the text
/// counted as it stands there. Compilers unroll some, so there are fewer.
fn iterations_of(variant: &Variant) -> (u32, u32) {
    let (spec, Tile { rows, keys, threads }) = (&variant.spec, variant.tile);
    let [k4, v4] = [spec.head_dim(), spec.v_head_dim()].map(row_fours);
    let [k_parts, v_parts] = [k4, v4].map(|fours| fours.div_ceil(PART));
    let stage = |rows: u32| 1 + (rows * PART).div_ceil(threads);
    // A query is read element by element.
    let stage_queries = 1 + (rows * PART).div_ceil(threads) * 5;
    // Four rows of `PART` groups against each PART-th of the others.
    let dots = |others: u32| 1 + PART * (1 + others.div_ceil(PART));
    match variant.kernel {
        Kernel::Prefill => {
            let of_k = 1 + stage_queries + stage(keys) + dots(keys);
            let of_v = 1 + stage(keys) + 4 + keys;
            (keys, 1 + k_parts * of_k + v_parts * of_v + 10 * keys.div_ceil(PART) + PART)
        }
        Kernel::PrefillMatrix => {
            let [k_sides, v_sides] = [k4, v4].map(|fours| fours.div_ceil(4));
            let stage = 2 + (keys * k_sides * 4).div_ceil(threads) + (keys * v_sides).div_ceil(threads) * 9;
            let products =
                keys / 16 * (2 + (k_sides + v_sides) * if variant.uses_matrix_units() { 1 } else { 41 });
            (keys, 1 + stage + products + keys * 4 + v_sides * 5)
        }
        Kernel::Decode => {
            let teams = threads / PART;
            let of_pass =
                1 + k4.div_ceil(PART) * (1 + rows) + rows + (rows * teams).div_ceil(threads) * (1 + PART);
            let of_max = rows.div_ceil(threads) * (1 + keys) + (rows * keys).div_ceil(threads);
            let of_v = keys.div_ceil(threads / v4) * (1 + rows);
            (keys, 1 + keys.div_ceil(teams) * of_pass + of_max + rows + of_v)
        }
        Kernel::DecodeTeams => {
            let lanes = team_lanes(spec, rows).unwrap_or(16);
            let [k, v] = [k4, v4].map(|fours| 1 + fours.div_ceil(lanes));
            let of_quad = 2 * (1 + rows) + 4 * (k + rows * k + v + rows * v);
            (keys, 3 + lanes / 4 * of_quad + rows * (4 + v + lanes / 4))
        }
        // Loops of these walks are written out, but for decode's two over the keys of a block, which a page may end after each: two passes
        // each, the one that leaves included.
        Kernel::DecodeSubgroup => (1, 5),
        Kernel::PrefillSubgroup | Kernel::BackwardQSubgroup | Kernel::BackwardKvSubgroup => (1, 1),
        Kernel::BackwardQ => {
            let of_dots = 1 + stage(rows) + stage(keys) + dots(keys);
            let of_sums = 1 + stage(keys) + keys * 5;
            (keys, 1 + (k_parts + v_parts) * of_dots + k_parts * of_sums + 5 * keys.div_ceil(PART))
        }
        Kernel::BackwardKv => {
            let of_dots = 1 + stage(rows) + stage(keys) + dots(rows);
            let of_sums = 1 + stage(rows) + rows * 5;
            (rows, 1 + (k_parts + v_parts) * (of_dots + of_sums) + 6 * rows.div_ceil(PART))
        }
        // The others walk no keys.
        _ => (1, 1),
    }
}
