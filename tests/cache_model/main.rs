//! Random operations on a paged cache, on every adapter, held against a model that knows every token and every page.
//!
//! `GQA_MODEL_SEED` tries other operations than those of seed 1.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod driver;
mod model;
mod numbers;
mod operations;

use std::cell::Cell;
use std::time::Instant;

use common::on_each;
use driver::{Driver, Setup};
use gqa::Dtype;
use gqa::verify::adapters;

/// Operations with each setup.
const STEPS: u32 = 2500;

/// Small pages and large ones. Keys are much longer than values: then a binding that is short for keys has room for work lists.
const SETUPS: [Setup; 2] = [
    Setup { page: 4, window: 19, kv_dtype: Dtype::F32, head_dim: 32, group: 3 },
    Setup { page: 16, window: 37, kv_dtype: Dtype::F16, head_dim: 64, group: 2 },
];

/// Says, when something panics, where to find it again.
struct Place<'a>(&'a str, Cell<u32>);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}, step {}", self.0, self.1.get());
        }
    }
}

#[test]
fn a_cache_does_what_its_model_does() {
    let seed =
        std::env::var("GQA_MODEL_SEED").map_or(1, |seed| seed.parse().expect("GQA_MODEL_SEED: a number"));
    let all = adapters();
    assert!(!all.is_empty(), "no adapter: `cargo xtask setup` unpacks a software driver");
    on_each(all, |adapter| {
        let info = adapter.get_info();
        let start = Instant::now();
        for setup in SETUPS {
            let what = format!("{} ({}), GQA_MODEL_SEED={seed}, {setup:?}", info.name, info.backend);
            let place = Place(&what, Cell::new(0));
            let mut driver = Driver::new(&adapter, setup, seed).unwrap();
            for step in 0..STEPS {
                place.1.set(step);
                driver.step(step).unwrap_or_else(|error| panic!("{error}"));
            }
            driver.finish().unwrap_or_else(|error| panic!("at the end: {error}"));
            println!("{what}: {:?}", driver.counts);
            // That the test tests something.
            let counts = driver.counts;
            assert!(counts.attended > 200 && counts.shared > 20, "{counts:?}");
            assert!(counts.full > 5 && counts.refused > 20 && counts.moved > 20, "{counts:?}");
        }
        println!("{} ({}): {:.1?}", info.name, info.backend, start.elapsed());
    });
}
