//! The one edit that driver manifests (Vulkan's and EGL's JSON files) need: where their library lies.

use std::fs;
use std::path::{Path, PathBuf};

use crate::files::{manifests, name, store};

/// Copies manifests, with absolute paths in place of names.
pub(crate) fn rewrite(from: &Path, to: &Path, libraries: &[PathBuf]) -> Result<(), String> {
    for manifest in manifests(from) {
        let text =
            fs::read_to_string(&manifest).map_err(|e| format!("cannot read {}: {e}", manifest.display()))?;
        let found = library(&text).and_then(|library| {
            let library = Path::new(library).file_name()?;
            libraries.iter().map(|folder| folder.join(library)).find(|path| path.exists())
        });
        if let Some(text) = found.and_then(|path| with_library(&text, &path.to_string_lossy())) {
            store(&to.join(name(&manifest)), &text)?;
        }
    }
    Ok(())
}

/// The value of `"library_path"`, without its quotes, as a range of `text`.
fn library_range(text: &str) -> Option<std::ops::Range<usize>> {
    const KEY: &str = "\"library_path\"";
    let after_key = text.find(KEY)? + KEY.len();
    let colon = after_key + text[after_key..].find(':')?;
    let start = colon + text[colon..].find('"')? + 1;
    let end = start + text[start..].find('"')?;
    Some(start..end)
}

/// The library that a Vulkan or EGL manifest names.
fn library(text: &str) -> Option<&str> {
    library_range(text).map(|range| &text[range])
}

/// The same manifest naming another library; none if it names no library at all.
fn with_library(text: &str, path: &str) -> Option<String> {
    let range = library_range(text)?;
    Some(format!("{}{}{}", &text[..range.start], escape(path), &text[range.end..]))
}

/// A Vulkan manifest for a driver that comes without one.
pub(crate) fn vulkan(library: &str) -> String {
    format!(
        "{{\n    \"file_format_version\": \"1.0.0\",\n    \"ICD\": {{\n        \"library_path\": \"{}\",\n        \
         \"api_version\": \"1.3.0\"\n    }}\n}}\n",
        escape(library)
    )
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAVAPIPE: &str = r#"{
    "ICD": {
        "api_version": "1.4.305",
        "library_path": "libvulkan_lvp.so"
    },
    "file_format_version": "1.0.0"
}"#;

    #[test]
    fn replaces_only_the_library() {
        let changed = with_library(LAVAPIPE, "/x y/libvulkan_lvp.so").unwrap();
        assert_eq!(changed, LAVAPIPE.replace("libvulkan_lvp.so", "/x y/libvulkan_lvp.so"));
        assert_eq!(library(&changed), Some("/x y/libvulkan_lvp.so"));
    }

    #[test]
    fn allows_space_before_the_colon() {
        let egl = r#"{ "ICD" : { "library_path" : "libEGL_mesa.so.0" } }"#;
        assert_eq!(library(egl), Some("libEGL_mesa.so.0"));
    }

    #[test]
    fn refuses_what_names_no_library() {
        assert_eq!(with_library("{}", "/x"), None);
        assert_eq!(with_library(r#"{"library_path": 1}"#, "/x"), None);
    }

    #[test]
    fn writes_what_it_reads() {
        assert_eq!(library(&vulkan("/a/b.so")), Some("/a/b.so"));
    }
}
