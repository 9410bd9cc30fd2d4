//! One device for all tests of a process: Burn keeps it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::sync::LazyLock;

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use gqa_burn::WgpuSetup;
use gqa_burn::gqa::wgpu;

static OPEN: LazyLock<(Device, WgpuSetup)> = LazyLock::new(|| {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter =
        gqa_burn::choose(&instance, None).expect("no adapter: `cargo xtask setup` unpacks a software driver");
    gqa_burn::open(&instance, &adapter).unwrap()
});

pub(crate) fn open() -> (Device, WgpuSetup) {
    OPEN.clone()
}

pub(crate) fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), device)
}

pub(crate) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

pub(crate) fn tensor<const D: usize>(numbers: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(numbers, shape), device)
}

#[track_caller]
pub(crate) fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    let far = |(a, b): (&f32, &f32)| (a - b).abs() > tolerance || a.is_nan() != b.is_nan();
    if let Some(at) = got.iter().zip(expected).position(far) {
        panic!("at {at}: got {}, expected {}", got[at], expected[at]);
    }
}
