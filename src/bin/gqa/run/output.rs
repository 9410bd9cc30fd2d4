//! `-o`: results as safetensors files.

use std::path::{Path, PathBuf};

use gqa::verify::Output;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::Failure;
use crate::case::Case;

/// The file that each case's result goes to: `out` itself, or below it where it is, or must be, a directory.
pub(super) fn plan(out: &Path, cases: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    if cases.len() == 1 && !out.is_dir() {
        apart(out, cases)?;
        return Ok(vec![out.to_owned()]);
    }
    std::fs::create_dir_all(out).map_err(|e| failed(out, &e))?;
    let mut targets: Vec<PathBuf> = Vec::new();
    for case in cases {
        let Some(name) = case.file_name() else {
            return Err(Failure::Usage(format!("{} has no file name", case.display())));
        };
        let target = out.join(name);
        if targets.contains(&target) {
            return Err(Failure::Usage(format!("two cases would be written to {}", target.display())));
        }
        apart(&target, cases)?;
        targets.push(target);
    }
    Ok(targets)
}

/// That a result does not overwrite a case.
fn apart(target: &Path, cases: &[PathBuf]) -> Result<(), Failure> {
    let same =
        |case: &PathBuf| case.canonicalize().ok().is_some_and(|c| target.canonicalize().ok() == Some(c));
    match cases.iter().any(same) {
        true => Err(Failure::Usage(format!("-o would overwrite the case {}", target.display()))),
        false => Ok(()),
    }
}

/// Writes `out` and `lse` as the case format has them, in f32; rows beyond `q_lens` are NaN.
pub(super) fn write(target: &Path, case: &Case, output: &Output) -> Result<(), Failure> {
    let extents = case.extents;
    let (heads, len, dim) = (extents.q_heads, extents.q_len, extents.v_head_dim);
    let out = arrange(&output.out, [heads, len, dim]);
    let lse = arrange(&output.lse, [heads, len, 1]);
    let view = |shape: Vec<usize>, bytes| TensorView::new(Dtype::F32, shape, bytes);
    let bytes = view(vec![extents.batch, heads, len, dim], &out)
        .and_then(|out| Ok([("out", out), ("lse", view(vec![extents.batch, heads, len], &lse)?)]))
        .and_then(|tensors| safetensors::serialize(tensors, None))
        .map_err(|e| failed(target, &e))?;
    std::fs::write(target, bytes).map_err(|e| failed(target, &e))
}

/// From `[token][head][dim]` per sequence to the bytes of `[batch, head, token, dim]`.
fn arrange(sequences: &[Vec<f32>], [heads, tokens, dim]: [usize; 3]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let missing = vec![f32::NAN; dim];
    for rows in sequences {
        for row in (0..heads).flat_map(|head| (0..tokens).map(move |token| token * heads + head)) {
            let row = rows.get(row * dim..(row + 1) * dim).unwrap_or(&missing);
            bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
    bytes
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::Usage(format!("cannot write {}: {error}", path.display()))
}
