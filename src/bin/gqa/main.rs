//! The `gqa` command: shows adapters and plans, runs case files, verifies kernels, measures and tunes them, converts checkpoints.

mod adapter;
mod bench;
mod case;
mod convert;
mod hash;
mod info;
mod progress;
mod run;
mod tune;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Why a command did not succeed: its exit code, and what to say.
#[derive(Debug)]
enum Failure {
    /// Results do not match; the command has said which.
    Mismatch,
    /// The command line or a file is wrong.
    Usage(String),
    /// No adapter, or it was lost.
    Adapter(String),
    /// Something is slower than it was; the command has said what.
    Slower,
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Mismatch => 1,
            Self::Usage(_) => 2,
            Self::Adapter(_) => 3,
            Self::Slower => 4,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mismatch => f.write_str("a result does not match"),
            Self::Slower => f.write_str("a row is slower than it was"),
            Self::Usage(message) | Self::Adapter(message) => f.write_str(message),
        }
    }
}

/// Grouped-query attention on every GPU.
///
/// Exit codes: 0 good, 1 a result does not match, 2 wrong usage or a bad file, 3 no suitable adapter, 4 slower than an earlier run.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Info(info::Args),
    Run(run::Args),
    Verify(verify::Args),
    Bench(bench::Args),
    Tune(tune::Args),
    Convert(convert::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Info(args) => info::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Verify(args) => verify::main(&args),
        Command::Bench(args) => bench::main(&args),
        Command::Tune(args) => tune::main(&args),
        Command::Convert(args) => convert::main(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // These were reported where they were found.
            if !matches!(failure, Failure::Mismatch | Failure::Slower) {
                eprintln!("gqa: {failure}");
            }
            ExitCode::from(failure.code())
        }
    }
}
