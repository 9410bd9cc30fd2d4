//! Looking into folders, and writing into them.

use std::fs;
use std::path::{Path, PathBuf};

/// Every folder of the unpacked tree that holds shared libraries itself.
pub(crate) fn library_folders(root: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for parent in ["usr/lib", "usr/lib64", "lib", "lib64"] {
        let parent = root.join(parent);
        folders.extend(files(&parent).into_iter().filter(|path| name(path).contains("-linux-gnu")));
        folders.push(parent);
    }
    folders.retain(|folder| files(folder).iter().any(|path| name(path).contains(".so")));
    folders
}

/// The JSON files of a folder.
pub(crate) fn manifests(folder: &Path) -> Vec<PathBuf> {
    files(folder).into_iter().filter(|path| path.extension().is_some_and(|e| e == "json")).collect()
}

/// A folder's entries in order; none where it cannot be read.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// The last part of a path.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Writes a file and, where needed, the folder for it.
pub(crate) fn store(path: &Path, text: &str) -> Result<(), String> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| fs::write(path, text)).map_err(|e| format!("cannot write {}: {e}", path.display()))
}
