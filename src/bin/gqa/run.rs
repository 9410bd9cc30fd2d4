//! `gqa run`: case files, computed and compared.

mod output;
mod report;

use std::io::Read;
use std::path::{Path, PathBuf};

use gqa::Dtype;
use gqa::verify::{self, Gpu, Output, Problem, Setup, Tolerance};
use gqa::wgpu;

use crate::Failure;
use crate::adapter::{AdapterArgs, side_by_side};
use crate::case::{Case, CaseError, Expected};
use report::{Check, Counts, Figures, Report, Source, Status};

/// Largest case file that is read.
const MAX_FILE: u64 = 4 << 30;

/// Compute case files and compare with the answers that they hold, else with the f64 reference
///
/// Exit codes: 0 all passed, 1 one failed or is unsupported, 2 a file is bad, 3 no suitable adapter.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Case files: see docs/case-format.md
    #[arg(required = true, value_name = "CASE")]
    cases: Vec<PathBuf>,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Storage of queries and outputs: f32 or f16 [default: as `q` in the file, f32 for bf16]
    #[arg(long, value_name = "DTYPE", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
    /// Storage of the KV cache: f32, f16, bf16, fp8, q8 or q4 [default: as `k` in the file]
    #[arg(long, value_name = "DTYPE")]
    kv_dtype: Option<Dtype>,
    /// Rotate keys and values before they are stored, against the error of few bits
    #[arg(long)]
    rotate: bool,
    /// Absolute part of the tolerance [default: from the dtypes]
    #[arg(long, value_name = "X", value_parser = parse_tolerance)]
    atol: Option<f64>,
    /// Part of the tolerance relative to the expected value [default: from the dtypes]
    #[arg(long, value_name = "X", value_parser = parse_tolerance)]
    rtol: Option<f64>,
    /// Write `out` and `lse` to this file, or for several cases to files in this directory
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// How to report
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// A line for each case, and a summary
    Table,
    /// An array of objects
    Json,
}

fn parse_dtype(s: &str) -> Result<Dtype, String> {
    match s.parse() {
        Ok(dtype @ (Dtype::F32 | Dtype::F16)) => Ok(dtype),
        _ => Err("queries and outputs are stored as f32 or f16".to_owned()),
    }
}

fn parse_tolerance(s: &str) -> Result<f64, String> {
    let number = s.parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.0);
    number.ok_or_else(|| "it must be a number, at least 0".to_owned())
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let gpus = args.adapter.open()?;
    if args.output.is_some() && gpus.len() > 1 {
        return Err(Failure::Usage("-o takes one adapter: name it by --adapter".to_owned()));
    }
    let targets = match &args.output {
        Some(out) => output::plan(out, &args.cases)?,
        None => Vec::new(),
    };
    let (mut counts, mut reports) = (Counts::default(), Vec::new());
    for (i, path) in args.cases.iter().enumerate() {
        let call = Call { args, path, target: targets.get(i).map(PathBuf::as_path) };
        for report in call.reports(&gpus)? {
            counts.add(report.status);
            match args.format {
                Format::Table => println!("{report}"),
                Format::Json => reports.push(report),
            }
        }
    }
    match args.format {
        Format::Table => println!("{counts}"),
        Format::Json => {
            let json = serde_json::to_string_pretty(&reports);
            println!("{}", json.map_err(|e| Failure::Usage(e.to_string()))?);
        }
    }
    match [Status::Bad, Status::Fail, Status::Unsupported].map(|status| counts.of(status)) {
        [0, 0, 0] => Ok(()),
        [0, ..] => Err(Failure::Mismatch),
        [1, ..] => Err(Failure::Usage("1 file is not a good case".to_owned())),
        [bad, ..] => Err(Failure::Usage(format!("{bad} files are not good cases"))),
    }
}

/// One file.
struct Call<'a> {
    args: &'a Args,
    path: &'a Path,
    target: Option<&'a Path>,
}

impl Call<'_> {
    /// A report for each adapter, or one where the file itself cannot be run.
    fn reports(&self, gpus: &[Gpu]) -> Result<Vec<Report>, Failure> {
        let bad = |reason| Report {
            file: self.path.display().to_string(),
            adapter: None,
            status: Status::Bad,
            reason: Some(reason),
            figures: None,
        };
        let problem = |case: &Case| -> Result<Problem, CaseError> {
            let [dtype, kv_dtype] = self.dtypes(case);
            let mut problem = case.problem(dtype, kv_dtype)?;
            problem.spec = problem.spec.to_builder().rotated(self.args.rotate).build()?;
            Ok(problem)
        };
        let both = read(self.path).and_then(|bytes| {
            let case = Case::parse(&bytes).map_err(text)?;
            let problem = problem(&case).map_err(text)?;
            Ok((case, problem))
        });
        match both {
            Ok((case, problem)) => side_by_side(gpus, |gpu| self.report(gpu, &case, &problem)),
            Err(reason) => Ok(vec![bad(reason)]),
        }
    }

    fn dtypes(&self, case: &Case) -> [Dtype; 2] {
        let [_, k, _] = case.stored;
        [self.args.dtype.unwrap_or(case.default_dtype()), self.args.kv_dtype.unwrap_or(k)]
    }

    fn report(&self, gpu: &Gpu, case: &Case, problem: &Problem) -> Result<Report, Failure> {
        let mut report = Report {
            file: self.path.display().to_string(),
            adapter: Some(gpu.name()),
            status: Status::Unsupported,
            reason: None,
            figures: None,
        };
        match compute(gpu, problem) {
            Ok(output) => {
                if let Some(target) = self.target {
                    output::write(target, case, &output)?;
                }
                let figures = self.compare(case, problem, &output);
                report.status = if figures.passes() { Status::Pass } else { Status::Fail };
                report.figures = Some(figures);
                if report.status == Status::Pass
                    && let Err(reason) = self.check(problem, &output)
                {
                    (report.status, report.reason) = (Status::Fail, Some(reason));
                }
            }
            Err(reason) if reason.starts_with("the device is lost") => return Err(Failure::Adapter(reason)),
            Err(reason) => report.reason = Some(reason),
        }
        Ok(report)
    }

    /// Where what is stored has few bits or is rotated: that this is right, and that the outputs follow from it. A file's answer is then too
    /// far off to tell a wrong kernel by. Not where the user says how far off is right.
    fn check(&self, problem: &Problem, output: &Output) -> Result<(), String> {
        let spec = &problem.spec;
        let few_bits = output.stored.is_some() || [spec.k_dtype(), spec.v_dtype()].contains(&Dtype::Fp8);
        let is_asked = few_bits && self.args.atol.is_none() && self.args.rtol.is_none();
        if is_asked { verify::check(problem, output) } else { Ok(()) }
    }

    fn compare(&self, case: &Case, problem: &Problem, output: &Output) -> Figures {
        let dim = case.extents.v_head_dim;
        let source = match (&case.out, &case.lse) {
            (None, None) => Source::Reference,
            _ => Source::File,
        };
        let mut magnitude = 0.0;
        let [out, lse] = match source {
            Source::File => {
                [&case.out, &case.lse].map(|expected| expected.as_ref().map(|e| e.values.clone()))
            }
            Source::Reference => {
                let answers = problem.answers(output.stored.as_deref());
                magnitude = answers.iter().map(|answer| answer.magnitude).fold(magnitude, f64::max);
                // As `gqa verify` has it.
                magnitude *= if problem.spec.rotated() { 4.0 } else { 1.0 };
                let out = answers.iter().flat_map(|answer| &answer.out).copied().collect();
                let lse = answers.iter().flat_map(|answer| &answer.lse).copied().collect();
                [Some(out), Some(lse)]
            }
        };
        let [out_tolerance, lse_tolerance] = match source {
            Source::File => tolerances(case, problem),
            Source::Reference => [
                Tolerance::of_output(&problem.spec, largest_value(problem), magnitude),
                Tolerance::of_lse(magnitude),
            ],
        }
        .map(|t| Tolerance {
            atol: self.args.atol.unwrap_or(t.atol),
            rtol: self.args.rtol.unwrap_or(t.rtol),
        });
        let check = |got: &[Vec<f32>], expected: &[f64], tolerance| {
            let mismatch = verify::compare(&got.concat(), expected, tolerance);
            (mismatch, tolerance, relative(&got.concat(), expected))
        };
        Figures {
            dtype: problem.spec.q_dtype().name(),
            kv_dtype: problem.spec.k_dtype().name(),
            expected: source,
            out: out.map(|expected| {
                let (mismatch, tolerance, relative) = check(&output.out, &expected, out_tolerance);
                Check::new(&mismatch, tolerance, relative, &case.position(mismatch.index, dim))
            }),
            lse: lse.map(|expected| {
                let (mismatch, tolerance, relative) = check(&output.lse, &expected, lse_tolerance);
                let [batch, head, token, _] = case.position(mismatch.index, 1);
                Check::new(&mismatch, tolerance, relative, &[batch, head, token])
            }),
        }
    }
}

/// The largest value of any sequence.
fn largest_value(problem: &Problem) -> f64 {
    (0..problem.sequences.len()).map(|nth| problem.largest_value(nth)).fold(0.0, f64::max)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The bytes of a file, whose size is checked before.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    let meta = std::fs::metadata(path).map_err(text)?;
    if !meta.is_file() {
        return Err("not a regular file".to_owned());
    }
    if meta.len() > MAX_FILE {
        return Err(format!("it has {} bytes, more than {MAX_FILE}", meta.len()));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(text)?;
    // It may have grown since.
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(text)?;
    Ok(bytes)
}

/// Runs the problem; errors that wgpu reports apart are caught, since they would end the program.
fn compute(gpu: &Gpu, problem: &Problem) -> Result<Output, String> {
    fits(gpu, problem)?;
    let filters =
        [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation];
    let [internal, memory, validation] = filters.map(|filter| gpu.device.push_error_scope(filter));
    let result = verify::run(gpu, problem, &Setup { slack: 1, ..Setup::default() });
    // Innermost first.
    let errors = [
        pollster::block_on(validation.pop()),
        pollster::block_on(memory.pop()),
        pollster::block_on(internal.pop()),
    ];
    match errors.into_iter().flatten().next() {
        Some(error) => Err(error.to_string()),
        None => result,
    }
}

/// That every tensor can be a buffer of this device.
fn fits(gpu: &Gpu, problem: &Problem) -> Result<(), String> {
    let spec = &problem.spec;
    let size = spec.q_dtype().bytes() as usize;
    let limit = gpu.caps.binding_size.min(gpu.caps.buffer_size);
    let rows: usize = problem.sequences.iter().map(|s| s.q_len as usize * spec.q_heads() as usize).sum();
    let sizes = [
        ("q", problem.sequences.iter().map(|s| s.q.len()).sum::<usize>() * size),
        ("k", problem.sequences.iter().map(|s| s.k.len()).sum::<usize>() * size),
        ("v", problem.sequences.iter().map(|s| s.v.len()).sum::<usize>() * size),
        ("out", rows * spec.v_head_dim() as usize * size),
        ("lse", rows * 4),
        ("mask", problem.mask.as_ref().map_or(0, |mask| mask.values.len()) * size),
    ];
    match sizes.iter().find(|(_, size)| *size as u64 > limit) {
        Some((name, size)) => {
            Err(format!("{name} needs {size} bytes, but a buffer of this device can have {limit}"))
        }
        None => Ok(()),
    }
}

/// The error of the whole, as Frobenius norms; infinities, which are equal or count elsewhere, left out.
fn relative(got: &[f32], expected: &[f64]) -> f64 {
    let pairs = got.iter().zip(expected).filter(|(_, e)| e.is_finite());
    let (error, norm) = pairs.fold((0.0, 0.0), |(error, norm), (g, e)| {
        let difference = f64::from(*g) - e;
        (error + difference * difference, norm + e * e)
    });
    // Where nothing but zeros is expected, zeros have no error and all else an infinite one.
    if error == 0.0 { 0.0 } else { f64::sqrt(error / norm) }
}

/// How far results may be from what the file expects: `out`, `lse`.
///
/// Three things add error: f32 arithmetic; queries, keys, values and masks that are stored with fewer bits than the file has;
/// and 16-bit outputs, ours or those of whoever computed the expected ones. The largest counts, and values beyond 16
/// scale it up.
fn tolerances(case: &Case, problem: &Problem) -> [Tolerance; 2] {
    let (q, kv) = (problem.spec.q_dtype(), problem.spec.k_dtype());
    let tolerance = |atol, rtol| Tolerance { atol, rtol };
    let worse = |a: Tolerance, b: Tolerance| tolerance(a.atol.max(b.atol), a.rtol.max(b.rtol));
    let outputs = |dtype: Dtype| match dtype {
        Dtype::F32 => tolerance(1e-5, 2e-6),
        Dtype::F16 => tolerance(2e-3, 1e-3),
        // Outputs have no other type, here or in a file.
        _ => tolerance(1.6e-2, 8e-3),
    };
    // Rounded logits of a peaked softmax move whole weights, so these are larger.
    let inputs = |(from, to): (Dtype, Dtype)| match to {
        Dtype::F16 if from != to => tolerance(6e-3, 1e-3),
        Dtype::Bf16 if from != to => tolerance(8e-2, 8e-3),
        // Three times the largest errors of tests/accuracy.rs.
        Dtype::Fp8 => tolerance(1.2, 8e-3),
        Dtype::Q8 => tolerance(0.2, 8e-3),
        Dtype::Q4 => tolerance(4.0, 8e-3),
        _ => outputs(Dtype::F32),
    };
    let [q_file, k_file, v_file] = case.stored;
    let mask_file = case.stored_mask().unwrap_or(q);
    let stored = [(q_file, q), (k_file, q), (v_file, q), (k_file, kv), (v_file, kv), (mask_file, q)];
    let base = stored.map(inputs).into_iter().fold(outputs(Dtype::F32), worse);
    // An expected lse is f32, but whoever works in 16 bits has logits of 16 bits.
    let of = |expected: &Option<Expected>| match expected {
        Some(expected) => worse(outputs(expected.dtype), outputs(case.stored[0])),
        None => outputs(Dtype::F32),
    };
    let out = worse(worse(base, outputs(q)), of(&case.out));
    let scale = (case.largest_value() / 16.0).max(1.0);
    [Tolerance { atol: out.atol * scale, ..out }, worse(base, of(&case.lse))]
}
