//! What AMD's compiler in Mesa makes of the kernels, on GPUs that need not be there: `cargo xtask isa --help`.

mod arguments;
mod blocks;
mod budget;
mod mix;
mod radv;
mod report;
mod row;
mod specs;
mod spirv;

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use arguments::{Arguments, HELP};
use budget::Budget;
use radv::{Compiled, Radv, Result};
use row::Row;

/// The exit code where RADV is missing.
const NO_RADV: u8 = 5;

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("isa: {message}");
            return ExitCode::from(2);
        }
    };
    if arguments.help {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let code = if arguments.child { child(&arguments) } else { parent(&arguments) };
    code.map_or_else(
        |error| {
            eprintln!("isa: {error}");
            ExitCode::FAILURE
        },
        ExitCode::from,
    )
}

/// Compiles for the family that this process was started for, and prints a row for each variant.
fn child(arguments: &Arguments) -> Result<u8> {
    let radv = match Radv::open() {
        Ok(radv) => radv,
        Err(error) => {
            eprintln!("isa: {error}");
            return Ok(NO_RADV);
        }
    };
    let family = std::env::var("RADV_FORCE_FAMILY")?;
    for candidate in specs::candidates(&radv.caps, &arguments.filters)? {
        let named = |error| format!("{}: {error}", candidate.name);
        let compiled = radv.compile(&candidate.variant, &candidate.words).map_err(named)?;
        if let Some(folder) = &arguments.disassembly {
            write(folder, &format!("{family} {}", candidate.name), &compiled)?;
        }
        let row = Row::of(&candidate, &compiled).map_err(named)?;
        let row = Row { family: family.clone(), driver: radv.driver.clone(), ..row };
        println!("{}", serde_json::to_string(&row)?);
    }
    Ok(0)
}

fn write(folder: &Path, name: &str, compiled: &Compiled) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let name = name.replace(' ', "-");
    let ir = compiled.text("ACO IR");
    let assembly = blocks::annotated(compiled.text("Assembly"), &blocks::weights(ir));
    std::fs::write(folder.join(format!("{name}.s")), assembly)?;
    std::fs::write(folder.join(format!("{name}.aco")), ir)?;
    Ok(())
}

/// Starts a process for each family, since RADV asks the environment once, and reports.
fn parent(arguments: &Arguments) -> Result<u8> {
    let children = std::thread::scope(|scope| {
        let mut started = Vec::new();
        for family in &arguments.families {
            started.push(scope.spawn(move || rows_of(arguments, family)));
        }
        let ends = started.into_iter().map(|child| child.join().map_err(|_| "a thread failed"));
        ends.collect::<std::result::Result<Vec<_>, _>>()
    })?;
    let mut rows = Vec::new();
    for child in children {
        match child? {
            Ok(found) => rows.extend(found),
            Err((code, errors)) => {
                eprint!("{errors}");
                if code == NO_RADV {
                    eprintln!(
                        "isa: Mesa's RADV is missing: `cargo xtask isa` looks for it and tells how to get it"
                    );
                }
                return Ok(code);
            }
        }
    }
    if rows.is_empty() {
        return Err("no variant has such a name".into());
    }
    if arguments.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
    } else if !(arguments.check || arguments.bless) {
        print!("{}", report::tables(&rows, arguments.loops));
    }
    judge(arguments, &rows)
}

/// Rows of one family, or the exit code of the process and its words.
fn rows_of(
    arguments: &Arguments,
    family: &str,
) -> std::result::Result<std::result::Result<Vec<Row>, (u8, String)>, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = Command::new(program);
    command.args(arguments.for_child()).env("RADV_FORCE_FAMILY", family).stdin(Stdio::null());
    // A cache keeps no statistics, and debugging options of the user's would change the code.
    command.env("MESA_SHADER_CACHE_DISABLE", "true").env_remove("RADV_DEBUG").env_remove("RADV_PERFTEST");
    let output = command.output().map_err(|e| e.to_string())?;
    if !output.status.success() {
        let code = output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        let errors = format!("{family}: {}", String::from_utf8_lossy(&output.stderr));
        return Ok(Err((code, errors)));
    }
    let lines = String::from_utf8_lossy(&output.stdout);
    let rows = lines.lines().map(serde_json::from_str).collect::<std::result::Result<Vec<Row>, _>>();
    rows.map(Ok).map_err(|e| format!("{family}: {e}"))
}

/// The budget: compared or written, where asked.
fn judge(arguments: &Arguments, rows: &[Row]) -> Result<u8> {
    if arguments.bless {
        let mut budget = Budget::read().unwrap_or_default();
        budget.bless(rows, arguments.is_whole());
        std::fs::write(budget::path(), budget.text())?;
        eprintln!("isa: {} kernels (variants times families) in {}", rows.len(), budget::path().display());
    }
    if !arguments.check {
        return Ok(0);
    }
    let (wrong, notes) = Budget::read()?.check(rows);
    for note in &notes {
        eprintln!("isa: {note}");
    }
    for message in &wrong {
        eprintln!("isa: {message}");
    }
    if wrong.is_empty() {
        eprintln!("isa: {} kernels (variants times families) are within the budget", rows.len());
    }
    Ok(u8::from(!wrong.is_empty()))
}
