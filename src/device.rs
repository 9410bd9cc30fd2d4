//! The caller's device as [`Caps`], and what to ask of an adapter to get the most out of it.

use std::future::Future as _;
use std::task::{Context, Poll, Waker};

use crate::caps::{Caps, Class};
use crate::error::Error;

/// Optional features that kernels use where a device has them.
pub const WANTED_FEATURES: wgpu::Features =
    wgpu::Features::SHADER_F16.union(wgpu::Features::SUBGROUP).union(wgpu::Features::SHADER_INT64);

impl Caps {
    /// What `device` can do: its limits and features as granted, not what its adapter might have.
    pub fn of(device: &wgpu::Device) -> Self {
        let (limits, features, info) = (device.limits(), device.features(), device.adapter_info());
        let class = class(&info);
        let f16 = features.contains(wgpu::Features::SHADER_F16);
        let subgroup = features
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size));
        Self {
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            invocations: limits
                .max_compute_invocations_per_workgroup
                .min(limits.max_compute_workgroup_size_x),
            workgroups: limits.max_compute_workgroups_per_dimension,
            binding_size: limits.max_storage_buffer_binding_size,
            buffer_size: limits.max_buffer_size,
            offset_alignment: limits.min_storage_buffer_offset_alignment,
            subgroup,
            f16,
            // lavapipe lacks the conversion without the feature; it is not worth telling apart from others that compute on the processor.
            unpack_f16: f16 || !(info.backend == wgpu::Backend::Vulkan && class == Class::Software),
            int64: features.contains(wgpu::Features::SHADER_INT64),
            cooperative_matrix: features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            loop_iterations: loop_iterations(&info),
            vector_registers: if class == Class::Software { vector_registers() } else { 16 },
            class,
        }
    }
}

/// Apple's number among the vendors of PCI devices.
const APPLE: u32 = 0x106b;

fn class(info: &wgpu::AdapterInfo) -> Class {
    match info.device_type {
        wgpu::DeviceType::Cpu => Class::Software,
        _ if info.vendor == APPLE || info.name.starts_with("Apple ") => Class::Apple,
        wgpu::DeviceType::IntegratedGpu => Class::Integrated,
        _ => Class::Discrete,
    }
}

/// Of Mesa's software drivers, where the version is not known to let loops end by themselves: 22.3 does not, 25.0 does. The number is
/// LP_MAX_TGSI_LOOP_ITERATIONS in Mesa's src/gallium/auxiliary/gallivm/lp_bld_limits.h, "shared between every loop".
fn loop_iterations(info: &wgpu::AdapterInfo) -> Option<u32> {
    let version =
        info.driver_info.split("Mesa ").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
    (info.name.starts_with("llvmpipe") && version.is_none_or(|major: u32| major < 25)).then_some(65_535)
}

/// Vector registers of this processor, which is the one that a software adapter compiles for: wgpu does not tell.
fn vector_registers() -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512vl") {
        return 32;
    }
    if cfg!(target_arch = "aarch64") { 32 } else { 16 }
}

/// A device request for `adapter`: its own limits, and those of [`WANTED_FEATURES`] that it has.
///
/// An application with a request of its own adds these features, keeps at least [`wgpu::Limits::default`], and raises
/// `max_storage_buffer_binding_size`, `max_buffer_size` and `max_compute_workgroup_storage_size` as the adapter allows. What is experimental
/// is not requested: matrix units ([`Options::matrix_units`](crate::Options::matrix_units)) need a request of the application's own, and so
/// does [`wgpu::Features::PIPELINE_CACHE`].
pub fn device_descriptor(adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
    wgpu::DeviceDescriptor {
        label: Some("gqa"),
        required_features: adapter.features() & WANTED_FEATURES,
        required_limits: adapter.limits(),
        ..Default::default()
    }
}

/// A buffer, or the typed error that there is no memory for it.
pub(crate) fn create_buffer(
    device: &wgpu::Device,
    label: &str,
    size: u64,
    usage: wgpu::BufferUsages,
) -> Result<wgpu::Buffer, Error> {
    check_size(device, label, size)?;
    let scopes = [wgpu::ErrorFilter::OutOfMemory].map(|f| device.push_error_scope(f));
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage,
        mapped_at_creation: false,
    });
    match said(scopes) {
        None => Ok(buffer),
        Some(_) => Err(Error::OutOfMemory { what: label.to_owned(), needed: size }),
    }
}

/// That the device has buffers as large: wgpu answers one that is too large with an error that nobody catches.
fn check_size(device: &wgpu::Device, label: &str, needed: u64) -> Result<(), Error> {
    let found = device.limits().max_buffer_size;
    if needed <= found {
        return Ok(());
    }
    let hint = "request a higher limit from the adapter, split the batch, or make pages smaller";
    Err(Error::Limit { what: label.to_owned(), limit: "max_buffer_size", needed, found, hint })
}

/// A buffer that holds `bytes`, whole words of them, from the start: no queue is needed.
pub(crate) fn create_filled(
    device: &wgpu::Device,
    label: &str,
    usage: wgpu::BufferUsages,
    bytes: &[u8],
) -> Result<wgpu::Buffer, Error> {
    let size = bytes.len() as u64;
    check_size(device, label, size)?;
    let memory = || Error::OutOfMemory { what: label.to_owned(), needed: size };
    let scopes = [wgpu::ErrorFilter::OutOfMemory].map(|f| device.push_error_scope(f));
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage,
        mapped_at_creation: true,
    });
    if said(scopes).is_some() {
        return Err(memory());
    }
    buffer.get_mapped_range_mut(..).map_err(|_| memory())?.copy_from_slice(bytes);
    buffer.unmap();
    Ok(buffer)
}

/// What the device said against what was done under `scopes`, if it has said so already. Natively it has; a browser answers
/// later, and then its error goes to the caller's handler: the library never waits.
pub(crate) fn said<const N: usize>(scopes: [wgpu::ErrorScopeGuard; N]) -> Option<wgpu::Error> {
    let mut first = None;
    // The last one pushed is the first to go.
    for scope in scopes.into_iter().rev() {
        let mut future = std::pin::pin!(scope.pop());
        if let Poll::Ready(Some(error)) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            first = Some(error);
        }
    }
    first
}
