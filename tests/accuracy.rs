//! What storage types cost on activations of a real model: relative errors of outputs, plain and with rows rotated. No GPU needed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use gqa::quant::{rotate, rotate_f64, stored};
use gqa::reference::{Problem, attention};
use gqa::{AttentionSpec, Dtype};

const LAYERS: [&[u8]; 3] = [
    include_bytes!("data/smollm2-layer00.safetensors"),
    include_bytes!("data/smollm2-layer14.safetensors"),
    include_bytes!("data/smollm2-layer29.safetensors"),
];
const Q_HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;

/// A tensor of a case, `[1, heads, tokens, DIM]` in F32 (docs/case-format.md), as `[tokens][heads][DIM]`.
fn tensor(file: &[u8], name: &str, heads: usize) -> Vec<f32> {
    let (len, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    assert_eq!((&header[name]["dtype"], &header["__metadata__"]["causal"]), (&"F32".into(), &"true".into()));
    let [from, to] = [0, 1].map(|i| header[name]["data_offsets"][i].as_u64().unwrap() as usize);
    let numbers: Vec<f32> =
        data[from..to].chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
    let rows: Vec<_> = numbers.chunks(DIM).collect();
    let tokens = rows.len() / heads;
    (0..tokens)
        .flat_map(|t| (0..heads).flat_map(move |h| [h * tokens + t]))
        .flat_map(|i| rows[i].to_vec())
        .collect()
}

/// The output with what `change` makes of the rows of queries, keys and values.
fn outputs(tensors: &[Vec<f32>; 3], change: impl Fn(usize, &[f32]) -> Vec<f32>) -> Vec<f64> {
    let spec = AttentionSpec::builder(Q_HEADS as u32, KV_HEADS as u32, DIM as u32).build().unwrap();
    let changed = |which: usize| -> Vec<f32> {
        tensors[which].chunks(DIM).flat_map(|row| change(which, row)).collect()
    };
    let (q, k, v) = (changed(0), changed(1), changed(2));
    let (q_len, kv_len) = (q.len() / Q_HEADS / DIM, k.len() / KV_HEADS / DIM);
    let problem = Problem { q: &q, k: &k, v: &v, q_len, kv_len, ..Problem::default() };
    attention(&spec, &problem).out
}

/// The Frobenius norm of the error over that of the output, and the largest error.
fn errors(exact: &[f64], got: &[f64]) -> [f64; 2] {
    let difference: Vec<_> = exact.iter().zip(got).map(|(x, y)| x - y).collect();
    let norm = |of: &[f64]| of.iter().map(|x| x * x).sum::<f64>().sqrt();
    let most = |of: &[f64]| of.iter().fold(0.0, |most, x| f64::max(most, x.abs()));
    [norm(&difference) / norm(exact), most(&difference)]
}

#[test]
fn outputs_are_as_good_as_their_storage_type() {
    let rotated = |row: &[f32]| {
        let mut row = row.to_vec();
        rotate(&mut row);
        row
    };
    println!("type  plain   max abs  rotated max abs (worst of three layers)");
    // Per cent, plain and rotated.
    let bounds = [
        (Dtype::F16, [0.06, 0.06]),
        (Dtype::Bf16, [0.5, 0.5]),
        (Dtype::Fp8, [5.5, 5.0]),
        (Dtype::Q8, [1.6, 1.0]),
        (Dtype::Q4, [23.0, 14.0]),
    ];
    for (dtype, [plain_bound, rotated_bound]) in bounds {
        let (mut plain, mut turned) = ([0.0_f64; 2], [0.0_f64; 2]);
        for file in LAYERS {
            let tensors = [("q", Q_HEADS), ("k", KV_HEADS), ("v", KV_HEADS)].map(|(n, h)| tensor(file, n, h));
            let exact = outputs(&tensors, |_, row| row.to_vec());
            let of_plain = outputs(&tensors, |which, row| match which {
                0 => row.to_vec(),
                _ => stored(dtype, row),
            });
            let mut of_turned = outputs(&tensors, |which, row| match which {
                0 => rotated(row),
                _ => stored(dtype, &rotated(row)),
            });
            of_turned.chunks_mut(DIM).for_each(rotate_f64);
            for (worst, got) in [(&mut plain, of_plain), (&mut turned, of_turned)] {
                let found = errors(&exact, &got);
                *worst = [worst[0].max(found[0]), worst[1].max(found[1])];
            }
        }
        let [[a, b], [c, d]] = [plain, turned];
        println!("{dtype:<5} {:6.3} % {b:8.1e} {:6.3} % {d:8.1e}", a * 100.0, c * 100.0);
        assert!(a * 100.0 <= plain_bound && c * 100.0 <= rotated_bound, "{dtype}: {a}, {c}");
    }
}
