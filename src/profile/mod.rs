//! Measures an adapter's ceilings and the kernels' times: what `gqa bench` shows.
//!
//! Times are the host's: as many repetitions go into one submission as make it long against the cost of submitting, and the
//! whole is divided. GPU timestamps exist on few adapters, and step by 65 us on some.

mod ceilings;
mod serve;
mod timing;
mod workload;

use std::time::Instant;

use crate::verify::Gpu;

pub use ceilings::{CeilingSamplers, Ceilings};
pub use serve::{Manner, Serve, ServeError, ServeReport, ServeShape, serve};
pub use timing::Timing;
pub use workload::{Filled, Pass, Row, Shape, Workload};

/// Seconds beyond which one repetition is a sample.
const LONG_SECONDS: f64 = 1.5;

/// What to repeat: records itself into an encoder.
pub type Recorder<'a> = dyn Fn(&mut wgpu::CommandEncoder) -> Result<(), crate::Error> + 'a;

/// A workload with the repetitions that make one sample.
pub struct Sampler<'a> {
    gpu: &'a Gpu,
    record: Box<Recorder<'a>>,
    repetitions: u32,
    expected: f64,
    samples: Vec<f64>,
}

impl<'a> Sampler<'a> {
    /// Runs `record` once, which compiles what is compiled lazily, then picks the repetitions that make a sample of at
    /// least `seconds`. What is far above that anyway is run only once more.
    ///
    /// # Errors
    /// What `record` is refused, or when the device is lost.
    pub fn new(gpu: &'a Gpu, record: Box<Recorder<'a>>, seconds: f64) -> Result<Self, String> {
        let mut sampler = Self { gpu, record, repetitions: 1, expected: 0.0, samples: Vec::new() };
        sampler.expected = sampler.time()?;
        if sampler.expected > LONG_SECONDS {
            // Some drivers compile with the first run, for seconds.
            sampler.expected = sampler.time()?;
        }
        if sampler.expected > LONG_SECONDS {
            return Ok(sampler);
        }
        loop {
            sampler.expected = sampler.time()? * f64::from(sampler.repetitions);
            if sampler.expected >= seconds || sampler.repetitions >= 1 << 14 {
                return Ok(sampler);
            }
            // Doubling, since one repetition alone is mostly the cost of submitting.
            sampler.repetitions *= 2;
        }
    }

    /// Takes one more sample.
    ///
    /// # Errors
    /// What `record` is refused, or when the device is lost.
    pub fn sample(&mut self) -> Result<(), String> {
        let seconds = self.time()?;
        self.samples.push(seconds);
        Ok(())
    }

    /// Seconds that a sample takes, about.
    pub fn expected_s(&self) -> f64 {
        self.expected
    }

    /// Seconds that a repetition takes, about.
    pub fn repetition_s(&self) -> f64 {
        self.expected / f64::from(self.repetitions)
    }

    /// Seconds of one repetition, from the samples so far; then there are none.
    pub fn take(&mut self) -> Timing {
        Timing::of(std::mem::take(&mut self.samples))
    }

    fn time(&self) -> Result<f64, String> {
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        for _ in 0..self.repetitions {
            (self.record)(&mut encoder).map_err(|e| e.to_string())?;
        }
        let start = Instant::now();
        self.gpu.finish(encoder)?;
        Ok(start.elapsed().as_secs_f64() / f64::from(self.repetitions))
    }
}
