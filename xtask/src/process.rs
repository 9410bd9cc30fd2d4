//! Child processes: cargo's own, and the packaging tools'.

use std::process::{Command, Stdio};

/// The cargo that started xtask.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).env("GQA_DRIVERS", crate::environment::folder());
    command
}

/// What runs a program with the unpacked drivers, where there are any: as cargo's runner in `.cargo/config.toml`.
const RUNNER: &str = r#"[ -r "$GQA_DRIVERS/env.sh" ] && . "$GQA_DRIVERS/env.sh"; exec "$@""#;

/// A program that `cargo test --profile checks --workspace` has built for its tests. `cargo run` would build wgpu once more, with the features that its package alone asks for.
pub(crate) fn built(name: &str, arguments: &[&str]) -> Result<Command, String> {
    let xtask = std::env::current_exe().map_err(|e| format!("cannot find xtask itself: {e}"))?;
    let target = xtask.ancestors().nth(2).ok_or("xtask lies in no target folder: run it by `cargo xtask`")?;
    let program = target.join("checks").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    let mut command = if cfg!(target_os = "linux") {
        let mut shell = Command::new("sh");
        shell.args(["-c", RUNNER, "sh"]).arg(program);
        shell
    } else {
        Command::new(program)
    };
    command.args(arguments).env("GQA_DRIVERS", crate::environment::folder());
    Ok(command)
}

/// Another command of xtask, as a child like others.
pub(crate) fn xtask(arguments: &[&str]) -> Result<Command, String> {
    let program = std::env::current_exe().map_err(|e| format!("cannot find xtask itself: {e}"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

/// Runs the child with our terminal and returns its exit code; a signal counts as 1.
pub(crate) fn run(command: &mut Command) -> Result<u8, String> {
    let status = command.status().map_err(|e| cannot_start(command, &e))?;
    Ok(status.code().map_or(1, |code| u8::try_from(code).unwrap_or(1)))
}

/// Runs the child and returns its exit code; what it says comes at its end, below `title`.
pub(crate) fn told(command: &mut Command, title: &str) -> Result<u8, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| cannot_start(command, &e))?;
    let [said, errors] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    println!("{title}\n{said}{errors}");
    Ok(output.status.code().map_or(1, |code| u8::try_from(code).unwrap_or(1)))
}

/// Runs the child silently and returns its standard output; its last lines of error make the message.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| cannot_start(command, &e))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = errors.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(6)..].join("\n  ");
    Err(format!("`{}` failed:\n  {tail}", command.get_program().to_string_lossy()))
}

/// Whether a program answers at all.
pub(crate) fn exists(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok()
}

fn cannot_start(command: &Command, error: &std::io::Error) -> String {
    format!("cannot start `{}`: {error}", command.get_program().to_string_lossy())
}

#[cfg(test)]
mod tests {
    #[test]
    fn programs_run_as_cargo_runs_them() {
        assert!(include_str!("../../.cargo/config.toml").contains(super::RUNNER));
    }
}
