//! Measures an adapter's ceilings and the kernels' times: what `gqa bench` shows.
//!
//! Times are the host's: as many repetitions go into one submission as make it long against the cost of submitting, and the
//! whole is divided. GPU timestamps exist on few adapters, and step by 65 us on some.

mod ceilings;
mod serve;
mod workload;

use std::time::Instant;

use crate::verify::Gpu;

pub use ceilings::{CeilingSamplers, Ceilings};
pub use serve::{Manner, Serve, ServeReport, ServeShape, serve};
pub use workload::{Row, Shape, Workload};

/// What to repeat: records itself into an encoder.
pub type Recorder<'a> = dyn Fn(&mut wgpu::CommandEncoder) + 'a;

/// A workload with the repetitions that make one sample.
pub struct Sampler<'a> {
    gpu: &'a Gpu,
    record: Box<Recorder<'a>>,
    repetitions: u32,
    samples: Vec<f64>,
}

impl<'a> Sampler<'a> {
    /// Runs `record` once, which compiles what is compiled lazily, then picks the repetitions that make a sample of at
    /// least `seconds`.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn new(gpu: &'a Gpu, record: Box<Recorder<'a>>, seconds: f64) -> Result<Self, String> {
        let mut sampler = Self { gpu, record, repetitions: 1, samples: Vec::new() };
        sampler.time()?;
        // Doubling, since one repetition alone is mostly the cost of submitting.
        while sampler.time()? * f64::from(sampler.repetitions) < seconds && sampler.repetitions < 1 << 14 {
            sampler.repetitions *= 2;
        }
        Ok(sampler)
    }

    /// Takes one more sample.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn sample(&mut self) -> Result<(), String> {
        let seconds = self.time()?;
        self.samples.push(seconds);
        Ok(())
    }

    /// Seconds of one repetition: median and minimum of the samples.
    pub fn result(&self) -> (f64, f64) {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        (median, sorted.first().copied().unwrap_or(f64::NAN))
    }

    fn time(&self) -> Result<f64, String> {
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        for _ in 0..self.repetitions {
            (self.record)(&mut encoder);
        }
        let start = Instant::now();
        self.gpu.finish(encoder)?;
        Ok(start.elapsed().as_secs_f64() / f64::from(self.repetitions))
    }
}
