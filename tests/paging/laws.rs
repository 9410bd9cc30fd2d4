//! Laws of one spec: whatever happens to pages, texts answer as if each had been written for itself.

use fastrand::Rng;
use gqa::Mask;
use gqa::verify::{check, same};

use super::world::{Lab, Pair, Part, Text, text};

/// A law: its name, and the check of it with random lengths.
pub(crate) type Law = (&'static str, fn(&Lab<'_>, &mut Rng) -> Result<(), String>);

pub(crate) const LAWS: [Law; 7] = [
    ("forks that diverge = sequences of their own", forks),
    ("a tree of forks = sequences of their own", tree_of_forks),
    ("draft trees of forks = of sequences of their own", drafts),
    ("a prefill in chunks = one prefill", chunks),
    ("truncated and gone on = written anew", truncated),
    ("saved and restored = kept", saved),
    ("defragmented = as before", defragmented),
];

/// A page of the sizes that paged caches are tested with.
fn page(rng: &mut Rng) -> u32 {
    [1, 4, 16, 64][rng.usize(..4)]
}

/// Tokens that no other call gives.
pub(crate) fn tokens(rng: &mut Rng, len: usize) -> Vec<u32> {
    (0..len).map(|_| rng.u32(..)).collect()
}

fn forks(lab: &Lab<'_>, rng: &mut Rng) -> Result<(), String> {
    let mut pair = Pair::new(lab.paged(page(rng))?)?;
    let root = pair.open()?;
    pair.say(&[Part::new(root, &tokens(rng, 66))])?;
    let forks = [root, pair.fork(root)?, pair.fork(root)?, pair.fork(root)?];
    // The same question of all; then of all but one, each with another number of tokens; then of some.
    let asks = |nth: usize| Part { q_len: 1, ..Part::new(nth, &[]) };
    pair.say(&forks.map(asks))?;
    let news = forks.map(|nth| tokens(rng, 1 + nth));
    let parts: Vec<_> = forks.iter().map(|nth| Part::new(*nth, &news[*nth])).collect();
    pair.say(&parts)?;
    let late = pair.fork(forks[1])?;
    let news = [3, 2, 1].map(|len| tokens(rng, len));
    pair.say(&[Part::new(late, &news[0]), Part::new(forks[3], &news[1]), Part::new(forks[1], &news[2])])
}

fn tree_of_forks(lab: &Lab<'_>, rng: &mut Rng) -> Result<(), String> {
    let mut pair = Pair::new(lab.paged(page(rng))?)?;
    let root = pair.open()?;
    // Now and then what all share is too short to be read apart, but what two of them share is not.
    let first = [7, 33, 50][rng.usize(..3)];
    pair.say(&[Part::silent(root, &tokens(rng, first))])?;
    let (left, right) = (pair.fork(root)?, pair.fork(root)?);
    let branches = [70, 41].map(|len| tokens(rng, len));
    pair.say(&[Part::silent(left, &branches[0]), Part::silent(right, &branches[1])])?;
    let leaves = [left, pair.fork(left)?, pair.fork(left)?, right, pair.fork(right)?, root];
    for _ in 0..2 {
        let news: Vec<_> = leaves.iter().map(|_| tokens(rng, 1)).collect();
        let parts: Vec<_> = leaves.iter().zip(&news).map(|(nth, new)| Part::new(*nth, new)).collect();
        pair.say(&parts)?;
    }
    // A leaf more, on the longest branch.
    let deep = pair.fork(leaves[1])?;
    let (x, y) = (tokens(rng, 2), tokens(rng, 1));
    pair.say(&[Part::new(deep, &x), Part::new(leaves[1], &y), Part { q_len: 1, ..Part::new(right, &[]) }])
}

/// A tree of `len` drafts: each sees itself, one before it, and what that sees.
fn tree(rng: &mut Rng, len: usize) -> Vec<u64> {
    let mut tree: Vec<u64> = Vec::new();
    for i in 0..len {
        let above = if i == 0 { 0 } else { tree[rng.usize(..i)] };
        tree.push(above | 1 << i);
    }
    tree
}

fn drafts(lab: &Lab<'_>, rng: &mut Rng) -> Result<(), String> {
    if lab.spec.mask() != Mask::Tree {
        return Ok(());
    }
    let mut pair = Pair::new(lab.paged(page(rng))?)?;
    let root = pair.open()?;
    pair.say(&[Part::silent(root, &tokens(rng, 70))])?;
    let forks = [root, pair.fork(root)?, pair.fork(root)?];
    let lens = [5, 1, 3];
    let (news, trees) = (lens.map(|len| tokens(rng, len)), lens.map(|len| tree(rng, len)));
    let parts = forks.map(|nth| Part { tree: Some(&trees[nth]), ..Part::new(nth, &news[nth]) });
    pair.say(&parts)?;
    // One draft is taken, the others forgotten.
    for nth in forks {
        pair.truncate(nth, 71)?;
    }
    let news = forks.map(|_| tokens(rng, 1));
    pair.say(&forks.map(|nth| Part::new(nth, &news[nth])))?;

    // Forks that have the drafts themselves in common, and see them by different trees.
    let mut pair = Pair::new(lab.paged(page(rng))?)?;
    let (prefix, drafts, first) = (tokens(rng, 64), tokens(rng, 6), tree(rng, 6));
    let root = pair.open()?;
    pair.say(&[Part::silent(root, &prefix)])?;
    pair.say(&[Part { tree: Some(&first), ..Part::new(root, &drafts) }])?;
    let Text { id, tokens } = pair.a.texts[root].clone();
    let fork = pair.a.cache.fork(id).map_err(text)?;
    pair.a.texts.push(Text { id: fork, tokens });
    let fork = pair.b.open()?;
    pair.b.say(&[Part::silent(fork, &prefix)])?;
    pair.b.say(&[Part { tree: Some(&first), ..Part::new(fork, &drafts) }])?;
    let trees = [tree(rng, 6), tree(rng, 6)];
    let asks = |nth: usize| Part { nth, new: &[], q_len: 6, tree: Some(&trees[nth]) };
    pair.say(&[asks(root), asks(fork)])
}

fn chunks(lab: &Lab<'_>, rng: &mut Rng) -> Result<(), String> {
    if !lab.spec.causal() {
        // Queries of the first chunks would see less.
        return Ok(());
    }
    let (mut whole, mut parts) = (lab.contiguous()?, lab.paged(page(rng))?);
    let all = tokens(rng, 150);
    let asked = [Part::new(whole.open()?, &all)];
    let expected = whole.say(&asked)?;
    let nth = parts.open()?;
    let mut found = gqa::verify::Output { out: vec![vec![]], lse: vec![vec![]], ..Default::default() };
    let mut rest = &all[..];
    while !rest.is_empty() {
        let (chunk, others) = rest.split_at(rng.usize(1..60).min(rest.len()));
        rest = others;
        let output = parts.say(&[Part::new(nth, chunk)])?;
        found.out[0].extend(output.out.concat());
        found.lse[0].extend(output.lse.concat());
    }
    let problem = whole.problem(&[Part { new: &[], ..asked[0] }]);
    same(&problem, &found, &expected)?;
    if problem.must_ask() { Ok(()) } else { check(&problem, &found) }
}

fn truncated(lab: &Lab<'_>, rng: &mut Rng) -> Result<(), String> {
    let mut pair = Pair::new(lab.paged(page(rng))?)?;
    let (first, second) = (pair.open()?, pair.open()?);
    pair.say(&[Part::silent(first, &tokens(rng, 90)), Part::silent(second, &tokens(rng, 33))])?;
    let fork = pair.fork(first)?;
    for _ in 0..2 {
        for nth in [first, second, fork] {
            let len = pair.a.texts[nth].tokens.len();
            pair.truncate(nth, rng.usize(len / 2..=len))?;
        }
        let news = [40, 1, 2].map(|len| tokens(rng, len));
        let parts = [first, second, fork].map(|nth| Part::new(nth, &news[nth]));
        pair.say(&parts)?;
    }
    // A short one ends within a page that the long ones go on in, and share.
    let (long, short) = (pair.fork(first)?, pair.fork(first)?);
    pair.truncate(short, 35)?;
    pair.say(&[first, long, short].map(|nth| Part { q_len: 1, ..Part::new(nth, &[]) }))
}

fn saved(lab: &Lab<'_>, rng: &mut Rng) -> Result<(), String> {
    let mut pair = Pair::new(lab.paged(page(rng))?)?;
    let root = pair.open()?;
    pair.say(&[Part::silent(root, &tokens(rng, 77))])?;
    let fork = pair.fork(root)?;
    let news = [1, 6].map(|len| tokens(rng, len));
    pair.say(&[Part::silent(root, &news[0]), Part::silent(fork, &news[1])])?;
    // What was evicted is not saved, and the rest stays where it is.
    let evicted = pair.a.cache.fork(pair.a.texts[fork].id).map_err(text)?;
    pair.a.cache.evict(evicted, 37).map_err(text)?;
    let file = pair.a.save(evicted)?;
    pair.a.cache.close(evicted).map_err(text)?;
    let mut other = lab.paged(page(rng))?;
    let id = other.cache.restore(&lab.gpu.queue, &file).map_err(text)?;
    if other.save(id)? != file || other.cache.evicted(id) != Ok(37) {
        return Err("with evicted tokens, the second file is another".to_owned());
    }
    // Through a cache with pages of another size, and back.
    for nth in [fork, root] {
        let file = pair.a.save(pair.a.texts[nth].id)?;
        let mut other = lab.paged(page(rng))?;
        other.open()?;
        other.say(&[Part::silent(0, &tokens(rng, 9))])?;
        let id = other.cache.restore(&lab.gpu.queue, &file).map_err(text)?;
        let again = other.save(id)?;
        if again != file {
            return Err(format!("the second file is another ({} and {} bytes)", file.len(), again.len()));
        }
        pair.a.cache.close(pair.a.texts[nth].id).map_err(text)?;
        pair.a.texts[nth].id = pair.a.cache.restore(&lab.gpu.queue, &again).map_err(text)?;
    }
    let news = [2, 1].map(|len| tokens(rng, len));
    pair.say(&[Part::new(root, &news[0]), Part::new(fork, &news[1])])
}

fn defragmented(lab: &Lab<'_>, rng: &mut Rng) -> Result<(), String> {
    let mut pair = Pair::new(lab.paged([1, 4, 16][rng.usize(..3)])?)?;
    let texts = [pair.open()?, pair.open()?, pair.open()?];
    for _ in 0..6 {
        // Pages are taken in turns, so that no text lies in one piece.
        let news = texts.map(|_| tokens(rng, 17));
        pair.say(&texts.map(|nth| Part::silent(nth, &news[nth])))?;
    }
    let fork = pair.fork(texts[1])?;
    pair.a.cache.close(pair.a.texts[texts[0]].id).map_err(text)?;
    let asks = [fork, texts[1], texts[2]].map(|nth| Part { q_len: 3, ..Part::new(nth, &[]) });
    let before = pair.a.say(&asks)?;
    let usage = pair.a.cache.usage();
    let mut encoder = pair.a.encoder();
    let moved = pair.a.cache.defragment(&mut encoder).map_err(text)?;
    lab.gpu.queue.submit([encoder.finish()]);
    let after = pair.a.say(&asks)?;
    if moved == 0 || pair.a.cache.usage() != usage {
        return Err(format!("{moved} pages moved, and {usage} became {}", pair.a.cache.usage()));
    }
    // To the last bit, but where texts are in fewer pieces now.
    match pair.a.cache.layers()[0].shards.len() {
        1 if after != before => return Err("the answers are others".to_owned()),
        1 => {}
        _ => same(&pair.a.problem(&asks), &after, &before)?,
    }
    let news = [2, 1].map(|len| tokens(rng, len));
    pair.say(&[Part::new(fork, &news[0]), Part::new(texts[1], &news[1])])
}
