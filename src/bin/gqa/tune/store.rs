//! What `gqa tune` keeps: a JSON file of entries, each good for one adapter, driver, version, text of the kernels and spec.

use std::path::{Path, PathBuf};

use gqa::shader::{Compiler, link};
use gqa::verify::Gpu;
use gqa::{AttentionSpec, Options, Plan};
use serde::{Deserialize, Serialize};

use super::search::Found;
use crate::Failure;
use crate::hash::fnv1a;

/// Of the file's form; a file of another one is not read.
const VERSION: u32 = 1;

/// The file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Store {
    version: u32,
    pub(super) entries: Vec<Entry>,
}

/// A winner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(flatten)]
    pub(super) key: Key,
    pub(super) options: Options,
    pub(super) decode: Change,
    pub(super) prefill: Change,
}

/// What an entry is good for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) adapter: String,
    pub(super) driver: String,
    /// Of gqa.
    pub(super) version: String,
    /// Hash of the kernels' text, as they are planned by default.
    shaders: String,
    /// In words.
    pub(super) spec: String,
}

/// Seconds as planned and as tuned, medians of runs in turns.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Change {
    pub(super) planned_s: f64,
    pub(super) tuned_s: f64,
}

impl Change {
    /// How many times as fast.
    pub(super) fn gain(&self) -> f64 {
        self.planned_s / self.tuned_s
    }
}

impl Key {
    pub(super) fn of(gpu: &Gpu, spec: &AttentionSpec) -> Result<Self, Failure> {
        let plan =
            Plan::new(spec, &gpu.caps, &Options::default()).map_err(|e| Failure::Usage(e.to_string()))?;
        let texts = plan.variants().into_iter().map(|variant| link(variant, Compiler::Naga).text);
        Ok(Self {
            adapter: gpu.name(),
            driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            shaders: format!("{:016x}", fnv1a(texts.collect::<String>().bytes())),
            spec: spec.to_string(),
        })
    }
}

impl Entry {
    pub(super) fn new(key: Key, found: &Found) -> Self {
        Self { key, options: found.options.clone(), decode: found.decode, prefill: found.prefill }
    }

    pub(super) fn json(&self) -> Result<String, Failure> {
        serde_json::to_string_pretty(self).map_err(|e| Failure::Usage(e.to_string()))
    }
}

/// The file that is asked for, or the one in the platform's cache directory.
pub(crate) fn path(asked: Option<&Path>) -> Result<PathBuf, Failure> {
    let of_platform = || Some(dirs::cache_dir()?.join("gqa").join("tuned.json"));
    asked.map(Path::to_owned).or_else(of_platform).ok_or_else(|| {
        Failure::Usage(
            "this platform names no cache directory: say where by --file or --tuned=FILE".to_owned(),
        )
    })
}

impl Store {
    /// Reads `path`; where there is no file, nothing is kept yet.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |what: String| Failure::Usage(format!("{}: {what}", path.display()));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { version: VERSION, entries: Vec::new() });
            }
            Err(e) => return Err(failed(e.to_string())),
        };
        // The version first: what follows may have another form.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let hint = "not what `gqa tune` writes; remove it, or name another file";
        let Versioned { version } =
            serde_json::from_str(&text).map_err(|e| failed(format!("{hint}: {e}")))?;
        if version != VERSION {
            return Err(failed(format!("version {version}, needed {VERSION}: remove it, and tune again")));
        }
        serde_json::from_str(&text).map_err(|e| failed(format!("{hint}: {e}")))
    }

    /// Keeps `entry` in the place of what was kept for the same.
    pub(super) fn put(&mut self, entry: Entry) {
        self.entries.retain(|kept| kept.key != entry.key);
        self.entries.push(entry);
    }

    /// What is kept for `spec` on `gpu`.
    pub(crate) fn options(&self, gpu: &Gpu, spec: &AttentionSpec) -> Option<Options> {
        let key = Key::of(gpu, spec).ok()?;
        self.entries.iter().find(|entry| entry.key == key).map(|entry| entry.options.clone())
    }

    pub(super) fn json(&self) -> Result<String, Failure> {
        serde_json::to_string_pretty(self).map_err(|e| Failure::Usage(e.to_string()))
    }

    /// Writes it in one go: a reader sees the old file or the new one.
    pub(super) fn write(&self, path: &Path) -> Result<(), Failure> {
        let failed = |e: std::io::Error| Failure::Usage(format!("{}: {e}", path.display()));
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let new = path.with_extension(format!("json.{}", std::process::id()));
        let written = std::fs::write(&new, self.json()? + "\n").and_then(|()| std::fs::rename(&new, path));
        written.map_err(|e| {
            let _ = std::fs::remove_file(&new);
            failed(e)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(spec: &str, rows: u32) -> Entry {
        let change = Change { planned_s: 2.0, tuned_s: 1.0 };
        Entry {
            key: Key {
                adapter: "a".to_owned(),
                driver: "d".to_owned(),
                version: "1".to_owned(),
                shaders: "0".to_owned(),
                spec: spec.to_owned(),
            },
            options: Options { decode_rows: Some(rows), ..Options::default() },
            decode: change,
            prefill: change,
        }
    }

    fn file(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("gqa-tune-{}-{name}", std::process::id())).join("tuned.json")
    }

    #[test]
    fn entries_come_back_and_the_newest_of_a_key_stays() {
        let path = file("again");
        let mut store = Store::read(&path).unwrap();
        assert!(store.entries.is_empty());
        store.put(entry("one", 1));
        store.put(entry("other", 2));
        store.put(entry("one", 3));
        store.write(&path).unwrap();
        let read = Store::read(&path).unwrap();
        assert_eq!(read, store);
        assert_eq!(read.entries, [entry("other", 2), entry("one", 3)]);
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn other_files_are_refused() {
        let path = file("refused");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        for (text, needle) in [
            ("{\"version\": 99, \"rows\": 1}", "version 99"),
            ("[]", "not what `gqa tune` writes"),
            (
                "{\"version\": 1, \"entries\": [{\"options\": {\"faster\": true}}]}",
                "not what `gqa tune` writes",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = Store::read(&path).unwrap_err().to_string();
            assert!(message.contains(needle), "{message}");
        }
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}
