//! Good and damaged files.

mod bad;
mod features;

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

    /// With everything else that a case can have.
    fn full() -> Self {
        Self::good()
            .put("mask", "U8", &[2, 1, 3, 5], [1, 0].repeat(15))
            .with("sinks", "F32", &[4])
            .with("alibi_slopes", "F32", &[4])
            .meta("window_left", "3")
            .meta("window_right", "2")
            .meta("softcap", "30.0")
            .meta("mask_kind", "keep")
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

    fn floats(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.put(name, "F32", shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
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
    assert_eq!((spec.q_dtype(), spec.k_dtype(), spec.scale()), (Dtype::F32, Dtype::F16, 0.25));
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
    let problem = case.problem(Dtype::F16, Dtype::Bf16).unwrap();
    assert_eq!(problem.weights.sinks.len(), if problem.spec.sinks() { q_heads } else { 0 });
    assert_eq!(problem.mask.is_some(), problem.spec.mask().is_dense());
    if let Some(mask) = problem.mask {
        assert_eq!(mask.values.len(), mask.extents.iter().map(|n| *n as usize).product::<usize>());
    }
    assert_eq!(case.position(rows, 1), [batch, 0, 0, 0]);
}

#[test]
fn damage_is_refused_or_harmless() {
    let good = Draft::full().bytes();
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
