//! `gqa tune` and `gqa bench --tuned` as a user runs them, on the adapter that `gqa` takes by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

/// Runs `gqa` and gives its outputs; the attention is small, because this is not about times.
fn gqa(args: &[&str], file: &Path) -> [String; 2] {
    let (is_ok, out, err) = run(args, file);
    assert!(is_ok, "{args:?}: {err}");
    [out, err]
}

fn run(args: &[&str], file: &Path) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gqa"));
    command.args(args).args(["--heads", "3/1", "--dim", "32", "--samples", "1"]);
    let file = file.to_str().unwrap();
    match args[0] {
        "tune" => command.args(["--decode", "100", "--prefill", "20", "--file", file]),
        _ => command.args(["--q-len", "1", "--kv-len", "100", &format!("--tuned={file}")]),
    };
    let output = command.output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.success(), out, err)
}

#[test]
fn what_is_tuned_is_kept_and_bench_runs_with_it() {
    let folder = std::env::temp_dir().join(format!("gqa-tune-cli-{}", std::process::id()));
    let file = folder.join("tuned.json");
    let (is_ok, _, err) = run(&["bench"], &file);
    assert!(!is_ok && err.contains("no such file"), "{err}");

    let [table, _] = gqa(&["tune"], &file);
    for part in ["3/1 heads", "family", "fill", "planned against tuned", "Options"] {
        assert!(table.contains(part), "{part} is missing:\n{table}");
    }
    let kept: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let entry = &kept["entries"][0];
    assert!(entry["spec"].as_str().unwrap().starts_with("3/1 heads"), "{entry}");
    let options: gqa::Options = serde_json::from_value(entry["options"].clone()).unwrap();
    assert_eq!(options.chunk, None);

    let [json, err] = gqa(&["bench", "--format", "json"], &file);
    assert!(!err.contains("not tuned"), "{err}");
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["tuned"][0], serde_json::json!({ "spec": entry["spec"], "options": entry["options"] }));
    // What was tuned is of another attention.
    let [_, err] = gqa(&["bench", "--softcap", "30"], &file);
    assert!(err.contains("not tuned, so as planned: 3/1 heads"), "{err}");
    std::fs::remove_dir_all(folder).unwrap();
}
