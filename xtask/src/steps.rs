//! `cargo xtask test`: every check in turn, and a table of how they went.

use std::panic::resume_unwind;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::{isa, model, process, setup};

/// One check: its name in the table and the command that makes it.
struct Step {
    name: &'static str,
    command: Command,
    /// Whether it runs beside the step before it, and tells when it is done: most of their time is drivers' compilers, each on one core.
    beside: bool,
}

impl Step {
    /// Its exit code, and seconds.
    fn run(&mut self) -> Result<(u8, f64), String> {
        let start = Instant::now();
        let code = match self.beside {
            true => process::told(&mut self.command, &format!("\n=== {}", self.name))?,
            false => {
                println!("\n=== {}", self.name);
                process::run(&mut self.command)?
            }
        };
        Ok((code, start.elapsed().as_secs_f64()))
    }
}

/// Runs all checks up to the first failure, whose code it returns.
pub(crate) fn test(quick: bool, arguments: &[String]) -> Result<u8, String> {
    components()?;
    setup::software_drivers(false);
    // As with drivers, told and not fatal: what needs the model says so itself.
    if let Err(message) = model::model() {
        eprintln!("xtask: the model is not there: {message}");
    }
    let mut rows = Vec::new();
    let mut failed = 0;
    for group in steps(quick, arguments)?.chunk_by_mut(|_, next| next.beside) {
        if failed != 0 {
            rows.extend(group.iter().map(|step| (step.name, "not run".to_string(), String::new())));
            continue;
        }
        let results: Vec<_> = std::thread::scope(|scope| {
            let runs: Vec<_> = group.iter_mut().map(|step| scope.spawn(|| (step.name, step.run()))).collect();
            runs.into_iter().map(|run| run.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        for (name, result) in results {
            let (code, seconds) = result?;
            let result = if code == 0 { "ok".to_string() } else { format!("FAILED ({code})") };
            rows.push((name, result, format!("{seconds:.1}")));
            failed = if failed == 0 { code } else { failed };
            if name == ADAPTERS && code == setup::NO_ADAPTER {
                eprintln!("{}", setup::no_adapter());
            }
        }
    }
    print!("\n{}", table(&rows));
    Ok(failed)
}

const ADAPTERS: &str = "adapters";
const LANES: &str = "16 lanes";

fn steps(quick: bool, arguments: &[String]) -> Result<Vec<Step>, String> {
    let cargo = |words: &str| process::cargo(&words.split(' ').collect::<Vec<_>>());
    let of = |name, command| Step { name, command, beside: false };
    let step = |name, words| of(name, cargo(words));
    // One profile, and everywhere the features that tests ask for: whatever is not ours is compiled once, and checked once. An example
    // brings the features of tests to the documentation.
    let words = "doc --profile checks --no-deps --package gqa --package gqa-burn --lib --example generate";
    let mut documentation = step("documentation", words);
    documentation.command.env("RUSTDOCFLAGS", "-D warnings");
    let mut tests = step("tests", "test --profile checks --workspace");
    tests.command.args(arguments);
    let mut steps = vec![
        step("formatting", "fmt --all --check"),
        step("clippy", "clippy --profile checks --workspace --all-targets -- -D warnings"),
        documentation,
        step("build", "test --profile checks --workspace --no-run"),
        of(ADAPTERS, process::built("gqa", &["info"])?),
    ];
    // Only Linux has RADV.
    if cfg!(target_os = "linux") {
        // It has tests of its own, and `cargo test` builds those and not the program.
        steps.push(step("isa, built", "build --profile checks --workspace --example isa"));
        steps.push(of("isa", isa::built(&["--check"])?));
    }
    steps.push(tests);
    if !quick {
        let words = "verify --adapter all --seed 9600 --count 500 --laws 0".split(' ');
        let command = process::built("gqa", &words.collect::<Vec<_>>())?;
        steps.push(Step { name: "verify", command, beside: true });
    }
    // Mesa's software adapters have 8 lanes here; 16 and more are what GPUs have, and teams of 16 need them.
    if !quick && cfg!(target_os = "linux") {
        let words = "verify --adapter all --seed 9600 --count 60 --gradients 10 --laws 0".split(' ');
        let words: Vec<&str> = words.collect();
        let mut command = process::built("gqa", &words)?;
        command.env("LP_NATIVE_VECTOR_WIDTH", "512");
        steps.push(Step { name: LANES, command, beside: true });
    }
    Ok(steps)
}

/// A minimal Rust lacks rustfmt and clippy: rustup adds them without root.
fn components() -> Result<(), String> {
    for (command, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let mut probe = process::cargo(&[command, "--version"]);
        probe.stdout(Stdio::null()).stderr(Stdio::null());
        if process::run(&mut probe)? == 0 {
            continue;
        }
        println!("{component} is missing: rustup component add {component}");
        let mut rustup = Command::new("rustup");
        if process::run(rustup.args(["component", "add", component])) != Ok(0) {
            return Err(format!("please install {component}, then try again"));
        }
    }
    Ok(())
}

/// The rows as aligned columns.
fn table(rows: &[(&str, String, String)]) -> String {
    let mut text = format!("{:<15}{:<14}{:>8}\n", "step", "result", "seconds");
    for (name, result, seconds) in rows {
        let line = format!("{name:<15}{result:<14}{seconds:>8}");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_aligned() {
        let rows = [("clippy", "ok".into(), "12.5".into()), ("tests", "not run".into(), String::new())];
        let wanted = "step           result         seconds\n\
                      clippy         ok                12.5\n\
                      tests          not run\n";
        assert_eq!(table(&rows), wanted);
    }

    #[test]
    fn quick_leaves_out_random_problems_only() {
        let names = |quick| steps(quick, &[]).unwrap().iter().map(|s| s.name).collect::<Vec<_>>();
        let (all, quick) = (names(false), names(true));
        let verify: &[&str] = if cfg!(target_os = "linux") { &["verify", LANES] } else { &["verify"] };
        assert_eq!(all, [&quick, verify].concat());
    }

    #[test]
    fn code_is_judged_before_it_is_run() {
        let names: Vec<_> = steps(true, &[]).unwrap().iter().map(|s| s.name).collect();
        let at = |name| names.iter().position(|n| *n == name);
        assert_eq!(at("isa").is_some(), cfg!(target_os = "linux"));
        assert!(at("isa") < at("tests"));
    }

    #[test]
    fn arguments_reach_cargo_test() {
        let steps = steps(true, &["decode".to_string()]).unwrap();
        let tests = steps.iter().find(|s| s.name == "tests").unwrap();
        let words: Vec<_> = tests.command.get_args().collect();
        assert_eq!(words, ["test", "--profile", "checks", "--workspace", "decode"]);
    }
}
