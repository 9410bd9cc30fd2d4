//! Good, unsupported, damaged and hostile files.

use super::*;

/// A file to be spoilt: names, dtypes, shapes and bytes of tensors.
#[derive(Clone)]
struct Draft {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, String, Vec<usize>, Vec<u8>)>,
}

impl Draft {
    /// Batch 2, heads 4/2, 3 queries, 5 keys, dims 4 and 6: 24 rows of queries, 20 of keys.
    fn good() -> Self {
        let draft = Self { metadata: Vec::new(), tensors: Vec::new() };
        draft
            .with("q", "F32", &[2, 4, 3, 4])
            .with("k", "F32", &[2, 2, 5, 4])
            .with("v", "F32", &[2, 2, 5, 6])
            .with("out", "F32", &[2, 4, 3, 6])
            .with("lse", "F32", &[2, 4, 3])
            .ints("kv_lens", &[5, 2])
            .ints("q_lens", &[1, 3])
            .meta("scale", "0.5")
            .meta("causal", "true")
            .meta("source", "this test")
    }

    /// With tensor `name`, in place of one that there is; f32 elements are 0, 1, 2 ...
    fn with(self, name: &str, dtype: &str, shape: &[usize]) -> Self {
        let size = match dtype {
            "F64" | "I64" => 8,
            "F16" | "BF16" => 2,
            "U8" | "BOOL" => 1,
            _ => 4,
        };
        let count: usize = shape.iter().product();
        let data = match dtype {
            "F32" => (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect(),
            _ => vec![0; count * size],
        };
        self.put(name, dtype, shape, data)
    }

    fn ints(self, name: &str, values: &[i32]) -> Self {
        self.put(name, "I32", &[values.len()], values.iter().flat_map(|n| n.to_le_bytes()).collect())
    }

    fn put(mut self, name: &str, dtype: &str, shape: &[usize], data: Vec<u8>) -> Self {
        self = self.without(name);
        self.tensors.push((name.to_owned(), dtype.to_owned(), shape.to_vec(), data));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|t| t.0 != name);
        self
    }

    fn meta(mut self, key: &str, value: &str) -> Self {
        self.metadata.retain(|m| m.0 != key);
        self.metadata.push((key.to_owned(), value.to_owned()));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| format!("{k:?}:{v:?}")).collect();
        let mut json = format!("{{\"__metadata__\":{{{}}}", metadata.join(","));
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let from = data.len();
            data.extend_from_slice(bytes);
            json += &format!(",{name:?}:{}", entry(dtype, &format!("{shape:?}"), from, data.len()));
        }
        raw(&(json + "}"), &data)
    }
}

fn entry(dtype: &str, shape: &str, from: usize, to: usize) -> String {
    format!("{{\"dtype\":{dtype:?},\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
}

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn a_good_file_is_read_by_token() {
    let case = Case::parse(&Draft::good().bytes()).unwrap();
    let problem = case.problem(Dtype::F32, Dtype::F16).unwrap();
    let [first, second] = &problem.sequences[..] else { panic!("{problem:?}") };
    assert_eq!((first.q_len, first.kv_len, second.q_len, second.kv_len), (1, 5, 3, 2));
    assert_eq!(problem.spec.scale(), 0.5);
    assert!(problem.spec.causal());
    // Token 0 of heads 0, 1, 2, 3, each 3 tokens of 4 elements apart.
    assert_eq!(first.q[..8], [0.0, 1.0, 2.0, 3.0, 12.0, 13.0, 14.0, 15.0]);
    assert_eq!(second.v[..7], [60.0, 61.0, 62.0, 63.0, 64.0, 65.0, 90.0]);
    let lse = case.lse.as_ref().unwrap();
    assert_eq!(lse.values, [0, 3, 6, 9, 12, 15, 18, 21, 13, 16, 19, 22, 14, 17, 20, 23].map(f64::from));
    // Index 6 is the third row of the second sequence.
    assert_eq!(case.position(6, 1), [1, 2, 0, 0]);
    assert_eq!(case.position(9 * 6 + 5, 6), [1, 1, 1, 5]);
    assert_eq!(case.largest_value(), 101.0);
}

#[test]
fn nothing_but_q_k_v_is_needed() {
    let draft = Draft { metadata: Vec::new(), tensors: Vec::new() };
    let draft = draft.with("q", "BF16", &[1, 1, 0, 16]).with("k", "F16", &[1, 1, 0, 16]);
    let case = Case::parse(&draft.with("v", "F32", &[1, 1, 0, 8]).bytes()).unwrap();
    let spec = case.problem(case.default_dtype(), case.stored[1]).unwrap().spec;
    assert_eq!((spec.q_dtype(), spec.kv_dtype(), spec.scale()), (Dtype::F32, Dtype::F16, 0.25));
    assert!(!spec.causal());
}

#[test]
fn garbage_behind_a_length_is_never_read() {
    let nan = vec![0xff; 2 * 2 * 5 * 4 * 4];
    let draft = Draft::good().put("k", "F32", &[2, 2, 5, 4], nan).ints("kv_lens", &[0, 0]);
    let case = Case::parse(&draft.bytes()).unwrap();
    assert!(case.sequences.iter().all(|s| s.k.is_empty() && s.v.is_empty()));
    assert_eq!(case.largest_value(), 0.0);
}

#[test]
fn what_is_not_built_is_said() {
    let good = Draft::good;
    let cases = [
        ("mask", good().with("mask", "U8", &[1, 1, 3, 5])),
        ("mask", good().with("mask", "BF16", &[2, 4, 3, 1]).meta("mask_kind", "add")),
        ("sinks", good().with("sinks", "F32", &[4])),
        ("alibi_slopes", good().with("alibi_slopes", "F32", &[4])),
        ("window_left", good().meta("window_left", "0")),
        ("window_right", good().meta("window_right", "7")),
        ("softcap", good().meta("softcap", "30.0")),
    ];
    for (what, draft) in cases {
        let error = Case::parse(&draft.bytes());
        assert_eq!(error, Err(CaseError::Unsupported(what.to_owned())));
    }
}

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
        (good().meta("softcap", "0"), "`softcap` is \"0\", but it must be a positive number"),
        (good().meta("mask_kind", "xor"), "it must be keep or add"),
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
        (thin.clone().with("q", "F32", &[2, 4, 3, 257]).with("k", "F32", &[2, 2, 5, 257]), "head_dim is 257"),
        (thin.clone().with("v", "F32", &[2, 2, 5, 0]), "v_head_dim is 0"),
        (thin.clone().with("v", "F32", &[2, 2, 5, 300]), "v_head_dim is 300"),
        (
            // 70 000 rows of one element ask for rows of 256.
            thin.clone().with("q", "F16", &[1, 1, 70_000, 1]).with("k", "F16", &[1, 1, 0, 1]).with(
                "v",
                "F16",
                &[1, 1, 0, 256],
            ),
            "too many for this file",
        ),
        (
            // Nothing at all, but heads of a batch for which the cache must have a slot.
            thin.with("q", "F16", &[4000, 60_000, 0, 1]).with("k", "F16", &[4000, 60_000, 0, 1]).with(
                "v",
                "F16",
                &[4000, 60_000, 0, 1],
            ),
            "too many for this file",
        ),
    ]
}

#[test]
fn bad_files_say_what_is_wrong() {
    let cases = bad_cases().into_iter().map(|(draft, words)| (draft.bytes(), words));
    for (file, words) in bad_containers().into_iter().chain(cases) {
        match Case::parse(&file) {
            Err(CaseError::Unsupported(what)) => panic!("{words:?}: said to be without {what}"),
            Err(error) => assert!(error.to_string().contains(words), "{words:?} is not in: {error}"),
            Ok(case) => panic!("{words:?}: accepted as {case:?}"),
        }
    }
}

/// That every vector of a case that was accepted is as long as its extents and lengths say.
fn check(case: &Case) {
    let Extents { batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim } = case.extents;
    assert_eq!(case.sequences.len(), batch);
    for s in &case.sequences {
        let (q_rows, kv_rows) = (s.q_len as usize, s.kv_len as usize);
        assert!(q_rows <= q_len && kv_rows <= kv_len);
        assert_eq!(s.q.len(), q_rows * q_heads * head_dim);
        assert_eq!(s.k.len(), kv_rows * kv_heads * head_dim);
        assert_eq!(s.v.len(), kv_rows * kv_heads * v_head_dim);
    }
    let rows: usize = case.q_lens().map(|n| n * q_heads).sum();
    assert!(case.out.as_ref().is_none_or(|out| out.values.len() == rows * v_head_dim));
    assert!(case.lse.as_ref().is_none_or(|lse| lse.values.len() == rows));
    assert!(case.problem(Dtype::F16, Dtype::Bf16).is_ok());
    assert_eq!(case.position(rows, 1), [batch, 0, 0, 0]);
}

#[test]
fn damage_is_refused_or_harmless() {
    let good = Draft::good().bytes();
    let header = 8 + u64::from_le_bytes(*good.first_chunk().unwrap()) as usize;
    let mut rng = fastrand::Rng::with_seed(7);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut file = good.clone();
        for _ in 0..rng.usize(1..4) {
            // Most of the damage where it matters.
            let end = if rng.u32(..8) > 0 { header } else { file.len() };
            let at = rng.usize(..end);
            match rng.u32(..5) {
                0 => file[at] = rng.u8(..),
                1 => file[at] ^= 1 << rng.u32(..8),
                2 => file[at] = b"0123456789[]{},\":-"[rng.usize(..18)],
                3 => drop(file.drain(at..(at + rng.usize(..5)).min(file.len()))),
                _ => file.truncate(at.max(header)),
            }
            if file.len() < header {
                break;
            }
        }
        match Case::parse(&file) {
            Ok(case) => {
                check(&case);
                accepted += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(accepted > 100 && refused > 10_000, "{accepted} accepted, {refused} refused");
    for end in 0..good.len() {
        assert!(Case::parse(&good[..end]).is_err(), "accepted the first {end} bytes");
    }
}
