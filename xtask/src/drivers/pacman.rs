//! Arch and what derives from it: pacman with a private database, for which `fakeroot` stands in for root.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{archives, work};
use crate::process;

const PACKAGES: [&str; 5] = ["vulkan-swrast", "vulkan-radeon", "vulkan-icd-loader", "mesa", "libglvnd"];

/// Downloads the packages and those of their dependencies that the machine lacks.
pub(super) fn fetch(folder: &Path) -> Result<Vec<PathBuf>, String> {
    for tool in ["pacman", "fakeroot", "bsdtar"] {
        if !process::exists(tool) {
            return Err(format!("`{tool}` is missing"));
        }
    }
    let (database, downloads) = (work(folder, "database")?, work(folder, "downloads")?);
    // The list of what is installed is the machine's; only the list of what there is gets refreshed.
    process::output(Command::new("ln").args(["-sfn", "/var/lib/pacman/local"]).arg(database.join("local")))?;
    println!("Fetching {} and what they need (pacman, about 100 MB)", PACKAGES.join(", "));
    let mut pacman = Command::new("fakeroot");
    pacman
        .args([
            "--",
            "pacman",
            "-Syw",
            "--disable-sandbox",
            "--noconfirm",
            "--logfile",
            "/dev/null",
            "--dbpath",
        ])
        .arg(&database);
    pacman.arg("--cachedir").arg(&downloads).args(PACKAGES);
    process::output(&mut pacman)?;
    archives(&downloads)
}
