//! `cargo xtask isa`: what RADV's compiler makes of the kernels. It needs the driver, not a GPU.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::files::{manifests, name};
use crate::{environment, process, setup};

/// What the command exits with where RADV is missing; the example says the same.
const NO_RADV: u8 = 5;

/// The example as a build of the whole workspace has left it, where there is RADV; else the command that tells how to get it.
pub(crate) fn built(arguments: &[&str]) -> Result<Command, String> {
    match radv() {
        Some(manifest) => {
            let mut command = process::built("examples/isa", arguments)?;
            command.env("VK_DRIVER_FILES", manifest);
            Ok(command)
        }
        None => process::xtask(&[&["isa"], arguments].concat()),
    }
}

/// Runs the example on RADV's manifest.
pub(crate) fn isa(arguments: &[String]) -> Result<u8, String> {
    let mut command =
        process::cargo(&["run", "--release", "--quiet", "--package", "gqa", "--example", "isa", "--"]);
    command.args(arguments);
    // Help needs no driver.
    if arguments.iter().any(|a| a == "--help" || a == "-h") {
        return process::run(&mut command);
    }
    setup::software_drivers(false);
    let Some(manifest) = radv() else {
        eprintln!("{}", missing());
        return Ok(NO_RADV);
    };
    // For this child only: elsewhere drivers that run something come first.
    process::run(command.env("VK_DRIVER_FILES", manifest))
}

fn radv() -> Option<PathBuf> {
    manifest(&environment::folder(), &environment::SYSTEM_VULKAN.map(Path::new))
}

/// RADV's manifest: of the unpacked drivers, unless they are off, else of the system's.
fn manifest(folder: &Path, system: &[&Path]) -> Option<PathBuf> {
    let ours = std::env::var_os(environment::OFF).is_none().then(|| folder.join("icd.d"));
    let folders = ours.as_deref().into_iter().chain(system.iter().copied());
    folders.flat_map(manifests).find(|path| name(path).starts_with("radeon_icd"))
}

fn missing() -> &'static str {
    "xtask: Mesa's RADV is missing: the Vulkan driver for AMD's GPUs, whose compiler needs no such GPU. On Linux `cargo xtask setup --redo`\n\
     unpacks it with the software drivers, without root. For all users it is in the package mesa-vulkan-drivers (Debian, Ubuntu, Fedora),\n\
     vulkan-radeon (Arch) or libvulkan_radeon (openSUSE). It does not exist for macOS and Windows."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_manifest_comes_first() {
        let folder = std::env::temp_dir().join(format!("gqa-xtask-isa-{}", std::process::id()));
        let system = folder.join("system");
        std::fs::create_dir_all(folder.join("icd.d")).unwrap();
        std::fs::create_dir_all(&system).unwrap();
        assert_eq!(manifest(&folder, &[&system]), None);
        let theirs = system.join("radeon_icd.x86_64.json");
        std::fs::write(&theirs, "").unwrap();
        std::fs::write(system.join("lvp_icd.json"), "").unwrap();
        assert_eq!(manifest(&folder, &[&system]), Some(theirs));
        let ours = folder.join("icd.d/radeon_icd.json");
        std::fs::write(&ours, "").unwrap();
        assert_eq!(manifest(&folder, &[&system]), Some(ours));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn who_lacks_it_is_told_how_to_get_it() {
        assert!(missing().contains("cargo xtask setup") && missing().contains("vulkan-radeon"));
    }
}
