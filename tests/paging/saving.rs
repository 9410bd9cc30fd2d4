//! Files that are damaged, or do not fit: all are refused, and nothing has changed.

use fastrand::Rng;
use gqa::{AttentionSpec, Error, KvCache, Options, PagedShape, wgpu};

use super::common::{gpus, on_each};
use super::laws::tokens;
use super::world::{Lab, Part, World};

const PAGE: u32 = 4;

/// A cache for specs, one layer each.
fn cache(device: &wgpu::Device, layers: &[&AttentionSpec], sequences: u32, slots: u32) -> KvCache {
    let shape = PagedShape { sequences, page: PAGE, tokens: slots, longest_step: 8 };
    KvCache::paged(device, layers, shape).unwrap()
}

/// That a file is refused, and the cache is as it was.
fn refused(world: &mut World<'_>, bytes: &[u8], what: &str) -> Error {
    let before = world.cache.usage();
    let error = world.cache.restore(&world.lab.gpu.queue, bytes).expect_err(what);
    world.cache.check().unwrap();
    assert!(world.cache.usage() == before, "{what}: {before} became {}", world.cache.usage());
    error
}

#[test]
fn damaged_files_are_refused() {
    on_each(gpus(), |gpu| {
        let spec = AttentionSpec::builder(3, 1, 4).window(9, None).build().unwrap();
        let all = spec.to_builder().window(None, None).build().unwrap();
        let lab = Lab::new(&gpu, &spec, Options::default()).unwrap();
        let mut rng = Rng::with_seed(1);
        let layers = [&all, &spec];
        let mut world = World::new(&lab, cache(&gpu.device, &layers, 3, 128)).unwrap();
        let nth = world.open().unwrap();
        for len in [7, 8, 8, 8] {
            world.say(&[Part::silent(nth, &tokens(&mut rng, len))]).unwrap();
        }
        let id = world.texts[nth].id;
        world.cache.evict(id, 6).unwrap();
        let ask = [Part { q_len: 1, ..Part::new(nth, &[]) }];
        let answer = world.say(&ask).unwrap();
        let file = world.save(id).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;

        // Cut anywhere, or one bit of the header another.
        for len in (0..header + 9).chain((header + 9..file.len()).step_by(7)) {
            let error = refused(&mut world, &file[..len], "cut");
            assert!(matches!(error, Error::Field { field: "saved", .. }), "{len} bytes: {error}");
        }
        let mut longer = file.clone();
        longer.push(0);
        assert!(matches!(refused(&mut world, &longer, "longer"), Error::Field { field: "saved", .. }));
        for bit in 0..header * 8 {
            let mut damaged = file.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let what = format!("bit {bit}: {}", String::from_utf8_lossy(&damaged[..header]));
            let error = refused(&mut world, &damaged, &what);
            assert!(matches!(error, Error::Field { .. }), "{what}: {error}");
        }
        assert!(world.say(&ask).unwrap() == answer, "{}: another answer than before", gpu.name());

        // Whole, but for another cache.
        let other = |layers: &[&AttentionSpec], sequences, slots| {
            World::new(&lab, cache(&gpu.device, layers, sequences, slots)).unwrap()
        };
        let wider = spec.to_builder().window(30, None).build().unwrap();
        let longer = spec.to_builder().v_head_dim(8).build().unwrap();
        for layers in [&[&all, &wider][..], &[&all, &longer], &[&all], &[&all, &spec, &spec], &[&all, &all]] {
            let error = refused(&mut other(layers, 3, 128), &file, "for another cache");
            assert!(matches!(error, Error::Field { .. }), "{layers:?}: {error}");
        }
        let error = refused(&mut other(&layers, 3, 24), &file, "too long");
        assert!(matches!(error, Error::CacheFull { needed: 7, free: 6, .. }), "{error}");
        let mut full = other(&layers, 1, 128);
        full.cache.open().unwrap();
        assert_eq!(refused(&mut full, &file, "one too many"), Error::NoFreeSequence { capacity: 1 });
        // And where there is room, it is what it was; but of the window no more than is seen.
        let mut fits = other(&layers, 1, 128);
        let id = fits.cache.restore(&gpu.queue, &file).unwrap();
        assert_eq!((fits.cache.len(id), fits.cache.evicted(id)), (Ok(31), Ok(6)));
        let less = fits.save(id).unwrap();
        assert!(less.len() < file.len());
        let mut again = other(&layers, 1, 128);
        let id = again.cache.restore(&gpu.queue, &less).unwrap();
        assert!(again.save(id).unwrap() == less);
    });
}
