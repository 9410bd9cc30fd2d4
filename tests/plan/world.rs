//! Random steps over random page tables: shards, evicted tokens, documents, trees, prefixes that sequences share.

use std::collections::BTreeMap;

use gqa::plan::{Cut, MaskPlace, Shared, Span, StepAppend, StepInput, StepSequence};
use gqa::{AttentionSpec, Dtype, Mask, Rope};
use proptest::prelude::*;

pub(crate) fn spec() -> impl Strategy<Value = AttentionSpec> {
    let window = || prop::option::of(0u32..200);
    let heads = (1u32..=20, 1u32..=3, 1u32..=256, 1u32..=256);
    (heads, any::<(bool, bool)>(), (window(), window())).prop_map(
        |((group, kv_heads, dim, v_dim), (causal, rotated), (left, right))| {
            let builder = AttentionSpec::builder(group * kv_heads, kv_heads, dim).v_head_dim(v_dim);
            let builder = builder.kv_dtype(Dtype::F16).rotated(rotated).causal(causal);
            builder.window(left, right).build().unwrap()
        },
    )
}

/// The same, some with trees of draft tokens.
pub(crate) fn spec_of_trees() -> impl Strategy<Value = AttentionSpec> {
    (spec(), any::<bool>()).prop_map(|(spec, trees)| match trees && spec.head_dim() > 1 {
        true => spec.to_builder().mask(Mask::Tree).rope(Rope::new(2)).build().unwrap(),
        false => spec,
    })
}

/// A sequence as it is drawn.
#[derive(Debug, Clone)]
struct Seed {
    q_len: u32,
    /// Keys that it shares with none.
    own: u32,
    /// Where its queries begin; `None`: they are the last tokens.
    at: Option<i32>,
    new: u32,
    /// Which prefix it begins with, how that goes on, and so on. Prefixes of [`LONER`]s are nobody else's.
    path: [u8; LEVELS],
    /// Where a document begins that it is; for loners.
    origin: u32,
    /// A tree, where the spec has some and it may have one.
    tree: Option<u64>,
}

const LEVELS: usize = 3;
const LONER: u8 = 2;

fn seed(loners: bool) -> impl Strategy<Value = Seed> {
    let place = prop::option::of(-70i32..900);
    let first = if loners { LONER..=LONER } else { 0..=LONER };
    let path = (first, 0u8..2, 0u8..2).prop_map(|(a, b, c)| [a, b, c]);
    let lens = (0u32..60, 0u32..400, 0u32..700, 0u32..70);
    (lens, place, path, prop::option::of(any::<u64>())).prop_map(
        |((q_len, own, new, origin), at, path, tree)| Seed { q_len, own, at, new, path, origin, tree },
    )
}

/// A page: which shard it lies in, and its number there.
pub(crate) type Page = (u32, u32);

#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) input: StepInput,
    /// Slots of a page.
    pub(crate) page: u32,
    /// All pages of each sequence, those in front that it no longer has as well.
    pub(crate) tables: Vec<Vec<Page>>,
    /// Tokens of each sequence that turn to other positions than their own: those of trees.
    pub(crate) trees: BTreeMap<usize, Vec<i32>>,
}

/// What is drawn of a whole cache.
#[derive(Debug, Clone)]
struct Draw {
    seeds: Vec<Seed>,
    page: u32,
    shards: u32,
    /// The shard of some pages: those of others follow.
    shard_of: Vec<u32>,
    /// How long each part of each prefix is.
    lengths: [[u32; 3]; LEVELS],
    evicted: u32,
    dense: u64,
    /// Whether shared keys begin where the first is seen.
    seen: bool,
}

fn draw(loners: bool) -> impl Strategy<Value = Draw> {
    let length = || prop::array::uniform3(0u32..150);
    let lengths = (length(), length(), length()).prop_map(|(a, b, c)| [a, b, c]);
    let evicted = prop_oneof![Just(0), 0u32..300];
    let dense = prop_oneof![Just(0), 1u64..5000];
    let shard_of = prop::collection::vec(0u32..4, 16);
    let seeds = prop::collection::vec(seed(loners), 0..7);
    ((seeds, 1u32..70, 1u32..=4), (shard_of, lengths, evicted), (dense, any::<bool>())).prop_map(
        |((seeds, page, shards), (shard_of, lengths, evicted), (dense, seen))| Draw {
            seeds,
            page,
            shards,
            shard_of,
            lengths,
            evicted,
            dense,
            seen,
        },
    )
}

/// A spec and a step for it.
pub(crate) fn world(
    spec: impl Strategy<Value = AttentionSpec>,
    loners: bool,
) -> impl Strategy<Value = (AttentionSpec, World)> {
    (spec, draw(loners)).prop_map(|(spec, draw)| {
        let world = draw.build(&spec);
        (spec, world)
    })
}

impl Draw {
    /// Where the part of a prefix at `level` ends.
    fn end(&self, path: [u8; LEVELS], level: usize) -> u32 {
        let part = |level: usize| self.lengths[level][usize::from(path[level])];
        (0..=level).map(part).sum()
    }

    fn kv_len(&self, seed: &Seed) -> u32 {
        let prefix = if seed.path[0] == LONER { 0 } else { self.end(seed.path, LEVELS - 1) };
        prefix + seed.own
    }

    /// Tokens that sequences with this prefix have evicted: none has more than it is long.
    fn evicted(&self, first: u8) -> u32 {
        let shortest = self.seeds.iter().filter(|s| s.path[0] == first).map(|s| self.kv_len(s)).min();
        self.evicted.min(shortest.unwrap_or(0))
    }

    fn build(&self, spec: &AttentionSpec) -> World {
        let trees = spec.mask() == Mask::Tree;
        let mut world = World {
            input: StepInput {
                shards: self.shards,
                dense: if trees { 0 } else { self.dense },
                ..StepInput::default()
            },
            page: self.page,
            tables: Vec::new(),
            trees: BTreeMap::new(),
        };
        let mut known = BTreeMap::new();
        let (mut token, mut new_token) = (0, 0);
        for (nth, seed) in self.seeds.iter().enumerate() {
            let kv_len = self.kv_len(seed);
            let (loner, aligned) = (seed.path[0] == LONER, kv_len as i32 - seed.q_len as i32);
            let origin = if loner && !trees { seed.origin } else { 0 };
            let evicted = self.evicted(seed.path[0]);
            let len = origin + kv_len;
            let at = |at: i32| at.clamp(-(seed.q_len as i32), kv_len as i32);
            let mut s = StepSequence {
                token,
                q_len: seed.q_len,
                q_start: seed.at.map_or(aligned, at),
                kv_len,
                origin,
                begin: evicted.saturating_sub(origin),
                mask: MaskPlace { key: -(kv_len as i32), ..MaskPlace::default() },
                nth: nth as u32,
                ..StepSequence::default()
            };
            let table = self.table(nth, len, &mut known);
            (s.pages, s.cuts) = world.add_table(&table, evicted / self.page);
            world.tables.push(table);
            if let Some(bits) = seed.tree.filter(|_| trees && seed.q_len <= seed.own) {
                s.q_start = aligned;
                s.mask = world.add_tree(nth, &s, bits);
            }
            let new_len = seed.new.min(len - evicted);
            let slot = len - new_len;
            world.input.sequences.push(s);
            world.input.appends.push(StepAppend {
                token: new_token,
                len: new_len,
                slot,
                position: slot + 3,
                pages: s.pages,
                cuts: s.cuts,
                nth: nth as u32,
            });
            // Some tokens lie between.
            token += seed.q_len + seed.own % 2;
            new_token += new_len;
        }
        for level in 0..LEVELS {
            self.share(level, spec, &mut world.input);
        }
        world
    }

    /// The pages of a sequence of `len` tokens: those of a prefix are those of others, too.
    fn table(&self, nth: usize, len: u32, known: &mut BTreeMap<(Vec<u8>, u32), Page>) -> Vec<Page> {
        let path = self.seeds[nth].path;
        let pages = (0..len.div_ceil(self.page)).map(|page| {
            let common = |level: &usize| page * self.page < self.end(path, *level);
            let level = (0..LEVELS).find(common).filter(|_| path[0] != LONER);
            let owner = level.map_or(vec![99, nth as u8], |level| path[..=level].to_vec());
            let id = known.len();
            // Pages of a shard come in runs.
            let shard = self.shard_of[(id / 3) % self.shard_of.len()] % self.shards;
            let local = known.values().filter(|(other, _)| *other == shard).count() as u32;
            *known.entry((owner, page)).or_insert((shard, local))
        });
        pages.collect()
    }

    /// Sequences that begin alike share the keys behind those which they share with more.
    fn share(&self, level: usize, spec: &AttentionSpec, input: &mut StepInput) {
        let mut groups: BTreeMap<&[u8], Vec<u32>> = BTreeMap::new();
        for (nth, seed) in self.seeds.iter().enumerate().filter(|(_, s)| s.path[0] != LONER && s.q_len > 0) {
            groups.entry(&seed.path[..=level]).or_default().push(nth as u32);
        }
        for members in groups.into_values().filter(|members| members.len() > 1) {
            let any = input.sequences[members[0] as usize];
            let key_end = self.end(self.seeds[members[0] as usize].path, level);
            let seen = |m: &u32| {
                let s = &input.sequences[*m as usize];
                spec.visible(i64::from(s.q_start), s.kv_len).start
            };
            let seen = members.iter().map(seen).min().filter(|_| self.seen).unwrap_or(0);
            let key_begin = any.own_from.max(any.begin).max(seen);
            if key_begin >= key_end {
                continue;
            }
            for member in &members {
                assert_eq!(input.sequences[*member as usize].own_from, any.own_from);
                input.sequences[*member as usize].own_from = key_end;
            }
            let span = Span { first: input.members.len() as u32, count: members.len() as u32 };
            input.members.extend(members);
            let (pages, cuts) = (any.pages, any.cuts);
            input.shared.push(Shared { key_begin, key_end, pages, members: span, cuts });
        }
    }
}

impl World {
    /// The next word, as shaders count.
    fn next_word(&self) -> u32 {
        self.input.dense as u32 + self.input.words.len() as u32
    }

    /// Writes the page table of a sequence that has lost its first pages, and says where it is and where its slots go from shard to
    /// shard.
    fn add_table(&mut self, table: &[Page], lost: u32) -> (u32, Span) {
        let pages = self.next_word().wrapping_sub(lost);
        let mut cuts: Vec<Cut> = Vec::new();
        let kept = || (lost..).zip(&table[lost as usize..]);
        for (nth, (shard, local)) in kept() {
            self.input.words.push(*local);
            let end = (nth + 1) * self.page;
            match cuts.last_mut() {
                Some(last) if last.shard == *shard => last.end = end,
                _ => cuts.push(Cut { end, shard: *shard }),
            }
        }
        if kept().next().is_none() {
            self.input.words.push(0);
        }
        if self.input.shards == 1 {
            cuts.clear();
        }
        let span = Span { first: self.input.cuts.len() as u32, count: cuts.len() as u32 };
        self.input.cuts.extend(cuts);
        (pages, span)
    }

    /// Writes a tree whose tokens see some of those in front of them.
    fn add_tree(&mut self, nth: usize, s: &StepSequence, bits: u64) -> MaskPlace {
        let word = self.next_word();
        let mut turns = Vec::new();
        for i in 0..s.q_len {
            let seen = (bits.rotate_left(i) & ((1 << i) - 1)) | (1 << i);
            self.input.words.extend([seen as u32, (seen >> 32) as u32]);
            turns.push(s.q_start + seen.count_ones() as i32 - 1);
        }
        self.trees.insert(nth, turns);
        MaskPlace { word, head: 0, token: 2, key: -s.q_start }
    }
}
