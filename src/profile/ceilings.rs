//! What an adapter can do at best: bytes read and multiply-adds per second, the best of several kernels each.

use super::Sampler;
use crate::caps::Class;
use crate::verify::Gpu;

/// The two lines of a roofline, and the kernels that reached them.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Ceilings {
    /// Bytes per second of a streaming read.
    pub read_bytes_per_s: f64,
    /// Operations per second of fused multiply-adds, two each.
    pub fma_flops_per_s: f64,
    /// The kernel that read fastest: elements, threads of a workgroup, how they walk, bytes.
    pub read_kernel: String,
    /// The kernel that computed fastest: elements, how it writes a multiply-add, threads of a workgroup.
    pub fma_kernel: String,
}

/// Bytes that the read kernels stream: what a layer's cache takes at a few thousand tokens, and on GPUs more than their own
/// caches hold.
const SOFTWARE_SIZES: [u64; 2] = [8 << 20, 32 << 20];
const GPU_SIZES: [u64; 2] = [32 << 20, 128 << 20];
/// How an invocation walks: its elements, and whether they are a run of its own. Short walks suit GPUs; a software adapter reads half as
/// much again in long ones.
const SHORT_WALK: (u64, bool) = (16, false);
const LONG_WALKS: [(u64, bool); 3] = [(256, false), (1024, false), (1024, true)];
/// Multiply-adds of one step of `ceiling_fma.wgsl`: eight chains, sixteen of each.
const CHAIN_FMAS: u64 = 8 * 16;
/// Steps of a multiply-add kernel: enough to forget the loop and the start of a workgroup.
const FMA_STEPS: u64 = 512;
/// Kernels of either kind that stay in the race after one sample each.
const FINALISTS: usize = 4;

/// The fastest ceiling kernels of an adapter, to be sampled in turn with what is measured against them: an adapter's clock
/// drifts, and a ceiling of another minute is no ceiling.
pub struct CeilingSamplers<'a> {
    read: Vec<Candidate<'a>>,
    fma: Vec<Candidate<'a>>,
}

struct Candidate<'a> {
    name: String,
    /// Bytes or operations of one repetition.
    work: f64,
    sampler: Sampler<'a>,
    /// The highest rate that was the median of a race or group.
    best: f64,
}

impl Candidate<'_> {
    /// Ends a race or group: its median counts.
    fn close(&mut self) -> f64 {
        let rate = self.work / self.sampler.take().median_s;
        self.best = self.best.max(rate);
        rate
    }
}

impl<'a> CeilingSamplers<'a> {
    /// Tries every ceiling kernel, 30 that read (36 with 64-bit integers) and 18 that compute, as far as workgroups may be as large, and keeps
    /// the fastest.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn new(gpu: &'a Gpu) -> Result<Self, String> {
        let sizes = if gpu.caps.class == Class::Software { SOFTWARE_SIZES } else { GPU_SIZES };
        let zeros = gpu.upload("gqa.ceiling", &vec![0; sizes[1] as usize]);
        let [short, long] = sizes;
        let mut kernels = Vec::new();
        let fits = |threads: u64| threads <= u64::from(gpu.caps.invocations);
        for kernel in read_kernels(gpu.caps.int64).into_iter().filter(|kernel| fits(kernel.threads)) {
            if let Some(candidate) = kernel.candidate(gpu, &zeros, long)? {
                kernels.push((kernel, candidate));
            }
        }
        kernels.sort_by(|a, b| b.1.best.total_cmp(&a.1.best));
        kernels.truncate(FINALISTS);
        let mut read = Vec::new();
        for (kernel, candidate) in kernels {
            read.push(candidate);
            read.extend(kernel.candidate(gpu, &zeros, short)?);
        }
        let workgroups = if gpu.caps.class == Class::Software { 64 } else { 4096 };
        let mut fma = Vec::new();
        for (element, lanes) in [("f32", 1), ("vec2<f32>", 2), ("vec4<f32>", 4)] {
            for (mad, threads) in ["x * y + z", "fma(x, y, z)"]
                .into_iter()
                .flat_map(|m| [8, 64, 256].map(|t| (m, t)))
                .filter(|(_, threads)| fits(*threads))
            {
                let constants = [("THREADS", threads), ("STEPS", FMA_STEPS)];
                let text = prelude(element, &constants)
                    + &format!(
                        "fn mad(x: Element, y: Element, z: Element) -> Element {{\n    return {mad};\n}}\n"
                    )
                    + include_str!("../../shaders/ceiling_fma.wgsl");
                let flops = 2 * lanes * CHAIN_FMAS * threads * FMA_STEPS * u64::from(workgroups);
                let name = format!("{element}, {mad}, {threads} threads");
                fma.push(candidate(gpu, (name, &text), &zeros, (workgroups, flops))?);
            }
        }
        for candidates in [&mut read, &mut fma] {
            candidates.sort_by(|a, b| b.best.total_cmp(&a.best));
            candidates.truncate(FINALISTS);
            // One sample is good for choosing only.
            candidates.iter_mut().for_each(|candidate| candidate.best = 0.0);
        }
        Ok(Self { read, fma })
    }

    /// Takes one more sample of each.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn sample(&mut self) -> Result<(), String> {
        self.read.iter_mut().chain(&mut self.fma).try_for_each(|candidate| candidate.sampler.sample())
    }

    /// Ends a group of measurements and gives its own best medians, of reads and of multiply-adds.
    pub fn close_group(&mut self) -> [f64; 2] {
        [&mut self.read, &mut self.fma]
            .map(|candidates| candidates.iter_mut().map(Candidate::close).fold(0.0, f64::max))
    }

    /// The best median of either kind over all groups that were closed.
    pub fn result(&self) -> Ceilings {
        let best = |candidates: &[Candidate<'_>]| {
            let best = candidates.iter().max_by(|a, b| a.best.total_cmp(&b.best));
            best.map_or((f64::NAN, String::new()), |c| (c.best, c.name.clone()))
        };
        let [(read_bytes_per_s, read_kernel), (fma_flops_per_s, fma_kernel)] =
            [best(&self.read), best(&self.fma)];
        Ceilings { read_bytes_per_s, fma_flops_per_s, read_kernel, fma_kernel }
    }
}

/// A kernel that reads, over a buffer of any size.
#[derive(Debug, Clone, Copy)]
struct ReadKernel {
    element: &'static str,
    /// Of an element.
    bytes: u64,
    threads: u64,
    /// Elements of an invocation, and whether they are a run of its own.
    walk: (u64, bool),
}

/// All kernels that read, with 64-bit numbers or without.
fn read_kernels(int64: bool) -> Vec<ReadKernel> {
    let mut kernels = Vec::new();
    let elements = [("f32", 4), ("vec2<f32>", 8), ("vec4<f32>", 16)];
    for (element, bytes) in elements {
        kernels.extend([8, 32, 64, 256].map(|threads| ReadKernel {
            element,
            bytes,
            threads,
            walk: SHORT_WALK,
        }));
    }
    for (element, bytes) in [elements[1], elements[2]] {
        for threads in [8, 32, 256] {
            kernels.extend(LONG_WALKS.map(|walk| ReadKernel { element, bytes, threads, walk }));
        }
    }
    // Fewer components to load, which software adapters count.
    for (element, bytes) in [("u64", 8), ("vec2<u64>", 16), ("vec4<u64>", 32)].into_iter().filter(|_| int64) {
        let side_by_side = LONG_WALKS.into_iter().filter(|(_, own_run)| !own_run);
        kernels.extend(side_by_side.map(|walk| ReadKernel { element, bytes, threads: 8, walk }));
    }
    kernels
}

impl ReadKernel {
    /// The kernel over `size` bytes, if the adapter has as many workgroups and there is one at least.
    fn candidate<'a>(
        self,
        gpu: &'a Gpu,
        source: &wgpu::Buffer,
        size: u64,
    ) -> Result<Option<Candidate<'a>>, String> {
        let Self { element, bytes, threads, walk: (steps, own_run) } = self;
        let workgroups = size / bytes / (threads * steps);
        if !(1..=u64::from(gpu.caps.workgroups)).contains(&workgroups) {
            return Ok(None);
        }
        let (lane, stride) = if own_run { (steps, 1) } else { (1, threads) };
        let constants = [("THREADS", threads), ("STEPS", steps), ("LANE", lane), ("STRIDE", stride)];
        let text = prelude(element, &constants) + include_str!("../../shaders/ceiling_read.wgsl");
        let walk = if own_run { "in a row" } else { "side by side" };
        let name = format!("{element}, {threads} threads, {steps} each {walk}, {} MiB", size >> 20);
        candidate(gpu, (name, &text), source, (workgroups as u32, size)).map(Some)
    }
}

fn prelude(element: &str, constants: &[(&str, u64)]) -> String {
    let fold = match element {
        "f32" => "x",
        "vec2<f32>" => "x.x + x.y",
        "u64" => "f32(x)",
        "vec2<u64>" => "f32(x.x + x.y)",
        "vec4<u64>" => "f32(x.x + x.y + x.z + x.w)",
        _ => "x.x + x.y + x.z + x.w",
    };
    let mut text =
        format!("alias Element = {element};\nfn fold(x: Element) -> f32 {{\n    return {fold};\n}}\n");
    // Eight of 16 bytes are two cache lines: as in the kernels, lanes 0 and 1 take the first of either.
    let place = match element {
        "vec2<u64>" => "select(select(thread - u32(thread < 5u), 4u, thread == 1u), 0u, thread == 0u)",
        _ => "thread",
    };
    text += &format!("fn place(thread: u32) -> u32 {{\n    return {place};\n}}\n");
    for (name, value) in constants {
        text += &format!("const {name}: u32 = {value}u;\n");
    }
    text
}

/// A ceiling kernel over `source`, compiled and sampled once.
fn candidate<'a>(
    gpu: &'a Gpu,
    (name, text): (String, &str),
    source: &wgpu::Buffer,
    (workgroups, work): (u32, u64),
) -> Result<Candidate<'a>, String> {
    let device = &gpu.device;
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some("gqa.ceiling"),
        source: wgpu::ShaderSource::Wgsl(text.into()),
    };
    // SAFETY: indices end at the buffer's size, from which `workgroups` was computed; loops are counted by constants.
    let module =
        unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("gqa.ceiling"),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    let sums = gpu.upload("gqa.ceiling", &vec![0; workgroups as usize * 4]);
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("gqa.ceiling"),
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[
            wgpu::BindGroupEntry { binding: 0, resource: source.as_entire_binding() },
            wgpu::BindGroupEntry { binding: 1, resource: sums.as_entire_binding() },
        ],
    });
    let record = move |encoder: &mut wgpu::CommandEncoder| {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(workgroups, 1, 1);
        Ok(())
    };
    let mut sampler = Sampler::new(gpu, Box::new(record), 0.02)?;
    sampler.sample()?;
    let mut candidate = Candidate { name, work: work as f64, sampler, best: 0.0 };
    candidate.close();
    Ok(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_read_kernel_reads_a_whole_buffer() {
        let kernels = read_kernels(true);
        assert_eq!((read_kernels(false).len(), kernels.len()), (30, 36));
        for ReadKernel { bytes, threads, walk: (steps, _), .. } in kernels {
            let of_workgroup = bytes * threads * steps;
            assert!(SOFTWARE_SIZES.iter().chain(&GPU_SIZES).all(|size| size % of_workgroup == 0));
            assert_eq!(steps % 4, 0);
        }
    }
}
