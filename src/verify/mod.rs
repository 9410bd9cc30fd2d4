//! Checks kernels against the reference on real adapters: what the tests, `gqa verify` and `gqa run` share.
//!
//! Unlike the library proper this opens adapters, submits and blocks; it comes with the feature `cli`.

mod adapters;
mod compare;
mod gradients;
mod merging;
mod metamorphic;
mod problem;
mod random;
mod runner;

pub use adapters::{AdapterChoice, Gpu, adapters, lacking};
pub use compare::{Mismatch, Tolerance, check, compare};
pub use gradients::{DeviceGradients, check_gradients, random_gradients, random_output_gradients};
pub use merging::merge;
pub use metamorphic::{LAWS, Law, same};
pub use problem::{Arrangement, Problem, ProblemMask, ProblemSequence, Stored, Weights};
pub use random::{PER_SPEC, problem_of_lens, random_problem, random_problem_of, random_setup};
pub use runner::{Output, Runner, Setup, run};
