//! Layers with a window keep what the window reaches, and answer as if they kept all.

use fastrand::Rng;
use gqa::verify::{Gpu, check, same};
use gqa::{AttentionSpec, Dtype, KvCache, Options, PagedShape, Rope};

use super::common::{gpus, on_each};
use super::laws::tokens;
use super::world::{Lab, Part, World, text};

const LONGEST_STEP: u32 = 9;

/// A cache whose tested layer lets pages go.
pub(crate) fn ring<'a>(lab: &'a Lab<'a>, page: u32, sequences: u32) -> Result<World<'a>, String> {
    let all = lab.spec.to_builder().window(None, None).build().map_err(text)?;
    let shape = PagedShape { sequences, page, tokens: 4096, longest_step: LONGEST_STEP };
    World::new(lab, KvCache::paged(&lab.gpu.device, &[&all, &lab.spec], shape).map_err(text)?)
}

/// Most pages of the layer with a window that `sequences` need.
pub(crate) fn most(window: u32, page: u32, sequences: u32) -> u32 {
    ((window + LONGEST_STEP).div_ceil(page) + 1) * sequences
}

fn long_texts(gpu: &Gpu, spec: &AttentionSpec, page: u32) -> Result<(), String> {
    let lab = Lab::new(gpu, spec, Options::default())?;
    let window = spec.window_left().ok_or("no window")?;
    let (mut ring, mut whole) = (ring(&lab, page, 3)?, lab.paged(16)?);
    let mut rng = Rng::with_seed(page.into());
    let texts = [0; 2].map(|_| (ring.open(), whole.open()).0).into_iter().collect::<Result<Vec<_>, _>>()?;
    for step in 0..30 {
        // Prefills as long as they may be, and decodes.
        let news = [0; 2].map(|_| {
            let len = if step % 3 == 0 { LONGEST_STEP as usize } else { rng.usize(1..4) };
            tokens(&mut rng, len)
        });
        let parts: Vec<_> = texts.iter().map(|nth| Part::new(*nth, &news[*nth])).collect();
        let (found, expected) = (ring.say(&parts)?, whole.say(&parts)?);
        let problem = ring.problem(&parts);
        same(&problem, &found, &expected)?;
        if !problem.must_ask() {
            check(&problem, &found)?;
        }
        ring.cache.check()?;
        let used = ring.cache.usage().pools[1].used;
        if used > most(window, page, 2) {
            return Err(format!("{used} pages of {page} are in use, for {} will do", most(window, page, 2)));
        }
    }
    // As little as the window reaches is saved, and enough to go on with.
    let file = ring.save(ring.texts[0].id)?;
    ring.cache.close(ring.texts[0].id).map_err(text)?;
    ring.texts[0].id = ring.cache.restore(&gpu.queue, &file).map_err(text)?;
    let news = [1, LONGEST_STEP as usize].map(|len| tokens(&mut rng, len));
    let parts: Vec<_> = texts.iter().map(|nth| Part::new(*nth, &news[*nth])).collect();
    let (found, expected) = (ring.say(&parts)?, whole.say(&parts)?);
    same(&ring.problem(&parts), &found, &expected)?;
    // What is gone cannot be asked for, and cannot be gone back to.
    let far = Part { q_len: ring.texts[1].tokens.len() as u32, ..Part::new(texts[1], &[]) };
    let refused = [ring.say(&[far]).err(), ring.cache.truncate(ring.texts[1].id, 90).err().map(text)];
    match refused {
        [Some(asked), Some(cut)] if asked.contains("kept the keys") && cut.contains("given back") => Ok(()),
        other => Err(format!("not refused: {other:?}")),
    }
}

#[test]
fn rings_give_what_windows_give() {
    on_each(gpus(), |gpu| {
        let builder = AttentionSpec::builder;
        let specs = [
            builder(6, 2, 16).window(0, None),
            builder(6, 2, 32).window(21, None).kv_dtype(Dtype::Q4),
            builder(8, 1, 24).window(40, None).rope(Rope::new(24)).sinks(true),
        ];
        for spec in specs.map(|builder| builder.build().unwrap()) {
            for page in [1, 4, 16] {
                let result = long_texts(&gpu, &spec, page);
                assert_eq!(result, Ok(()), "{}, pages of {page}, {spec:?}", gpu.name());
            }
        }
    });
}
