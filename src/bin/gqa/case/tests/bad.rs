//! Files that are refused, and what is said of them.

use super::*;

/// Files that are wrong as containers, and words of the error.
fn bad_containers() -> Vec<(Vec<u8>, &'static str)> {
    let good = Draft::good().bytes();
    let one = |shape, from, to| format!("{{\"q\":{}}}", entry("F32", shape, from, to));
    let two = |[a, b, c, d]: [usize; 4]| {
        format!("{{\"q\":{},\"k\":{}}}", entry("U8", "[4]", a, b), entry("U8", "[4]", c, d))
    };
    let q = entry("U8", "[0]", 0, 0);
    vec![
        (Vec::new(), "it has 0 bytes"),
        (good[..7].to_vec(), "fewer than the 8"),
        (good[..100].to_vec(), "but only 92 follow"),
        (good[..good.len() - 1].to_vec(), "truncated"),
        ([&good[..], &[0]].concat(), "1 bytes follow behind its last tensor"),
        (vec![0xff; 64], "claims 18446744073709551615 bytes, more than 1048576"),
        (raw("", &[]), "EOF"),
        (raw("{", &[]), "EOF"),
        (raw("{}{}", &[]), "trailing"),
        (raw("[]", &[]), "an object of tensors"),
        ([&2u64.to_le_bytes()[..], &[0xc3, 0x28]].concat(), "its header"),
        (raw(&"[".repeat(100_000), &[]), "its header"),
        (raw(&format!("{{\"q\":{q},\"q\":{q}}}"), &[]), "`q` appears twice"),
        (raw("{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", &[]), "`a` appears twice"),
        (raw("{\"__metadata__\":{},\"__metadata__\":{}}", &[]), "`__metadata__` appears twice"),
        (raw("{\"__metadata__\":{\"scale\":1}}", &[]), "expected a string"),
        (raw("{\"q\":{\"dtype\":\"F32\",\"shape\":[0]}}", &[]), "data_offsets"),
        (raw(&format!("{{\"q\":{}}}", entry("F31", "[0]", 0, 0)), &[]), "unknown variant `F31`"),
        (raw(&one("[-1]", 0, 0), &[]), "-1"),
        (raw(&one("[1e3]", 0, 0), &[]), "its header"),
        (raw(&one("[2]", 0, 4), &[0; 4]), "do not fit F32 [2]"),
        (raw(&one("[1]", 4, 0), &[0; 4]), "`q` starts at byte 4, but the one before ends at 0"),
        (raw(&one("[4611686018427387904,4]", 0, 0), &[]), "do not fit"),
        (raw(&one("[18446744073709551615,2]", 0, 8), &[0; 8]), "do not fit"),
        (raw(&one("[1]", 0, usize::MAX), &[0; 8]), "ends at byte 18446744073709551615"),
        (raw(&two([0, 4, 5, 9]), &[0; 9]), "`k` starts at byte 5, but the one before ends at 4"),
        (raw(&two([0, 4, 3, 7]), &[0; 7]), "`k` starts at byte 3, inside another, which ends at 4"),
        (raw(&two([0, 4, 0, 4]), &[0; 4]), "inside another"),
        (raw(&two([4, 8, 0, 4]), &[0; 8]), "`v` is missing"),
        (raw(&format!("{{\"q\":{}}}", entry("F4", "[3]", 0, 1)), &[0]), "do not fit F4 [3]"),
        (raw("{}", &[]), "`q` is missing"),
    ]
}

/// Files that are wrong as cases, and words of the error.
fn bad_cases() -> Vec<(Draft, &'static str)> {
    let good = Draft::good;
    let huge = 1 << 40;
    let thin = good().without("out").without("lse").without("kv_lens").without("q_lens");
    vec![
        (good().without("k"), "`k` is missing"),
        (good().with("q", "F64", &[2, 4, 3, 4]), "`q` is F64, but it must be F32 or F16 or BF16"),
        (good().with("q", "F32", &[2, 4, 12]), "`q` has shape [2, 4, 12], but it must have 4 dimensions"),
        (good().with("k", "F32", &[1, 2, 5, 4]), "`k` has batch 1, but it must be 2"),
        (good().with("v", "F32", &[3, 2, 5, 4]), "`v` has batch 3, but it must be 2"),
        (good().with("k", "F32", &[2, 2, 5, 3]), "`k` has head_dim 3, but it must be 4"),
        (good().with("v", "F32", &[2, 1, 5, 6]), "`v` has kv_heads 1, but it must be 2"),
        (good().with("v", "F32", &[2, 2, 4, 6]), "`v` has kv_len 4, but it must be 5"),
        (good().with("q", "F32", &[2, 3, 3, 4]).without("out").without("lse"), "kv_heads is 2"),
        (
            good().with("out", "F32", &[2, 4, 3, 4]),
            "`out` has shape [2, 4, 3, 4], but it must be [2, 4, 3, 6]",
        ),
        (good().with("out", "BF16", &[2, 4, 3, 6]), "`out` is BF16"),
        (good().with("lse", "F32", &[2, 4, 3, 1]), "`lse` has shape"),
        (good().with("lse", "F16", &[2, 4, 3]), "`lse` is F16, but it must be F32"),
        (good().with("kv_lens", "I64", &[2]), "`kv_lens` is I64, but it must be I32"),
        (good().ints("kv_lens", &[1, 2, 3]), "`kv_lens` has shape [3], but it must be [2]"),
        (good().ints("kv_lens", &[1, -1]), "`kv_lens` has -1 at index 1, but it must lie in 0..=5"),
        (good().ints("kv_lens", &[6, 1]), "`kv_lens` has 6 at index 0"),
        (
            good().ints("q_lens", &[1, i32::MAX]),
            "`q_lens` has 2147483647 at index 1, but it must lie in 0..=3",
        ),
        (good().ints("q_lens", &[i32::MIN, 0]), "`q_lens` has -2147483648"),
        (good().with("mask", "U8", &[3, 5]), "`mask` has shape [3, 5], but it must be [2, 4, 3, 5]"),
        (good().with("mask", "U8", &[2, 2, 3, 5]), "`mask` has shape"),
        (good().with("mask", "I32", &[1, 1, 3, 5]), "`mask` is I32"),
        (good().with("sinks", "F32", &[2]), "`sinks` has shape [2], but it must be [4]"),
        (good().with("alibi_slopes", "F16", &[4]), "`alibi_slopes` is F16"),
        (good().with("bias", "F32", &[4]), "`bias` is not part of the format"),
        (good().meta("window", "3"), "`window` is \"3\", but the format has no such key"),
        (good().meta("scale", "NaN"), "`scale` is \"NaN\", but it must be a finite number"),
        (good().meta("scale", "inf"), "finite"),
        (good().meta("scale", "1e300"), "finite"),
        (good().meta("scale", ""), "finite"),
        (good().meta("causal", "True"), "`causal` is \"True\", but it must be true or false"),
        (good().meta("q_start", "1.5"), "`q_start`"),
        (good().meta("q_start", "2147483648"), "within +-2^31"),
        (good().meta("q_start", "-2147483648"), "within +-2^31"),
        (good().meta("window_left", "-1"), "`window_left`"),
        (good().meta("window_right", "99999999999"), "`window_right`"),
        (good().meta("window_left", "4294967295"), "at least 0 and below 2^31"),
        (good().meta("softcap", "0"), "softcap is 0: it must"),
        (good().meta("softcap", "-1"), "softcap is -1: it must"),
        (good().meta("softcap", "NaN"), "`softcap` is \"NaN\", but it must be a finite number"),
        (good().meta("mask_kind", "xor"), "it must be keep or add"),
        (
            good().with("mask", "U8", &[1, 1, 3, 5]).meta("mask_kind", "add"),
            "`mask_kind` is \"add\", but only a mask of floats can be added",
        ),
        (
            good().put("mask", "BOOL", &[1, 1, 3, 1], vec![1, 0, 2]),
            "`mask` has 2 at [0, 0, 2, 0], but it must be 0 or 1",
        ),
        (
            good()
                .floats("mask", &[1, 1, 1, 5], &[1.0, 0.0, f32::NEG_INFINITY, 0.0, 1.0])
                .meta("mask_kind", "keep"),
            "`mask` has -inf at [0, 0, 0, 2], but it must be 0 or 1",
        ),
        (
            good().floats("mask", &[2, 1, 1, 1], &[0.0, f32::NAN]),
            "`mask` has NaN at [1, 0, 0, 0], but it must be a finite number or -inf",
        ),
        (
            good().floats("mask", &[1, 4, 1, 1], &[0.0, 0.0, 0.0, f32::INFINITY]),
            "`mask` has inf at [0, 3, 0, 0]",
        ),
        (
            good().floats("sinks", &[4], &[0.0, f32::NAN, 0.0, 0.0]),
            "`sinks` has NaN at index 1, but it must be a finite number",
        ),
        (good().floats("sinks", &[4], &[0.0, 0.0, f32::INFINITY, 0.0]), "`sinks` has inf at index 2"),
        (good().floats("alibi_slopes", &[4], &[f32::NAN; 4]), "`alibi_slopes` has NaN at index 0"),
        (good().floats("alibi_slopes", &[4], &[f32::NEG_INFINITY; 4]), "alibi is -inf: "),
        (
            thin.clone().with("q", "F32", &[0, 4, 3, 4]).with("k", "F32", &[0, 2, 5, 4]).with(
                "v",
                "F32",
                &[0, 2, 5, 4],
            ),
            "batch 0",
        ),
        (
            thin.clone().with("q", "F32", &[huge, 4, 0, 4]).with("k", "F32", &[huge, 2, 0, 4]).with(
                "v",
                "F32",
                &[huge, 2, 0, 4],
            ),
            "it must lie in 1..=4096",
        ),
        (thin.clone().with("q", "F32", &[2, huge, 0, 4]), "q_heads"),
        (thin.clone().with("k", "F32", &[2, 0, 5, 4]).with("v", "F32", &[2, 0, 5, 4]), "kv_heads is 0"),
        (
            thin.clone().with("k", "F32", &[2, 0, huge, 4]).with("v", "F32", &[2, 0, huge, 4]),
            "must be below 2^31",
        ),
        (thin.clone().with("q", "F32", &[2, 0, huge, 4]), "must be below 2^31"),
        (thin.clone().with("q", "F32", &[2, 4, 3, 0]).with("k", "F32", &[2, 2, 5, 0]), "head_dim is 0"),
        (thin.clone().with("q", "F32", &[2, 4, 3, 577]).with("k", "F32", &[2, 2, 5, 577]), "head_dim is 577"),
        (thin.clone().with("v", "F32", &[2, 2, 5, 0]), "v_head_dim is 0"),
        (thin.clone().with("v", "F32", &[2, 2, 5, 513]), "v_head_dim is 513"),
        (
            // 70 000 rows of one element ask for rows of 256.
            thin.clone().with("q", "F16", &[1, 1, 70_000, 1]).with("k", "F16", &[1, 1, 0, 1]).with(
                "v",
                "F16",
                &[1, 1, 0, 256],
            ),
            "makes the output larger than",
        ),
        (
            // One element that hides or keeps 5000 x 5000 pairs.
            thin.clone()
                .with("q", "F16", &[1, 1, 5000, 1])
                .with("k", "F16", &[1, 1, 5000, 1])
                .with("v", "F16", &[1, 1, 5000, 1])
                .with("mask", "U8", &[1, 1, 1, 1]),
            "`mask` makes the mask larger than 16777216 elements, too many for this file",
        ),
        (
            // Nothing at all, but heads of a batch for which the cache must have a slot.
            thin.with("q", "F16", &[4000, 60_000, 0, 1]).with("k", "F16", &[4000, 60_000, 0, 1]).with(
                "v",
                "F16",
                &[4000, 60_000, 0, 1],
            ),
            "makes the cache larger than",
        ),
    ]
}

#[test]
fn bad_files_say_what_is_wrong() {
    let cases = bad_cases().into_iter().map(|(draft, words)| (draft.bytes(), words));
    for (file, words) in bad_containers().into_iter().chain(cases) {
        match Case::parse(&file) {
            Err(error) => assert!(error.to_string().contains(words), "{words:?} is not in: {error}"),
            Ok(case) => panic!("{words:?}: accepted as {case:?}"),
        }
    }
}
