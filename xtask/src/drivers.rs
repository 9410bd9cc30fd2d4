//! Software drivers, unpacked without root from the distribution's own packages.

mod apt;
mod dnf;
mod pacman;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;

/// What the driver folder never gets: the machine's own copies are in use by every process already.
const SYSTEM: [&str; 10] = [
    "libc6",
    "libc-bin",
    "libstdc++6",
    "libgcc-s1",
    "gcc-",
    "glibc",
    "libgcc",
    "libstdc++",
    "gcc-libs",
    "filesystem",
];

/// The families of distributions that xtask knows, by their packaging tools.
#[derive(Debug, PartialEq)]
enum Family {
    Apt,
    Dnf,
    Pacman,
    Zypper,
    Other,
}

/// What `/etc/os-release` says.
#[derive(Debug, Default, PartialEq)]
struct Release {
    id: String,
    like: String,
    codename: String,
}

impl Release {
    fn read() -> Self {
        let read = |path| fs::read_to_string(path).ok();
        Self::parse(&read("/etc/os-release").or_else(|| read("/usr/lib/os-release")).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            line.unwrap_or_default().trim().trim_matches(['"', '\'']).to_string()
        };
        Self { id: value("ID"), like: value("ID_LIKE"), codename: value("VERSION_CODENAME") }
    }

    fn family(&self) -> Family {
        let names = || std::iter::once(self.id.as_str()).chain(self.like.split_whitespace());
        let family = names().find_map(|name| match name {
            "debian" | "ubuntu" => Some(Family::Apt),
            "fedora" | "rhel" | "centos" => Some(Family::Dnf),
            "arch" | "archlinux" => Some(Family::Pacman),
            "suse" | "opensuse" => Some(Family::Zypper),
            _ => None,
        });
        family.unwrap_or(Family::Other)
    }
}

/// The command that installs the same drivers for all users, for those who would rather have that.
pub(crate) fn system_command() -> &'static str {
    match Release::read().family() {
        Family::Apt => "sudo apt-get install mesa-vulkan-drivers libvulkan1 libegl1",
        Family::Dnf => "sudo dnf install mesa-vulkan-drivers vulkan-loader mesa-libEGL",
        Family::Pacman => "sudo pacman -S vulkan-swrast vulkan-icd-loader mesa",
        Family::Zypper => "sudo zypper install libvulkan_lvp libvulkan1 Mesa-libEGL1",
        Family::Other => "your distribution's packages of Mesa (lavapipe) and of the Vulkan loader",
    }
}

/// Fills `folder/root` and returns the list of packages, one a line; empty if the machine's own are the newest.
pub(crate) fn unpack(folder: &Path) -> Result<String, String> {
    let release = Release::read();
    let fetch = match release.family() {
        Family::Apt => apt::fetch(folder, &release),
        Family::Dnf => dnf::fetch(folder),
        Family::Pacman => pacman::fetch(folder),
        Family::Zypper | Family::Other => Err("xtask cannot unpack this distribution's packages".to_string()),
    };
    let result = fetch.and_then(|packages| extract(folder, &packages));
    // Package lists and archives have served their purpose, whatever came of it.
    let _ = fs::remove_dir_all(folder.join(WORK));
    result.map_err(|e| format!("{e}\nTo install them for all users instead:\n  {}", system_command()))
}

/// The tools' private folder inside the driver folder.
const WORK: &str = "work";

/// Creates and returns a private folder for the packaging tools.
fn work(folder: &Path, name: &str) -> Result<PathBuf, String> {
    let path = folder.join(WORK).join(name);
    fs::create_dir_all(&path).map_err(|e| format!("cannot create {}: {e}", path.display()))?;
    Ok(path)
}

/// Unpacks the archives one by one.
fn extract(folder: &Path, archives: &[PathBuf]) -> Result<String, String> {
    let root = folder.join("root");
    fs::create_dir_all(&root).map_err(|e| format!("cannot create {}: {e}", root.display()))?;
    let mut list = String::new();
    for archive in archives {
        let name = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if is_system(&name) {
            println!("  leaving out {name}: the machine's own stays in use");
            continue;
        }
        process::output(&mut extractor(archive, &root))?;
        list += &name;
        list.push('\n');
    }
    println!("Unpacked {} packages into {}", list.lines().count(), root.display());
    Ok(list)
}

/// The command that unpacks one archive, by its kind.
fn extractor(archive: &Path, root: &Path) -> Command {
    let kind = archive.extension().unwrap_or_default();
    let mut command;
    if kind == "deb" {
        command = Command::new("dpkg-deb");
        command.arg("--extract").arg(archive).arg(root);
    } else if kind == "rpm" {
        // A pipe needs a shell; the paths travel as its arguments.
        command = Command::new("sh");
        let script =
            r#"cd "$2" && rpm2cpio "$1" | cpio --extract --make-directories --unconditional --quiet"#;
        command.args(["-c", script, "sh"]).arg(archive).arg(root);
    } else {
        command = Command::new("bsdtar");
        command.arg("-xf").arg(archive).arg("-C").arg(root);
    }
    command
}

/// Whether a package file's name is one of the libraries to leave alone.
fn is_system(file: &str) -> bool {
    SYSTEM.iter().any(|name| match file.strip_prefix(name) {
        // `glibc-2.40-1.rpm` and `libc6_2.36_amd64.deb`, but not `libgccjit0_12_amd64.deb`.
        Some(rest) => name.ends_with('-') || rest.starts_with(['_', '-', ':']),
        None => false,
    })
}

/// The archives in a folder, in order.
fn archives(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("cannot read {}: {e}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.is_file() && path.extension().is_some_and(|e| e != "sig"));
    paths.sort();
    if paths.is_empty() { Err("nothing was downloaded".into()) } else { Ok(paths) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_is_parsed() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        let release = Release::parse(debian);
        assert_eq!((release.id.as_str(), release.codename.as_str()), ("debian", "bookworm"));
        assert_eq!(release.family(), Family::Apt);
    }

    #[test]
    fn families_follow_what_a_release_is_like() {
        let family = |text| Release::parse(text).family();
        assert_eq!(family("ID=pop\nID_LIKE=\"ubuntu debian\""), Family::Apt);
        assert_eq!(family("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\""), Family::Dnf);
        assert_eq!(family("ID=manjaro\nID_LIKE=arch"), Family::Pacman);
        assert_eq!(family("ID=opensuse-leap\nID_LIKE=\"suse opensuse\""), Family::Zypper);
        assert_eq!(family("ID=nixos"), Family::Other);
        assert_eq!(family(""), Family::Other);
    }

    #[test]
    fn only_whole_names_are_the_systems() {
        for file in
            ["libc6_2.36_amd64.deb", "gcc-12-base_12.2.deb", "glibc-2.40-1.rpm", "libstdc++6_12_amd64.deb"]
        {
            assert!(is_system(file), "{file}");
        }
        for file in
            ["libgccjit0_12_amd64.deb", "libdrm2_2.4_amd64.deb", "mesa-libEGL-25.rpm", "libc++1_14_amd64.deb"]
        {
            assert!(!is_system(file), "{file}");
        }
    }
}
