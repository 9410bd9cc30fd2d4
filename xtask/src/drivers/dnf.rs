//! Fedora and what derives from it: `dnf download` needs no root.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{archives, work};
use crate::process;

const PACKAGES: [&str; 6] = [
    "mesa-vulkan-drivers",
    "vulkan-loader",
    "mesa-libEGL",
    "mesa-dri-drivers",
    "mesa-libgbm",
    "libglvnd-egl",
];

/// Downloads the packages and those of their dependencies that the machine lacks.
pub(super) fn fetch(folder: &Path) -> Result<Vec<PathBuf>, String> {
    for tool in ["dnf", "rpm2cpio", "cpio"] {
        if !process::exists(tool) {
            return Err(format!("`{tool}` is missing"));
        }
    }
    let downloads = work(folder, "downloads")?;
    println!("Fetching {} and what they need (dnf download, about 80 MB)", PACKAGES.join(", "));
    let mut dnf = Command::new("dnf");
    dnf.args(["download", "--assumeyes", "--resolve", "--arch", std::env::consts::ARCH, "--arch", "noarch"]);
    dnf.arg("--destdir").arg(&downloads).args(PACKAGES);
    process::output(&mut dnf)?;
    archives(&downloads)
}
