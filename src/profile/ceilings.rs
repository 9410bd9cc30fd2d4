//! What an adapter can do at best: bytes read and multiply-adds per second, the best of several kernels each.

use super::Sampler;
use crate::verify::Gpu;

/// The two lines of a roofline.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Ceilings {
    /// Bytes per second of a streaming read.
    pub read_bytes_per_s: f64,
    /// Operations per second of fused multiply-adds, two each.
    pub fma_flops_per_s: f64,
}

/// Bytes that the read kernels stream: the size of a layer's cache at a few thousand tokens.
const READ_SIZES: [u64; 2] = [8 << 20, 32 << 20];
/// Samples of each kernel; the best counts, since nothing must honestly beat a ceiling.
const SAMPLES: usize = 5;
/// Multiply-adds of one step of `ceiling_fma.wgsl`: eight chains, sixteen of each.
const CHAINS: u64 = 8 * 16;

/// Measures both, in about a second on a GPU and a few on a CPU.
///
/// # Errors
/// When the device is lost.
pub fn measure_ceilings(gpu: &Gpu) -> Result<Ceilings, String> {
    let mut read: f64 = 0.0;
    let zeros = gpu.upload("gqa.ceiling", &vec![0; 32 << 20]);
    for (element, fold, bytes) in [
        ("f32", "x", 4),
        ("vec2<f32>", "x.x + x.y", 8),
        ("vec4<f32>", "x.x + x.y + x.z + x.w", 16),
        ("vec4<u32>", "f32(x.x | x.y | x.z | x.w)", 16),
    ] {
        for threads in [8, 32, 64, 256] {
            for size in READ_SIZES {
                let steps = 16;
                let workgroups = (size / bytes / (threads * steps)) as u32;
                if workgroups > gpu.caps.workgroups {
                    continue;
                }
                let constants = [("THREADS", threads), ("STEPS", steps)];
                let text =
                    prelude(element, fold, &constants) + include_str!("../../shaders/ceiling_read.wgsl");
                let seconds = best_time(gpu, &text, &zeros, workgroups)?;
                read = read.max(size as f64 / seconds);
            }
        }
    }
    let mut fma: f64 = 0.0;
    for (element, fold, lanes) in
        [("f32", "x", 1), ("vec2<f32>", "x.x + x.y", 2), ("vec4<f32>", "x.x + x.y + x.z + x.w", 4)]
    {
        for mad in ["x * y + z", "fma(x, y, z)"] {
            for threads in [8, 64, 256] {
                let (steps, workgroups) = (512, gpu.caps.fill() * if gpu.caps.software { 1 } else { 8 });
                let constants = [("THREADS", threads), ("STEPS", steps)];
                let mad_text = format!(
                    "fn mad(x: Element, y: Element, z: Element) -> Element {{\n    return {mad};\n}}\n"
                );
                let text = prelude(element, fold, &constants)
                    + &mad_text
                    + include_str!("../../shaders/ceiling_fma.wgsl");
                let seconds = best_time(gpu, &text, &zeros, workgroups)?;
                let flops = 2 * lanes * CHAINS * threads * steps * u64::from(workgroups);
                fma = fma.max(flops as f64 / seconds);
            }
        }
    }
    Ok(Ceilings { read_bytes_per_s: read, fma_flops_per_s: fma })
}

fn prelude(element: &str, fold: &str, constants: &[(&str, u64)]) -> String {
    let mut text =
        format!("alias Element = {element};\nfn fold(x: Element) -> f32 {{\n    return {fold};\n}}\n");
    for (name, value) in constants {
        text += &format!("const {name}: u32 = {value}u;\n");
    }
    text
}

/// Seconds of the fastest run of a ceiling kernel.
fn best_time(gpu: &Gpu, text: &str, source: &wgpu::Buffer, workgroups: u32) -> Result<f64, String> {
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
    let record = |encoder: &mut wgpu::CommandEncoder| {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(workgroups, 1, 1);
    };
    let mut sampler = Sampler::new(gpu, Box::new(record), 0.01)?;
    for _ in 0..SAMPLES {
        sampler.sample()?;
    }
    Ok(sampler.result().1)
}
