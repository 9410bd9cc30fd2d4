//! Which module may look into which: reads the `use` lines of the sources.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

/// Rooms that must not name `wgpu`: pure, and tested without a GPU.
const PURE: [&str; 14] = [
    "error",
    "rope",
    "spec",
    "layout",
    "weights",
    "reference",
    "quant",
    "pages",
    "params",
    "shader",
    "plan",
    "caps",
    "batch",
    "uptrain",
];
/// Rooms that own, fill or run what lies on the GPU.
const IMPURE: [&str; 7] = [
    "crate::device",
    "crate::cache",
    "crate::upload",
    "crate::step",
    "crate::pipeline",
    "crate::attention",
    "crate::merge",
];
/// Rooms that see the reference and the kernels: tests and what `gqa verify` and `gqa bench` are made of.
const JUDGES: [&str; 2] = ["verify", "profile"];

/// Every source of the library as (room, path, code without comments and tests).
fn sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let inside = path.strip_prefix(&root).unwrap();
            let room = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            if path.is_dir() {
                folders.push(path);
            } else if room != "bin" {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
                let lines: Vec<_> = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
                found.push((room, path, lines.join("\n")));
            }
        }
    }
    assert!(found.len() > 15);
    found
}

#[test]
fn pure_rooms_do_not_name_wgpu() {
    for room in PURE {
        assert!(sources().iter().any(|(r, ..)| r == room), "there is no room {room}");
    }
    for (room, path, code) in sources() {
        if PURE.contains(&room.as_str()) {
            assert!(!code.contains("wgpu::"), "{path:?} names wgpu");
            for impure in IMPURE {
                assert!(!code.contains(impure), "{path:?} looks into {impure}");
            }
        }
    }
}

#[test]
fn what_attention_is_made_of_does_not_look_into_it() {
    for (room, path, code) in sources() {
        if ["device", "cache", "upload", "step", "pipeline"].contains(&room.as_str()) {
            for above in ["crate::attention", "crate::merge"] {
                assert!(!code.contains(above), "{path:?} looks into {above}");
            }
        }
    }
}

#[test]
fn only_judges_see_the_reference() {
    for (room, path, code) in sources() {
        if room != "lib" && room != "reference" && !JUDGES.contains(&room.as_str()) {
            assert!(!code.contains("reference::"), "{path:?} looks into the reference");
            assert!(!code.contains("crate::verify"), "{path:?} looks into verify");
        }
    }
}

#[test]
fn the_library_never_submits_polls_or_maps() {
    for (room, path, code) in sources() {
        if !JUDGES.contains(&room.as_str()) {
            for call in [".submit(", ".poll(wgpu", ".map_async(", "block_on("] {
                assert!(!code.contains(call), "{path:?} calls {call}");
            }
        }
    }
}

#[test]
fn files_can_be_held_in_mind() {
    for (_, path, _) in sources() {
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 450, "{path:?} has {lines} lines");
    }
}
