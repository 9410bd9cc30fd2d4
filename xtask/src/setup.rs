//! Whether there is an adapter, and what to do where there is none.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{drivers, environment, process};

/// What `gqa info` exits with where nothing suits.
pub(crate) const NO_ADAPTER: u8 = 3;

/// `gqa` in release mode, with the unpacked drivers where there are any.
pub(crate) fn gqa(arguments: &[&str]) -> Command {
    let mut command =
        process::cargo(&["run", "--release", "--quiet", "--package", "gqa", "--bin", "gqa", "--"]);
    command.args(arguments);
    command
}

/// `cargo xtask setup`
pub(crate) fn setup(redo: bool) -> Result<u8, String> {
    software_drivers(redo);
    println!("Adapters (`gqa info`):");
    report(process::run(&mut gqa(&["info"]))?)
}

/// `cargo xtask bench`: the machine's own adapter if it has one, else a software one.
pub(crate) fn bench(arguments: &[String]) -> Result<u8, String> {
    let mut command = gqa(&bench_arguments(arguments));
    if own_adapter()? {
        command.env(environment::OFF, "1");
    } else {
        software_drivers(false);
    }
    report(process::run(&mut command)?)
}

/// The user's arguments of `gqa bench`, or those that give numbers soonest.
fn bench_arguments(arguments: &[String]) -> Vec<&str> {
    let quick = arguments.is_empty().then_some("--quick");
    let wishes = arguments.iter().map(String::as_str).chain(quick);
    std::iter::once("bench").chain(wishes).collect()
}

/// Whether a GPU works without our drivers. Linux may have no more than an old lavapipe, so it must show a device too.
fn own_adapter() -> Result<bool, String> {
    if cfg!(target_os = "linux") && !environment::has_gpu() {
        return Ok(false);
    }
    println!("Looking for an adapter (`gqa info`; the first build takes minutes)");
    let mut info = gqa(&["info"]);
    info.env(environment::OFF, "1");
    // Without an adapter it fails; a line of each ends with what it is.
    let found = process::output(&mut info).unwrap_or_default();
    Ok(found
        .lines()
        .any(|line| line.starts_with('[') && (line.ends_with("Gpu)") || line.ends_with("Other)"))))
}

/// Unpacks and announces software drivers. A failure is told, not fatal: the machine may have its own.
pub(crate) fn software_drivers(redo: bool) {
    if !cfg!(target_os = "linux") {
        return;
    }
    if let Err(message) = unpack(redo) {
        eprintln!("xtask: no software drivers were unpacked: {message}");
    }
}

fn unpack(redo: bool) -> Result<(), String> {
    let folder = environment::folder();
    if folder.to_string_lossy().contains(':') {
        return Err(
            "the folder's name has a colon, which lists of drivers cannot hold: set GQA_DRIVERS".into()
        );
    }
    let done = folder.join("packages.txt");
    if redo || !done.exists() {
        empty(&folder)?;
        println!("Software drivers go to {}", folder.display());
        let packages = drivers::unpack(&folder)?;
        environment::write(&folder)?;
        return fs::write(&done, packages).map_err(|e| format!("cannot write {}: {e}", done.display()));
    }
    // Chromium or a GPU's driver may have come since.
    environment::write(&folder)
}

/// Empties the folder, if xtask made it: GQA_DRIVERS may name anything.
fn empty(folder: &Path) -> Result<(), String> {
    const TAG: &str = "made-by-gqa-xtask";
    let failed = |e: std::io::Error| format!("cannot empty {}: {e}", folder.display());
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        if !folder.join(TAG).exists() {
            return Err(format!("{} holds other files: remove it, or set GQA_DRIVERS", folder.display()));
        }
        fs::remove_dir_all(folder).map_err(failed)?;
    }
    fs::create_dir_all(folder).and_then(|()| fs::write(folder.join(TAG), "")).map_err(failed)
}

fn report(code: u8) -> Result<u8, String> {
    if code == NO_ADAPTER {
        eprintln!("{}", no_adapter());
    }
    Ok(code)
}

/// What to try where no adapter was found.
pub(crate) fn no_adapter() -> String {
    let advice = match std::env::consts::OS {
        "macos" => {
            "Every Mac since 2012 has Metal; a virtual machine may need its graphics acceleration switched on."
        }
        "windows" => {
            "Windows 10 and later have WARP through DirectX 12: is d3d12.dll there, and Windows up to date?"
        }
        "linux" => {
            return format!(
                "xtask: there is no adapter that gqa can use. Install Vulkan drivers with\n  {}\n\
                 or begin again with `cargo xtask setup --redo`.",
                drivers::system_command()
            );
        }
        _ => "Install a Vulkan driver.",
    };
    format!("xtask: there is no adapter that gqa can use. {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bench_is_quick_unless_told_otherwise() {
        assert_eq!(bench_arguments(&[]), ["bench", "--quick"]);
        assert_eq!(bench_arguments(&["--samples".into(), "3".into()]), ["bench", "--samples", "3"]);
    }

    #[test]
    fn only_its_own_folder_is_emptied() {
        let folder = std::env::temp_dir().join(format!("gqa-xtask-{}", std::process::id()));
        assert_eq!(empty(&folder), Ok(()));
        fs::write(folder.join("old"), "").unwrap();
        assert_eq!(empty(&folder), Ok(()));
        assert!(!folder.join("old").exists());
        fs::remove_file(folder.join("made-by-gqa-xtask")).unwrap();
        fs::write(folder.join("precious"), "").unwrap();
        assert!(empty(&folder).is_err());
        assert!(folder.join("precious").exists());
        fs::remove_dir_all(&folder).unwrap();
    }
}
