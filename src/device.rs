//! The caller's device as [`Caps`], and what to ask of an adapter to get the most out of it.

use crate::caps::Caps;

/// Optional features that kernels use where a device has them.
pub const WANTED_FEATURES: wgpu::Features = wgpu::Features::SHADER_F16.union(wgpu::Features::SUBGROUP);

impl Caps {
    /// What `device` can do: its limits and features as granted, not what its adapter might have.
    pub fn of(device: &wgpu::Device) -> Self {
        let (limits, features, info) = (device.limits(), device.features(), device.adapter_info());
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
            // Only lavapipe lacks the conversion, and it has it with the feature; wgpu hides which adapter this is.
            unpack_f16: f16 || info.backend != wgpu::Backend::Vulkan,
            software: info.device_type == wgpu::DeviceType::Cpu,
        }
    }
}

/// A device request for `adapter`: its own limits, and those of [`WANTED_FEATURES`] that it has.
///
/// An application with a request of its own adds these features and raises
/// `max_storage_buffer_binding_size`, `max_buffer_size` and `max_compute_workgroup_storage_size`.
pub fn device_descriptor(adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
    wgpu::DeviceDescriptor {
        label: Some("gqa"),
        required_features: adapter.features() & WANTED_FEATURES,
        required_limits: adapter.limits(),
        ..Default::default()
    }
}
