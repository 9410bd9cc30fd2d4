//! Attention over Burn tensors against the same in Burn's own operations, with K/V heads expanded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor};
use common::{assert_close, numbers, open, random, tensor};
use gqa_burn::{
    AttentionSpec, CacheShape, Dtype, Error, GqaAttention, KvCache, Mask, Options, PagedShape, Sequence, gqa,
};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 40;

/// `[tokens, heads, dim]` each; `mask` is added to the logits, `[heads or 1, tokens, keys]`.
fn expanded([q, k, v]: [Tensor<3>; 3], mask: Tensor<3>) -> Tensor<3> {
    let expand = |x: Tensor<3>| {
        let [tokens, heads, dim] = x.dims();
        let group = HEADS / heads;
        x.reshape([tokens, heads, 1, dim]).expand([tokens, heads, group, dim]).reshape([tokens, HEADS, dim])
    };
    let [q, k, v] = [q, expand(k), expand(v)].map(|x| x.swap_dims(0, 1));
    let logits = q.matmul(k.swap_dims(1, 2)).mul_scalar((DIM as f64).powf(-0.5)) + mask;
    softmax(logits, 2).matmul(v).swap_dims(0, 1)
}

/// -1e9 where a key is later than the query, which is one of the last.
fn causal(tokens: usize, keys: usize, device: &Device) -> Tensor<3> {
    let hidden = |i: usize| (i % keys > i / keys + keys - tokens) as u8 as f32 * -1e9;
    tensor((0..tokens * keys).map(hidden).collect(), [1, tokens, keys], device)
}

fn spec() -> AttentionSpec {
    AttentionSpec::builder(HEADS as u32, KV_HEADS as u32, DIM as u32).kv_dtype(Dtype::F32).build().unwrap()
}

fn qkv(tokens: usize, device: &Device) -> [Tensor<3>; 3] {
    [HEADS, KV_HEADS, KV_HEADS].map(|heads| random([tokens, heads, DIM], device))
}

#[test]
fn a_prefill_and_decodes_of_two_layers_contiguous_and_paged() {
    let (device, setup) = open();
    let spec = spec();
    let attention = GqaAttention::new(&setup, spec.clone()).unwrap();
    let contiguous =
        KvCache::new(&setup.device, &spec, CacheShape { layers: 2, sequences: 2, capacity: 64 }).unwrap();
    let shape = PagedShape { sequences: 2, page: 16, tokens: 128, longest_step: 64 };
    let paged = KvCache::paged(&setup.device, &[&spec; 2], shape).unwrap();
    for mut cache in [contiguous, paged] {
        let (long, short) = (cache.open().unwrap(), cache.open().unwrap());
        // What has come so far, of each layer and sequence.
        let mut seen: [[Option<[Tensor<3>; 2]>; 2]; 2] = Default::default();
        for lengths in [[21, 5], [1, 1], [1, 3]] {
            let total: usize = lengths.iter().sum();
            let sequences = [Sequence::new(long, lengths[0] as u32), Sequence::new(short, lengths[1] as u32)];
            let mut step = attention.begin(&mut cache, &sequences).unwrap();
            for (layer, seen) in seen.iter_mut().enumerate() {
                let new = qkv(total, &device);
                let out = attention.forward(&cache, &mut step, layer as u32, new.clone()).unwrap();
                let mut first = 0;
                for (len, seen) in lengths.into_iter().zip(seen) {
                    let [q, k, v] = new.clone().map(|x| x.narrow(0, first, len));
                    let all = match seen.take() {
                        None => [k, v],
                        Some([old_k, old_v]) => {
                            [Tensor::cat(vec![old_k, k], 0), Tensor::cat(vec![old_v, v], 0)]
                        }
                    };
                    *seen = Some(all.clone());
                    let mask = causal(len, all[0].dims()[0], &device);
                    let [k, v] = all;
                    let wanted = numbers(expanded([q, k, v], mask));
                    assert_close(&numbers(out.clone().narrow(0, first, len)), &wanted, 2e-5);
                    first += len;
                }
            }
        }
    }
}

#[test]
fn strided_tensors_are_read_where_they_are() {
    let (device, setup) = open();
    let attention = GqaAttention::new(&setup, spec()).unwrap();
    let shape = CacheShape { layers: 1, sequences: 1, capacity: 16 };
    let mut cache = KvCache::new(&setup.device, &spec(), shape).unwrap();
    let id = cache.open().unwrap();
    let sequences = [Sequence::new(id, 9)];
    // As one product makes them: parts of one tensor; and as `[heads, tokens, dim]`, turned.
    let fused = random([9, HEADS + 2 * KV_HEADS, DIM], &device);
    let part = |first, heads| fused.clone().narrow(1, first, heads);
    let parts = [part(0, HEADS), part(HEADS, KV_HEADS), part(HEADS + KV_HEADS, KV_HEADS)];
    let turned = [HEADS, KV_HEADS, KV_HEADS].map(|heads| random([heads, 9, DIM], &device).swap_dims(0, 1));
    for new in [parts, turned] {
        let mut step = attention.begin(&mut cache, &sequences).unwrap();
        let out = attention.forward(&cache, &mut step, 0, new.clone()).unwrap();
        let wanted = expanded(new, causal(9, 9, &device));
        assert_close(&numbers(out), &numbers(wanted), 2e-5);
        cache.truncate(id, 0).unwrap();
    }
}

#[test]
fn dense_masks() {
    let (device, setup) = open();
    let shape = CacheShape { layers: 1, sequences: 2, capacity: 16 };
    // A mask for each head and sequence, and one for all.
    for (sequences, heads) in [(2, HEADS), (1, 1)] {
        // Each query sees its own key: of a row that sees none the library makes 0, Burn a mean.
        let own = Tensor::<2>::eye(7, &device).mul_scalar(2.0).reshape([1, 1, 7, 7]);
        let keep = (random([sequences, heads, 7, 7], &device) - own).lower_elem(0.5);
        let add = random([sequences, heads, 7, 7], &device);
        let hidden =
            Tensor::zeros([sequences, heads, 7, 7], &device).mask_fill(keep.clone().bool_not(), -1e9);
        for (mask, added) in [(Mask::Keep, hidden), (Mask::Add, add)] {
            let spec = spec().to_builder().causal(false).mask(mask).build().unwrap();
            let attention = GqaAttention::new(&setup, spec.clone()).unwrap();
            let mut cache = KvCache::new(&setup.device, &spec, shape).unwrap();
            let batch = [0, 1].map(|_| Sequence::new(cache.open().unwrap(), 7));
            let mut step = attention.begin(&mut cache, &batch).unwrap();
            match mask {
                Mask::Keep => attention.keep_mask(&mut step, keep.clone()).unwrap(),
                _ => attention.add_mask(&mut step, added.clone()).unwrap(),
            }
            let new = qkv(14, &device);
            let out = attention.forward(&cache, &mut step, 0, new.clone()).unwrap();
            for nth in 0..2 {
                let of = |x: Tensor<3>| x.narrow(0, nth * 7, 7);
                let mask = added.clone().narrow(0, nth.min(sequences - 1), 1).squeeze_dim::<3>(0);
                let wanted = expanded(new.clone().map(of), mask);
                assert_close(&numbers(of(out.clone())), &numbers(wanted), 2e-5);
            }
        }
    }
}

#[test]
fn a_failed_call_keeps_the_mask() {
    let (device, setup) = open();
    let spec = spec().to_builder().causal(false).mask(Mask::Add).build().unwrap();
    let attention = GqaAttention::new(&setup, spec.clone()).unwrap();
    let shape = CacheShape { layers: 1, sequences: 1, capacity: 8 };
    let mut cache = KvCache::new(&setup.device, &spec, shape).unwrap();
    let id = cache.open().unwrap();
    let mut step = attention.begin(&mut cache, &[Sequence::new(id, 5)]).unwrap();
    let given: Vec<f32> = (0..25).map(|i| (i as f32).sin()).collect();
    let mask = tensor(given.clone(), [1, 1, 5, 5], &device);
    attention.add_mask(&mut step, mask.clone()).unwrap();
    // Burn computes in place where nobody else holds the numbers: the step does.
    let _changed = mask * 100.0;
    let new = qkv(5, &device);
    attention.forward(&cache, &mut step, 9, new.clone()).unwrap_err();
    let out = attention.forward(&cache, &mut step, 0, new.clone()).unwrap();
    let wanted = expanded(new, tensor(given, [1, 5, 5], &device));
    assert_close(&numbers(out), &numbers(wanted), 2e-5);
    // Of another shape, and of the wrong kind.
    let error = attention.add_mask(&mut step, random([1, 1, 4, 5], &device)).unwrap_err();
    assert!(error.to_string().contains("needed [1, 6, 5, 5], or 1 for all, found [1, 1, 4, 5]"), "{error}");
    let keep = Tensor::<4>::zeros([1, 1, 5, 5], &device).equal_elem(0.0);
    let error = attention.keep_mask(&mut step, keep).unwrap_err();
    assert!(error.to_string().contains("needed Mask::Add, found Mask::Keep"), "{error}");
    // And back.
    step.undo(&mut cache).unwrap();
    assert_eq!(cache.len(id).unwrap(), 0);
}

/// A step's mask is for the layers that ask for such a one: others go without, or are refused.
#[test]
fn a_mask_is_not_taken_for_another() {
    let (device, setup) = open();
    let with = |mask| {
        let spec = spec().to_builder().mask(mask).build().unwrap();
        GqaAttention::new(&setup, spec).unwrap()
    };
    let [added, kept, none] = [Mask::Add, Mask::Keep, Mask::None].map(with);
    let shape = CacheShape { layers: 1, sequences: 1, capacity: 8 };
    let mut cache = KvCache::new(&setup.device, added.spec(), shape).unwrap();
    let id = cache.open().unwrap();
    let mut step = added.begin(&mut cache, &[Sequence::new(id, 5)]).unwrap();
    added.add_mask(&mut step, random([1, 1, 5, 5], &device)).unwrap();
    let new = qkv(5, &device);
    let error = kept.forward(&cache, &mut step, 0, new.clone()).unwrap_err();
    let needed = "needed Mask::Keep beside f32, of 6 heads, found Mask::Add beside f32, of 1 heads";
    assert!(error.to_string().contains(needed), "{error}");
    let out = none.forward(&cache, &mut step, 0, new.clone()).unwrap();
    assert_close(&numbers(out), &numbers(expanded(new, causal(5, 5, &device))), 2e-5);
    let wide = AttentionSpec::builder(2 * HEADS as u32, 2, DIM as u32).mask(Mask::Add).build().unwrap();
    let wide = GqaAttention::new(&setup, wide).unwrap();
    let mut other = wide.begin(&mut cache, &[Sequence::new(id, 3)]).unwrap();
    wide.add_mask(&mut other, random([1, 2 * HEADS, 3, 8], &device)).unwrap();
    let error = added.forward(&cache, &mut other, 0, qkv(3, &device));
    assert!(error.unwrap_err().to_string().contains("of 12 heads"));
}

#[test]
fn layers_of_two_kinds_share_a_step() {
    let (device, setup) = open();
    // As in Gemma: every second layer sees 4 keys back.
    let global = spec();
    let local = global.to_builder().window(Some(4), None).build().unwrap();
    let attentions = [&local, &global].map(|spec| GqaAttention::new(&setup, spec.clone()).unwrap());
    let shape = PagedShape { sequences: 1, page: 16, tokens: 64, longest_step: 32 };
    let mut cache = KvCache::paged(&setup.device, &[&local, &global], shape).unwrap();
    let id = cache.open().unwrap();
    let mut step = attentions[0].begin(&mut cache, &[Sequence::new(id, 23)]).unwrap();
    for (layer, attention) in attentions.iter().enumerate() {
        let new = qkv(23, &device);
        let out = attention.forward(&cache, &mut step, layer as u32, new.clone()).unwrap();
        let far = |i: usize| (layer == 0 && i / 23 > i % 23 + 4) as u8 as f32 * -1e9;
        let window = tensor((0..23 * 23).map(far).collect(), [1, 23, 23], &device);
        let wanted = expanded(new, causal(23, 23, &device) + window);
        assert_close(&numbers(out), &numbers(wanted), 2e-5);
    }
}

#[test]
fn forks_share_their_prefix() {
    let (device, setup) = open();
    let spec = spec();
    let attention = GqaAttention::new(&setup, spec.clone()).unwrap();
    let shape = PagedShape { sequences: 3, page: 16, tokens: 96, longest_step: 32 };
    let mut cache = KvCache::paged(&setup.device, &[&spec], shape).unwrap();
    let first = cache.open().unwrap();
    let prefix = qkv(19, &device);
    let mut step = attention.begin(&mut cache, &[Sequence::new(first, 19)]).unwrap();
    attention.forward(&cache, &mut step, 0, prefix.clone()).unwrap();
    let second = cache.fork(first).unwrap();
    // Both go on, each with tokens of its own: the last page is copied before it is written.
    let sequences = [Sequence::new(first, 2), Sequence::new(second, 2)];
    let new = qkv(4, &device);
    let mut step = attention.begin(&mut cache, &sequences).unwrap();
    let out = attention.forward(&cache, &mut step, 0, new.clone()).unwrap();
    let [_, old_k, old_v] = prefix;
    for nth in 0..2 {
        let [q, k, v] = new.clone().map(|x| x.narrow(0, nth * 2, 2));
        let [k, v] =
            [(old_k.clone(), k), (old_v.clone(), v)].map(|(old, new)| Tensor::cat(vec![old, new], 0));
        let wanted = expanded([q, k, v], causal(2, 21, &device));
        assert_close(&numbers(out.clone().narrow(0, nth * 2, 2)), &numbers(wanted), 2e-5);
    }
}

#[test]
fn errors_name_the_tensor_and_leave_the_cache() {
    let (device, setup) = open();
    let spec = spec();
    let attention = GqaAttention::with_options(&setup, spec.clone(), Options::default()).unwrap();
    let shape = CacheShape { layers: 1, sequences: 1, capacity: 16 };
    let mut cache = KvCache::new(&setup.device, &spec, shape).unwrap();
    let id = cache.open().unwrap();
    let sequences = [Sequence::new(id, 4)];
    let mut step = attention.begin(&mut cache, &sequences).unwrap();
    let mut refuse = |new: [Tensor<3>; 3], layer, what: &str| {
        let error = attention.forward(&cache, &mut step, layer, new).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(cache.len(id).unwrap(), 4);
    };
    let [q, k, v] = qkv(4, &device);
    refuse([q.clone().narrow(0, 0, 3), k.clone(), v.clone()], 0, "q: the step's sequences have others");
    refuse([q.clone(), k.clone().narrow(0, 0, 3), v.clone()], 0, "k: the step's sequences have others");
    refuse([k.clone(), k.clone(), v.clone()], 0, "q: shape: needed [tokens, 6, 40], found [4, 2, 40]");
    refuse([q.clone(), q.clone(), v.clone()], 0, "k: shape");
    refuse([q.clone(), k.clone(), q.clone()], 0, "v: shape");
    refuse(
        [random([4, DIM, HEADS], &device).swap_dims(1, 2), k.clone(), v.clone()],
        0,
        "q: elements of a head",
    );
    refuse([q.clone(), k.clone(), v.clone()], 1, "layer 1");
    refuse([q.clone(), k.clone(), v.clone().narrow(0, 0, 2)], 0, "v: the step's sequences have others");
    // A step that comes to be prepared when the cache is another.
    let later = [Sequence::new(id, 2)];
    let mut step = attention.begin(&mut cache, &later).unwrap();
    cache.truncate(id, 5).unwrap();
    let error = attention.forward(&cache, &mut step, 0, qkv(2, &device)).unwrap_err();
    assert!(matches!(error, Error::Stale { index: 0, expected: 6, found: 5 }), "{error}");
    // No room: as the library says it.
    let error = attention.begin(&mut cache, &[Sequence::new(id, 99)]).unwrap_err();
    assert!(matches!(error, Error::Gqa(gqa::Error::SequenceFull { .. })), "{error:?}");
    assert_eq!(cache.len(id).unwrap(), 5);
}
