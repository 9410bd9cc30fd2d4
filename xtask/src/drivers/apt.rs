//! Debian, Ubuntu and what derives from them: apt with a private state, which needs no root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Release, work};
use crate::process;

const PACKAGES: [&str; 5] =
    ["mesa-vulkan-drivers", "libvulkan1", "libegl1", "libegl-mesa0", "libgl1-mesa-dri"];
const SOURCES: &str = "/etc/apt/sources.list";
const SOURCE_PARTS: &str = "/etc/apt/sources.list.d";

/// Downloads what the machine lacks, or has only in an older version.
pub(super) fn fetch(folder: &Path, release: &Release) -> Result<Vec<PathBuf>, String> {
    let apt = Apt::new(folder)?;
    if let Some(suite) = better_suite(release) {
        fs::write(apt.parts.join("gqa.list"), backports(suite, &release.codename))
            .map_err(|e| format!("cannot write apt's sources: {e}"))?;
        match apt.fetch(Some(suite)) {
            Ok(archives) => return Ok(archives),
            Err(message) => println!("{suite} cannot be used, so on with {}: {message}", release.codename),
        }
        fs::remove_file(apt.parts.join("gqa.list"))
            .map_err(|e| format!("cannot change apt's sources: {e}"))?;
    }
    apt.fetch(None)
}

/// A suite of the same distribution with a much newer Mesa: lavapipe 25 is ten times as fast as Debian 12's 22.3.
fn better_suite(release: &Release) -> Option<&'static str> {
    match (release.id.as_str(), release.codename.as_str()) {
        ("debian", "bookworm") => Some("bookworm-backports"),
        _ => None,
    }
}

/// The line for another suite on the mirror that the machine uses already.
fn backports(suite: &str, codename: &str) -> String {
    let lists =
        sources().iter().filter_map(|path| fs::read_to_string(path).ok()).collect::<Vec<_>>().join("\n\n");
    let mirror = mirror(&lists, codename).unwrap_or("http://deb.debian.org/debian");
    let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let signed = if Path::new(key).exists() { format!("[signed-by={key}] ") } else { String::new() };
    format!("deb {signed}{mirror} {suite} main\n")
}

/// The first address that serves a suite, from lists of either format.
fn mirror<'a>(lists: &'a str, suite: &str) -> Option<&'a str> {
    let one_line = lists.lines().find_map(|line| {
        let mut words = line.strip_prefix("deb ")?.trim_start();
        if words.starts_with('[') {
            words = words.split_once(']')?.1;
        }
        let mut words = words.split_whitespace();
        let address = words.next()?;
        (words.next()? == suite).then_some(address)
    });
    one_line.or_else(|| {
        lists.split("\n\n").find_map(|stanza| {
            let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
            let serves = field("Suites:")?.split_whitespace().any(|word| word == suite);
            field("URIs:").filter(|_| serves)?.split_whitespace().next()
        })
    })
}

/// The machine's own lists of sources.
fn sources() -> Vec<PathBuf> {
    let parts = fs::read_dir(SOURCE_PARTS).into_iter().flatten().flatten().map(|entry| entry.path());
    std::iter::once(PathBuf::from(SOURCES)).chain(parts).collect()
}

/// apt with everything that it writes in a private folder.
struct Apt {
    configuration: PathBuf,
    parts: PathBuf,
    cache: PathBuf,
}

impl Apt {
    fn new(folder: &Path) -> Result<Self, String> {
        let (state, cache, parts) =
            (work(folder, "state")?, work(folder, "cache")?, work(folder, "sources")?);
        for partial in ["state/lists/partial", "cache/archives/partial"] {
            work(folder, partial)?;
        }
        for source in sources() {
            // One that cannot be read (it may hold a password) is one that we can do without.
            if let (true, Some(name)) = (source.is_file(), source.file_name()) {
                let _ = fs::copy(&source, parts.join(name));
            }
        }
        let configuration = folder.join("work/apt.conf");
        fs::write(&configuration, options(&state, &cache, &parts))
            .map_err(|e| format!("cannot set apt up: {e}"))?;
        Ok(Self { configuration, parts, cache })
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("apt-get");
        command
            .arg("-c")
            .arg(&self.configuration)
            .args(words)
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// apt's installation of our packages, of the suite if one is named, up to the point where it would need root.
    fn install(&self, how: &str, suite: Option<&str>) -> Command {
        let mut command = self.command(&["install", "--yes", "--no-install-recommends", how]);
        command.args(suite.map(|suite| format!("--target-release={suite}"))).args(PACKAGES);
        command
    }

    fn fetch(&self, suite: Option<&str>) -> Result<Vec<PathBuf>, String> {
        let more = suite.map(|suite| format!(" and {suite}")).unwrap_or_default();
        println!("Reading the package lists of the machine's own sources{more} (apt, in a private folder)");
        // Some third party's source may fail without harm: what counts is whether the packages are found.
        let update = process::output(&mut self.command(&["update"]));
        let list = process::output(&mut self.install("--print-uris", suite)).map_err(|e| {
            let update = update.err().map(|e| format!("{e}\n")).unwrap_or_default();
            format!("{update}{e}\n(apt may have had no network to refresh its lists)")
        })?;
        let items = items(&list);
        if suite.is_some() && items.iter().any(|item| super::is_system(&item.file)) {
            return Err("it would need a newer C library".into());
        }
        if items.is_empty() {
            println!("The machine's own drivers are the newest: nothing to unpack");
            return Ok(Vec::new());
        }
        let bytes: u64 = items.iter().map(|item| item.bytes).sum();
        println!(
            "Fetching {} packages, {:.1} MB, to unpack without installing:",
            items.len(),
            bytes as f64 / 1e6
        );
        for item in &items {
            println!("  {}", item.address);
        }
        process::output(&mut self.install("--download-only", suite))?;
        Ok(items.iter().map(|item| self.cache.join("archives").join(&item.file)).collect())
    }
}

/// apt's options; a file, since only a file can clear the hooks that the machine runs after an update.
fn options(state: &Path, cache: &Path, parts: &Path) -> String {
    format!(
        "Dir::State \"{}\";\nDir::State::status \"/var/lib/dpkg/status\";\nDir::Cache \"{}\";\n\
         Dir::Etc::SourceList \"/dev/null\";\nDir::Etc::SourceParts \"{}\";\n\
         Debug::NoLocking \"true\";\nAcquire::Languages \"none\";\nAcquire::Retries \"2\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         #clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n#clear DPkg::Pre-Invoke;\n#clear DPkg::Post-Invoke;\n\
         #clear DPkg::Pre-Install-Pkgs;\n",
        state.display(),
        cache.display(),
        parts.display()
    )
}

/// A package to download.
#[derive(Debug, PartialEq)]
struct Item {
    address: String,
    file: String,
    bytes: u64,
}

/// Parses lines such as `'http://.../libdrm2.deb' libdrm2_2.4_amd64.deb 38648 MD5Sum:...`.
fn items(text: &str) -> Vec<Item> {
    let item = |line: &str| {
        let (address, rest) = line.strip_prefix('\'')?.split_once("' ")?;
        let mut words = rest.split_whitespace();
        let file = words.next()?.to_string();
        Some(Item { address: address.to_string(), file, bytes: words.next()?.parse().ok()? })
    };
    text.lines().filter_map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_among_apts_talk() {
        let text = "Reading package lists...\nNeed to get 21.6 MB of archives.\n\
            'http://d.org/l/libdrm2_2.4.123-1%7ebpo_amd64.deb' libdrm2_2.4.123-1~bpo_amd64.deb 38648 \n\
            'http://d.org/v/libvulkan1_1.3_amd64.deb' libvulkan1_1.3_amd64.deb 116232 MD5Sum:69\n";
        let items = items(text);
        assert_eq!(items.len(), 2);
        assert_eq!(items[0].file, "libdrm2_2.4.123-1~bpo_amd64.deb");
        assert_eq!(items[1].address, "http://d.org/v/libvulkan1_1.3_amd64.deb");
        assert_eq!(items.iter().map(|item| item.bytes).sum::<u64>(), 154_880);
    }

    #[test]
    fn mirror_of_either_format() {
        let old =
            "# deb http://no/ bookworm main\ndeb [signed-by=/k arch=amd64] http://old/debian bookworm main\n";
        assert_eq!(mirror(old, "bookworm"), Some("http://old/debian"));
        assert_eq!(mirror(old, "trixie"), None);
        let new = "Types: deb\nURIs: http://sec/\nSuites: bookworm-security\n\n\
                   Types: deb\nURIs: http://new/debian\nSuites: bookworm bookworm-updates\n";
        assert_eq!(mirror(new, "bookworm"), Some("http://new/debian"));
        assert_eq!(mirror(new, "bookworm-security"), Some("http://sec/"));
    }

    #[test]
    fn only_bookworm_looks_further() {
        let release = |text| Release::parse(text);
        assert_eq!(
            better_suite(&release("ID=debian\nVERSION_CODENAME=bookworm")),
            Some("bookworm-backports")
        );
        assert_eq!(better_suite(&release("ID=ubuntu\nVERSION_CODENAME=noble")), None);
    }
}
