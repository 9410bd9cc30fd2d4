//! Masks, and what bends or adds to logits.

use super::*;

/// The mask as [`Case::problem`] gives it.
fn mask(draft: &Draft, dtype: Dtype) -> (Mask, ProblemMask) {
    let problem = Case::parse(&draft.bytes()).unwrap().problem(dtype, Dtype::F32).unwrap();
    (problem.spec.mask(), problem.mask.unwrap())
}

#[test]
fn the_spec_has_what_the_file_asks_for() {
    let case = Case::parse(&Draft::full().bytes()).unwrap();
    let Problem { spec, weights, .. } = case.problem(Dtype::F32, Dtype::F32).unwrap();
    assert_eq!((spec.window_left(), spec.window_right()), (Some(3), Some(2)));
    assert_eq!(spec.softcap(), Some(30.0));
    assert_eq!(spec.alibi(), Some(&[0.0, 1.0, 2.0, 3.0][..]));
    assert!(spec.sinks());
    assert_eq!(weights.sinks, [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(spec.mask(), Mask::Keep);

    let problem = Case::parse(&Draft::good().bytes()).unwrap().problem(Dtype::F32, Dtype::F32).unwrap();
    assert_eq!((problem.spec.window_left(), problem.spec.window_right()), (None, None));
    assert_eq!((problem.spec.softcap(), problem.spec.alibi(), problem.spec.mask()), (None, None, Mask::None));
    assert!(!problem.spec.sinks() && problem.mask.is_none());
    assert_eq!(problem.weights, Weights::default());
}

#[test]
fn one_window_may_be_alone() {
    for (left, right) in [(Some(7), None), (None, Some(0)), (Some(i32::MAX as u32), None)] {
        let mut draft = Draft::good();
        for (key, keys) in [("window_left", left), ("window_right", right)] {
            draft = keys.iter().fold(draft, |draft, n| draft.meta(key, &n.to_string()));
        }
        let spec = Case::parse(&draft.bytes()).unwrap().spec(Dtype::F32, Dtype::F32).unwrap();
        assert_eq!((spec.window_left(), spec.window_right()), (left, right));
    }
}

#[test]
fn integers_keep_and_floats_are_added() {
    // Halves as f16 and bf16.
    let small = |name, bits: u16| Draft::good().put("mask", name, &[1, 1, 1, 1], bits.to_le_bytes().to_vec());
    let cases = [
        (Draft::good().put("mask", "U8", &[1, 1, 1, 1], vec![1]), Mask::Keep, 1.0, None),
        (Draft::good().put("mask", "BOOL", &[1, 1, 1, 1], vec![0]), Mask::Keep, 0.0, None),
        (Draft::good().floats("mask", &[1, 1, 1, 1], &[-0.25]), Mask::Add, -0.25, Some(Dtype::F32)),
        (small("F16", 0x3800), Mask::Add, 0.5, Some(Dtype::F16)),
        (small("BF16", 0x3f00), Mask::Add, 0.5, Some(Dtype::Bf16)),
        (
            Draft::good().floats("mask", &[1, 1, 1, 1], &[1.0]).meta("mask_kind", "keep"),
            Mask::Keep,
            1.0,
            None,
        ),
    ];
    for (draft, kind, value, stored) in cases {
        let expected = ProblemMask { extents: [1; 4], values: vec![value], gaps: false };
        assert_eq!(mask(&draft, Dtype::F32), (kind, expected));
        assert_eq!(Case::parse(&draft.bytes()).unwrap().stored_mask(), stored);
    }
}

#[test]
fn masks_keep_their_order_and_extents() {
    let values: Vec<f32> = (0..2 * 4 * 3 * 5).map(|i| i as f32).collect();
    let free = Draft::good().without("kv_lens").without("q_lens");
    for extents in [[2, 4, 3, 5], [1, 4, 3, 5], [2, 1, 1, 5], [2, 4, 3, 1], [1, 1, 3, 1]] {
        let values = &values[..extents.iter().product()];
        let (_, mask) = mask(&free.clone().floats("mask", &extents, values), Dtype::F32);
        assert_eq!(mask.extents, extents.map(|n| n as u32));
        assert_eq!(mask.values, values);
    }
}

#[test]
fn added_masks_are_stored_as_queries() {
    let draft = Draft::good().floats("mask", &[1, 4, 1, 1], &[0.1, f32::NEG_INFINITY, f32::MIN, -3.0]);
    assert_eq!(mask(&draft, Dtype::F32).1.values, [0.1, f32::NEG_INFINITY, f32::MIN, -3.0]);
    let halves = [0.099_975_586, f32::NEG_INFINITY, f32::NEG_INFINITY, -3.0];
    assert_eq!(mask(&draft, Dtype::F16).1.values, halves);
}

/// Sequences have 1 query and 5 keys, and 3 queries and 2 keys.
#[test]
fn garbage_of_a_mask_is_dropped_where_no_pair_reads_it() {
    let nan = |extents: [usize; 4], read: &[usize]| {
        let mut values = vec![f32::NAN; extents.iter().product()];
        read.iter().for_each(|at| values[*at] = 1.0);
        let (_, mask) = mask(&Draft::good().floats("mask", &extents, &values), Dtype::F32);
        let expected: Vec<_> = (0..values.len()).map(|i| f32::from(u8::from(read.contains(&i)))).collect();
        assert_eq!(mask.values, expected);
    };
    nan([2, 1, 3, 5], &[0, 1, 2, 3, 4, 15, 16, 20, 21, 25, 26]);
    nan([1, 1, 3, 5], &[0, 1, 2, 3, 4, 5, 6, 10, 11]);
    nan([2, 1, 1, 5], &[0, 1, 2, 3, 4, 5, 6]);
    nan([2, 1, 3, 1], &[0, 3, 4, 5]);
    let none = Draft::good().ints("kv_lens", &[0, 0]).floats("mask", &[1, 1, 1, 1], &[f32::NAN]);
    assert_eq!(mask(&none, Dtype::F32).1.values, [0.0]);
}
