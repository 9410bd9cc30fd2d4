//! Rotary embedding against Hugging Face transformers (`tests/data/rope.json`, made by `rope.py`), and its own laws.
// Helpers of tests: clippy.toml allows it only in the tests themselves.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::f64::consts::TAU;

use gqa::{Pairing, Rope, Scaling};
use serde_json::Value;

/// 2 pi is `TAU + TAU_LOW`, to 107 bits.
const TAU_LOW: f64 = 2.449_293_598_294_706_4e-16;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn integer(value: &Value) -> u32 {
    u32::try_from(value.as_u64().unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn scaling(v: &Value) -> Scaling {
    match v["kind"].as_str().unwrap() {
        "None" => Scaling::None,
        "Linear" => Scaling::Linear { factor: number(&v["factor"]) },
        "DynamicNtk" => Scaling::DynamicNtk {
            factor: number(&v["factor"]),
            original_context: integer(&v["original_context"]),
            context: integer(&v["context"]),
        },
        "Yarn" => Scaling::Yarn {
            factor: number(&v["factor"]),
            original_context: integer(&v["original_context"]),
            beta_fast: number(&v["beta_fast"]),
            beta_slow: number(&v["beta_slow"]),
            attention_factor: v["attention_factor"].as_f64(),
            truncate: v["truncate"].as_bool().unwrap_or(true),
        },
        "Llama3" => Scaling::Llama3 {
            factor: number(&v["factor"]),
            low_freq_factor: number(&v["low_freq_factor"]),
            high_freq_factor: number(&v["high_freq_factor"]),
            original_context: integer(&v["original_context"]),
        },
        "LongRope" => Scaling::LongRope {
            short: numbers(&v["short"]),
            long: numbers(&v["long"]),
            original_context: integer(&v["original_context"]),
            context: integer(&v["context"]),
            attention_factor: v["attention_factor"].as_f64(),
        },
        other => panic!("{other}"),
    }
}

fn rope(v: &Value) -> Rope {
    let pairing = match v["pairing"].as_str().unwrap() {
        "Half" => Pairing::Half,
        "Interleaved" => Pairing::Interleaved,
        other => panic!("{other}"),
    };
    let (dim, first) = (integer(&v["dim"]), integer(&v["first"]));
    Rope { pairing, dim, first, theta: number(&v["theta"]), scaling: scaling(&v["scaling"]) }
}

fn cases() -> Vec<(Rope, Value)> {
    let file: Value = serde_json::from_str(include_str!("data/rope.json")).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 15);
    cases.iter().map(|case| (rope(&case["rope"]), case.clone())).collect()
}

#[track_caller]
fn expect_close(name: &Value, found: &[f64], expected: &[f64], bound: impl Fn(f64) -> f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= bound(e.abs()), "{name}, {i}: found {f}, expected {e}");
    }
}

#[test]
fn frequencies_are_those_of_transformers() {
    for (rope, case) in cases() {
        let (name, frequencies) = (&case["name"], rope.frequencies());
        // As models run it, in f32, and the same code in f64.
        expect_close(name, &frequencies, &numbers(&case["frequencies_f32"]), |e| e * 1e-6);
        expect_close(name, &frequencies, &numbers(&case["frequencies"]), |e| e * 1e-14);
        expect_close(name, &[rope.magnitude()], &[number(&case["magnitude"])], |e| e * 1e-15);
    }
}

#[test]
fn rotations_are_those_of_transformers() {
    for (rope, case) in cases() {
        let row = numbers(&case["row"]);
        assert_eq!(row.len(), integer(&case["head_dim"]) as usize);
        for turned in case["rotated"].as_array().unwrap() {
            let mut found = row.clone();
            rope.rotate(&mut found, turned["position"].as_i64().unwrap());
            // The file has eleven digits, and at position 100000 the last bit of a frequency counts.
            expect_close(&case["name"], &found, &numbers(&turned["row"]), |_| 1e-9);
        }
    }
}

/// `frequency * position` modulo one turn, in turns, to about 1e-15: the product and its quotient in two parts each.
fn angle(frequency: f64, position: f64) -> f64 {
    let product = frequency * position;
    let rest = frequency.mul_add(position, -product);
    let turns = (product / TAU).floor();
    let radians = (-turns).mul_add(TAU, product) + (rest - turns * TAU_LOW);
    radians / TAU
}

#[test]
fn turns_are_the_frequencies_modulo_one_turn() {
    for (rope, case) in cases() {
        for (frequency, [high, low]) in rope.frequencies().into_iter().zip(rope.turns()) {
            let turns = u64::from(high) << 32 | u64::from(low);
            for position in
                [0, 1, 2, 3, 1000, 4095, 100_000, 123_456_789, 0x7fff_ffff, 1 << 31, -1, -4096_i64]
            {
                let found = turns.wrapping_mul(position as u64) as f64 / 2_f64.powi(64);
                let difference = found - angle(frequency, position as f64);
                let apart = (difference - difference.round()).abs();
                assert!(apart < 1e-9, "{}: {frequency} at {position} is {apart} turns off", case["name"]);
            }
        }
    }
}

#[test]
fn norms_grow_by_the_magnitude() {
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (rope, case) in cases() {
        let turning = rope.first as usize..(rope.first + rope.dim) as usize;
        let row = numbers(&case["row"]);
        for position in [0, 5, -77, 100_000] {
            let mut turned = row.clone();
            rope.rotate(&mut turned, position);
            let expected = norm(&row[turning.clone()]) * rope.magnitude();
            assert!((norm(&turned[turning.clone()]) / expected - 1.0).abs() < 1e-14);
            assert_eq!(turned[..turning.start], row[..turning.start]);
            assert_eq!(turned[turning.end..], row[turning.end..]);
        }
    }
}

#[test]
fn scores_depend_on_the_distance_alone() {
    for (rope, case) in cases() {
        let (q, k) = (numbers(&case["row"]), numbers(&case["row"]).into_iter().rev().collect::<Vec<_>>());
        let score = |q_position, k_position| {
            let (mut q, mut k) = (q.clone(), k.clone());
            rope.rotate(&mut q, q_position);
            rope.rotate(&mut k, k_position);
            q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>()
        };
        assert!((score(9, 2) - score(4009, 4002)).abs() < 1e-9, "{}", case["name"]);
        assert!(
            (score(9, 2) - score(2, 9)).abs() > 1e-3,
            "{}: a score that the order does not change",
            case["name"]
        );
    }
}
