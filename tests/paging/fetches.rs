//! Proofs by counting: what several texts share is read once for all of them, and a window reads what it reaches.

use fastrand::Rng;
use gqa::verify::check;
use gqa::{AttentionSpec, Family, Options, Plan};

use super::common::{FAMILIES, gpus, on_each};
use super::laws::tokens;
use super::rings::{most, ring};
use super::world::{Lab, Part, World};

fn counting(family: Family) -> Options {
    Options { family, count_fetches: true, ..Options::default() }
}

/// Tiles that `rows` rows are cut into: each reads its keys once.
fn tiles(plan: &Plan, rows: u32) -> u32 {
    let decode = plan.decode().tile.rows;
    let tile = if rows <= decode.max(plan.spec().group()) { decode } else { plan.prefill().tile.rows };
    rows.div_ceil(tile)
}

/// One new token for each text, and the keys that were read for it; a fetch brings four elements of a key or a value.
fn keys_read(world: &mut World<'_>, texts: &[usize], rng: &mut Rng) -> u32 {
    let news: Vec<_> = texts.iter().map(|_| tokens(rng, 1)).collect();
    let parts: Vec<_> = texts.iter().zip(&news).map(|(nth, new)| Part::new(*nth, new)).collect();
    let output = world.say(&parts).unwrap();
    assert_eq!(check(&world.problem(&parts), &output), Ok(()), "{}", world.lab.gpu.name());
    let spec = &world.lab.spec;
    let each = spec.kv_heads() * (spec.head_dim() + spec.v_head_dim()) / 4;
    let fetches = world.fetches.unwrap();
    assert_eq!(fetches % each, 0);
    fetches / each
}

fn fork(world: &mut World<'_>, nth: usize) -> usize {
    let mut text = world.texts[nth].clone();
    text.id = world.cache.fork(text.id).unwrap();
    world.texts.push(text);
    world.texts.len() - 1
}

#[test]
fn a_shared_prefix_is_read_once_for_all_forks() {
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            for (kv_heads, group, prefix) in [(2, 3, 96), (1, 1, 64), (2, 2, 107)] {
                let spec =
                    AttentionSpec::builder(kv_heads * group, kv_heads, 36).v_head_dim(20).build().unwrap();
                let lab = Lab::new(&gpu, &spec, counting(family)).unwrap();
                let plan = lab.attention.plan();
                for forks in [2, 3, 7, 10] {
                    let what = format!("{}, {family:?}, group {group}, {forks} forks", gpu.name());
                    let mut rng = Rng::with_seed(1);
                    let (mut world, mut apart) = (lab.paged(16).unwrap(), lab.paged(16).unwrap());
                    let text = tokens(&mut rng, prefix);
                    let mut texts = vec![world.open().unwrap()];
                    world.say(&[Part::silent(0, &text)]).unwrap();
                    texts.extend((1..forks).map(|_| fork(&mut world, 0)));
                    for nth in 0..forks {
                        apart.open().unwrap();
                        apart.say(&[Part::silent(nth, &text)]).unwrap();
                    }
                    // A page that was not full is everyone's own once they go on.
                    let shared = prefix as u32 / 16 * 16;
                    for round in 1..3 {
                        let own = prefix as u32 - shared + round;
                        let count = forks as u32;
                        let found = keys_read(&mut world, &texts, &mut rng);
                        let expected = shared * tiles(plan, count * group) + count * own * tiles(plan, group);
                        assert_eq!(found, expected, "{what}, {plan}");
                        let found = keys_read(&mut apart, &texts, &mut rng);
                        assert_eq!(found, count * (shared + own) * tiles(plan, group), "{what}, apart");
                    }
                }
            }
        }
    });
}

/// What all share, what some of them share, and what each has for itself; also where what all share is too little.
#[test]
fn a_tree_of_forks_is_read_once_branch_by_branch() {
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            let spec = AttentionSpec::builder(2, 1, 32).build().unwrap();
            let lab = Lab::new(&gpu, &spec, counting(family)).unwrap();
            let (plan, mut rng) = (lab.attention.plan(), Rng::with_seed(1));
            for root in [64, 16] {
                let mut world = lab.paged(16).unwrap();
                world.open().unwrap();
                world.say(&[Part::silent(0, &tokens(&mut rng, root))]).unwrap();
                let branch = fork(&mut world, 0);
                world.say(&[Part::silent(branch, &tokens(&mut rng, 80))]).unwrap();
                let texts = [0, branch, fork(&mut world, branch), fork(&mut world, branch)];
                let found = keys_read(&mut world, &texts, &mut rng);
                // Less than 32 keys are not worth it.
                let expected = match root as u32 {
                    root if root < 32 => root + 1 + (root + 80) * tiles(plan, 3 * 2) + 3,
                    root => root * tiles(plan, 4 * 2) + 80 * tiles(plan, 3 * 2) + 4,
                };
                assert_eq!(found, expected, "{}, {family:?}, root of {root}", gpu.name());
            }
        }
    });
}

/// However long a text is: a decode reads the window, and a ring holds it.
#[test]
fn a_window_reads_and_keeps_what_it_reaches() {
    const WINDOW: u32 = 50;
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            let spec = AttentionSpec::builder(6, 2, 32).window(WINDOW, None).build().unwrap();
            let lab = Lab::new(&gpu, &spec, counting(family)).unwrap();
            let (mut world, mut rng) = (ring(&lab, 4, 3).unwrap(), Rng::with_seed(1));
            world.open().unwrap();
            for len in [60_u32, 200, 1000] {
                while world.texts[0].tokens.len() < len as usize {
                    let missing = len as usize - world.texts[0].tokens.len();
                    world.say(&[Part::silent(0, &tokens(&mut rng, missing.min(9)))]).unwrap();
                }
                assert_eq!(keys_read(&mut world, &[0], &mut rng), WINDOW + 1, "{}, {len}", gpu.name());
                let used = world.cache.usage().pools[1].used;
                assert!(used <= most(WINDOW, 4, 1), "{used} pages of 4 at {len} tokens");
            }
            // Forks read what their windows have in common once: 1001 tokens are there, pages end at 1000.
            let texts = [0, fork(&mut world, 0), fork(&mut world, 0)];
            let (from, own) = (1001 - WINDOW, 2);
            let plan = lab.attention.plan();
            let expected = (1000 - from) * tiles(plan, 9) + 3 * own * tiles(plan, 3);
            assert_eq!(keys_read(&mut world, &texts, &mut rng), expected, "{}, {family:?}", gpu.name());
        }
    });
}
