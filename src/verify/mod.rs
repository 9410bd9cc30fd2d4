//! Checks kernels against the reference on real adapters: what the tests, `gqa verify` and `gqa run` share.
//!
//! Unlike the library proper this opens adapters, submits and blocks; it comes with the feature `cli`.

mod adapters;
mod compare;
mod problem;
mod random;
mod runner;

pub use adapters::{AdapterChoice, Gpu, adapters};
pub use compare::{Mismatch, Tolerance, compare};
pub use problem::{Arrangement, Problem, ProblemSequence};
pub use random::random_problem;
pub use runner::{Output, Setup, run};
