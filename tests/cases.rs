//! `gqa run` from end to end: the cases of `tests/data` on every adapter, exit codes, results, bad files.
#![cfg(feature = "cli")]
// Helpers of tests: clippy.toml allows it only in the tests themselves.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(format!("{name}.safetensors"))
}

/// A fresh directory for one test.
fn scratch(test: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cases").join(test);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn gqa(args: &[&str], files: &[PathBuf]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gqa")).arg("run").args(args).args(files).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn expect_code(output: &Output, code: i32) {
    let Output { status, stdout, stderr } = output;
    assert_eq!(status.code(), Some(code), "stdout: {}stderr: {}", text(stdout), text(stderr));
}

/// Runs the files on every adapter; one report for each file and adapter.
#[track_caller]
fn reports(args: &[&str], files: &[PathBuf]) -> Vec<Value> {
    let output = gqa(&[args, &["--adapter", "all", "--format", "json"]].concat(), files);
    expect_code(&output, 0);
    let reports: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!reports.is_empty() && reports.len().is_multiple_of(files.len()), "{} reports", reports.len());
    reports
}

/// Asserts that every report passed, with errors of `out` within `bound`.
#[track_caller]
fn expect_within(reports: &[Value], bound: f64) {
    for report in reports {
        assert_eq!(report["status"], "pass", "{report}");
        let error = report["out"]["max_abs"].as_f64().unwrap();
        assert!(error <= bound, "{error} is beyond {bound}: {report}");
    }
}

fn smollm2() -> Vec<PathBuf> {
    ["smollm2-layer00", "smollm2-layer14", "smollm2-layer29"].map(data).to_vec()
}

/// The node tests of the ONNX operator `Attention`, with the tolerances that `gqa run` takes of itself.
#[test]
fn all_60_onnx_cases_pass_on_every_adapter() {
    let onnx = std::fs::read_dir(data("onnx").with_extension("")).unwrap();
    let mut files: Vec<_> = onnx.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 60);
    let reports = reports(&[], &files);
    let mut passes = BTreeMap::new();
    for report in &reports {
        let half = report["file"].as_str().unwrap().contains("fp16");
        let (atol, dtype) = if half { (2e-3, "f16") } else { (1e-5, "f32") };
        assert_eq!((&report["out"]["atol"], &report["dtype"]), (&atol.into(), &dtype.into()), "{report}");
        expect_within(std::slice::from_ref(report), atol);
        *passes.entry(report["adapter"].as_str().unwrap()).or_insert(0) += 1;
    }
    assert!(passes.values().all(|count| *count == 60), "{passes:?}");
}

#[test]
fn smollm2_in_f32() {
    let reports = reports(&[], &smollm2());
    expect_within(&reports, 2e-5);
    for report in &reports {
        assert_eq!(report["expected"], "file");
        assert!(report["lse"]["max_abs"].as_f64().unwrap() <= 2e-5, "{report}");
    }
}

#[test]
fn smollm2_with_a_cache_of_16_bits() {
    expect_within(&reports(&["--kv-dtype", "f16"], &smollm2()), 6e-3);
    expect_within(&reports(&["--kv-dtype", "bf16"], &smollm2()), 8e-2);
}

#[test]
fn smollm2_with_queries_of_16_bits() {
    for report in reports(&["--dtype", "f16", "--kv-dtype", "f16"], &smollm2()) {
        assert_eq!(report["status"], "pass", "{report}");
        assert_eq!((&report["dtype"], &report["kv_dtype"]), (&"f16".into(), &"f16".into()));
    }
}

#[test]
fn ragged_bf16_and_unanswered_cases_pass() {
    let reports = reports(&[], &["ragged", "bf16", "no-answer"].map(data));
    expect_within(&reports, 2e-5);
    for report in &reports {
        let answered = !report["file"].as_str().unwrap().contains("no-answer");
        assert_eq!(report["expected"], if answered { "file" } else { "reference" }, "{report}");
        assert!(report["lse"]["max_abs"].as_f64().unwrap() <= 2e-5, "{report}");
    }
}

#[test]
fn masks_windows_sinks_and_bent_logits_pass() {
    let files = ["logits", "keep", "add"].map(data);
    for report in &reports(&[], &files) {
        expect_within(std::slice::from_ref(report), 1e-5);
        assert!(report["lse"]["max_abs"].as_f64().unwrap() <= 1e-5, "{report}");
    }
    expect_within(&reports(&["--dtype", "f16", "--kv-dtype", "f16"], &files), 6e-3);
}

#[test]
fn what_the_library_refuses_is_unsupported() {
    let dir = scratch("unsupported");
    let file = dir.join("sinks.safetensors");
    // A sink of -inf, which is to say none, would be a good case.
    change(&data("logits"), "sinks", 3, |_| f32::NEG_INFINITY, &file);
    let output = gqa(&[], &[file, data("onnx/4d")]);
    expect_code(&output, 1);
    let stdout = text(&output.stdout);
    let lines: Vec<_> = stdout.lines().collect();
    assert!(lines[0].starts_with("UNSUPPORTED") && lines[0].contains("weights.sinks is -inf"), "{stdout}");
    assert!(lines[1].starts_with("PASS") && lines[1].contains("4d.safetensors"), "{stdout}");
    assert_eq!(lines[2..], ["1 passed, 0 failed, 1 unsupported, 0 bad"]);
}

/// A copy of a case in which element `index` of tensor `name` (f32) is another.
fn change(case: &Path, name: &str, index: usize, with: impl Fn(f32) -> f32, to: &Path) {
    let bytes = std::fs::read(case).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut spoilt = tensors.tensor(name).unwrap().data().to_vec();
    let element: &mut [u8; 4] = (&mut spoilt[index * 4..][..4]).try_into().unwrap();
    *element = with(f32::from_le_bytes(*element)).to_le_bytes();
    let view = |(key, view): (String, TensorView<'_>)| match key == name {
        true => (key, view.dtype(), view.shape().to_vec(), spoilt.clone()),
        false => (key, view.dtype(), view.shape().to_vec(), view.data().to_vec()),
    };
    let owned: Vec<_> = tensors.tensors().into_iter().map(view).collect();
    let views = owned
        .iter()
        .map(|(key, dtype, shape, data)| (key, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(to, safetensors::serialize(views, header.metadata().clone()).unwrap()).unwrap();
}

#[test]
fn a_mismatch_fails_and_is_located() {
    let dir = scratch("mismatch");
    let (out, lse) = (dir.join("out.safetensors"), dir.join("lse.safetensors"));
    // out is [2, 3, 4, 8]; lse is [1, 9, 32].
    let more = |x| x + 1.0;
    change(&data("onnx/4d"), "out", ((3 + 2) * 4 + 3) * 8 + 7, more, &out);
    change(&data("smollm2-layer00"), "lse", 8 * 32 + 5, more, &lse);
    let output = gqa(&[], &[out.clone(), lse.clone(), data("onnx/4d")]);
    expect_code(&output, 1);
    let stdout = text(&output.stdout);
    let lines: Vec<_> = stdout.lines().collect();
    assert!(lines[0].starts_with("FAIL") && lines[0].contains("worst at [1, 2, 3, 7]: got "), "{stdout}");
    assert!(lines[1].starts_with("FAIL") && lines[1].contains("worst at [0, 8, 5]: got "), "{stdout}");
    assert!(lines[2].starts_with("PASS"), "{stdout}");
    assert_eq!(lines[3], "1 passed, 2 failed, 0 unsupported, 0 bad");
    // The tolerance is the user's in the end.
    expect_code(&gqa(&["--atol", "1.01"], &[out, lse]), 0);
    expect_code(&gqa(&["--atol", "0", "--rtol", "0"], &[data("smollm2-layer29")]), 1);
}

#[test]
fn bad_files_are_explained_and_the_others_run() {
    let dir = scratch("bad");
    let good = std::fs::read(data("onnx/4d")).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.join(name), bytes).unwrap();
        dir.join(name)
    };
    let mut hostile = u64::MAX.to_le_bytes().to_vec();
    hostile.extend_from_slice(&good);
    let bad = [
        (write("empty", &[]), "it has 0 bytes"),
        (write("cut", &good[..good.len() / 2]), "truncated"),
        (write("long", &[&good[..], &[0; 3]].concat()), "3 bytes follow"),
        (write("hostile", &hostile), "its header claims 18446744073709551615 bytes"),
        (write("text", b"to be or not to be"), "its header claims"),
        (dir.clone(), "not a regular file"),
        (dir.join("missing"), "No such file"),
    ];
    for (file, words) in &bad {
        let output = gqa(&[], &[file.clone(), data("onnx/4d")]);
        expect_code(&output, 2);
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        let lines: Vec<_> = stdout.lines().collect();
        let prefix = format!("BAD {}: ", file.display());
        // The words of a missing file are the system's.
        let says = lines[0].contains(words) || !cfg!(unix) && words.starts_with("No such");
        assert!(lines[0].starts_with(&prefix) && says, "{words:?} is not in: {stdout}");
        assert!(lines[1].starts_with("PASS"), "{stdout}");
        assert_eq!(lines[2], "1 passed, 0 failed, 0 unsupported, 1 bad");
        assert_eq!(stderr, "gqa: 1 file is not a good case\n");
    }
}

/// The f32 tensor `name` of a file.
fn floats(file: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
    let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (tensor.shape().to_vec(), values.collect())
}

/// Asserts that `result` has the `out` and `lse` of `case`, NaN where the case has NaN.
#[track_caller]
fn expect_result(result: &Path, case: &Path) {
    for name in ["out", "lse"] {
        let ((shape, got), (expected_shape, expected)) = (floats(result, name), floats(case, name));
        assert_eq!(shape, expected_shape, "{name}");
        for (got, expected) in got.into_iter().zip(expected) {
            let same = got == expected || got.is_nan() && expected.is_nan() || (got - expected).abs() <= 2e-5;
            assert!(same, "{name}: got {got}, expected {expected}");
        }
    }
}

#[test]
fn results_are_written_as_a_case_has_them() {
    let dir = scratch("output");
    let file = dir.join("result.safetensors");
    let out = |path: &Path| path.to_string_lossy().into_owned();
    expect_code(&gqa(&["-o", &out(&file)], &[data("ragged")]), 0);
    expect_result(&file, &data("ragged"));

    let many = dir.join("many");
    let mut files = smollm2();
    let unsupported = dir.join("unsupported.safetensors");
    change(&data("logits"), "sinks", 0, |_| f32::NEG_INFINITY, &unsupported);
    files.push(unsupported);
    expect_code(&gqa(&["-o", &out(&many)], &files), 1);
    for case in smollm2() {
        expect_result(&many.join(case.file_name().unwrap()), &case);
    }
    assert!(!many.join("unsupported.safetensors").exists());

    let copy = dir.join("copy.safetensors");
    std::fs::copy(data("ragged"), &copy).unwrap();
    let output = gqa(&["-o", &out(&copy)], std::slice::from_ref(&copy));
    expect_code(&output, 2);
    assert!(text(&output.stderr).contains("would overwrite"), "{}", text(&output.stderr));
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(data("ragged")).unwrap());
    expect_code(&gqa(&["-o", &out(&many)], &[data("ragged"), data("ragged")]), 2);
}

#[test]
fn wrong_usage_and_no_adapter_have_codes_of_their_own() {
    expect_code(&gqa(&[], &[]), 2);
    for args in [["--dtype", "bf16"], ["--kv-dtype", "f8"], ["--atol", "NaN"], ["--rtol=-1", "--atol=0"]] {
        expect_code(&gqa(&args, &[data("onnx/4d")]), 2);
    }
    let output = gqa(&["--adapter", "no such adapter"], &[data("onnx/4d")]);
    expect_code(&output, 3);
    assert!(text(&output.stderr).contains("no adapter matches"), "{}", text(&output.stderr));
}
