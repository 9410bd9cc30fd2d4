//! RADV's null device: compiles for GPUs that are not there, and tells what it made.

use std::ffi::CStr;

use ash::{ext, khr, vk};
use gqa::shader::{Access, Variant};
use gqa::{Caps, Class};

/// A result of Vulkan or a sentence.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What the driver says of one compiled kernel.
#[derive(Debug, Clone, Default)]
pub(crate) struct Compiled {
    /// Lanes of a wave.
    pub(crate) wave: u32,
    /// Statistics by the driver's own names.
    pub(crate) statistics: Vec<(String, u64)>,
    /// Texts by the driver's own names: `ACO IR`, `Assembly`.
    pub(crate) texts: Vec<(String, String)>,
}

impl Compiled {
    /// A statistic, by its name.
    pub(crate) fn statistic(&self, name: &str) -> Result<u64> {
        let found = self.statistics.iter().find(|(n, _)| n == name);
        Ok(found.ok_or_else(|| format!("this RADV has no statistic `{name}`"))?.1)
    }

    /// A text, by a part of its name; empty where there is none.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.texts.iter().find(|(n, _)| n.contains(name)).map_or("", |(_, text)| text)
    }
}

/// An instance and its null device. Both live as long as the process: it compiles and ends.
pub(crate) struct Radv {
    device: ash::Device,
    executables: khr::pipeline_executable_properties::Device,
    /// Its version, without what the distribution adds: `Mesa 25.0.7`.
    pub(crate) driver: String,
    /// What wgpu would report of it.
    pub(crate) caps: Caps,
}

impl Radv {
    /// Opens the device of the family that RADV_FORCE_FAMILY names.
    pub(crate) fn open() -> Result<Self> {
        // SAFETY: the loader is the system's Vulkan loader, whose initialisers are made to be run in any process.
        let entry = unsafe { ash::Entry::load() }?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
        let info = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: `info` and what it points to live through the call.
        let instance = unsafe { entry.create_instance(&info, None) }?;
        // SAFETY: the instance is alive.
        let physicals = unsafe { instance.enumerate_physical_devices() }?;
        let mut found = None;
        for physical in physicals {
            let mut driver = vk::PhysicalDeviceDriverProperties::default();
            let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver);
            // SAFETY: the handle is of this instance, and the chain holds structures of Vulkan 1.2 that outlive the call.
            unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
            if driver.driver_id == vk::DriverId::MESA_RADV {
                found = Some((physical, text(driver.driver_info_as_c_str()?)));
                break;
            }
        }
        let (physical, driver) = found.ok_or("no device of RADV is there")?;
        let driver = driver.split('-').next().unwrap_or_default().trim().to_owned();
        let caps = caps(&instance, physical)?;
        let device = create_device(&instance, physical, caps.cooperative_matrix)?;
        let executables = khr::pipeline_executable_properties::Device::new(&instance, &device);
        // The loader must outlive the device.
        std::mem::forget(entry);
        Ok(Self { device, executables, driver, caps })
    }

    /// Compiles SPIR-V with the bindings of `variant` and reads what the driver tells.
    pub(crate) fn compile(&self, variant: &Variant, words: &[u32]) -> Result<Compiled> {
        let device = &self.device;
        let bindings: Vec<_> = variant.bindings().into_iter().map(layout_binding).collect();
        let layout_info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        let module_info = vk::ShaderModuleCreateInfo::default().code(words);
        // SAFETY: the structures and what they point to live through the calls; the SPIR-V is naga's, from a validated module.
        let (set_layout, module) = unsafe {
            let set_layout = device.create_descriptor_set_layout(&layout_info, None)?;
            (set_layout, device.create_shader_module(&module_info, None)?)
        };
        let set_layouts = [set_layout];
        let pipeline_layout_info = vk::PipelineLayoutCreateInfo::default().set_layouts(&set_layouts);
        // SAFETY: the set layout was made above and is alive.
        let pipeline_layout = unsafe { device.create_pipeline_layout(&pipeline_layout_info, None) }?;
        // As wgpu: with the subgroup feature every stage allows the size to vary.
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .flags(vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE)
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        let capture = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR
            | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
        let info =
            vk::ComputePipelineCreateInfo::default().flags(capture).stage(stage).layout(pipeline_layout);
        // SAFETY: module and layout are alive, the layout has every binding of the module, and the features that the module needs
        // (16-bit floats and storage, memory model, subgroups) were asked for with the device.
        let pipelines = unsafe { device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None) };
        let compiled = match pipelines.map_err(|(_, error)| error) {
            Ok(pipelines) => {
                let compiled = self.read(pipelines[0]);
                // SAFETY: nothing was ever submitted, and the pipeline is not used again.
                unsafe { device.destroy_pipeline(pipelines[0], None) };
                compiled
            }
            Err(error) => Err(error.into()),
        };
        // SAFETY: made above, used by no pipeline any more.
        unsafe {
            device.destroy_pipeline_layout(pipeline_layout, None);
            device.destroy_shader_module(module, None);
            device.destroy_descriptor_set_layout(set_layout, None);
        }
        compiled
    }

    fn read(&self, pipeline: vk::Pipeline) -> Result<Compiled> {
        let info = vk::PipelineInfoKHR::default().pipeline(pipeline);
        let executable = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline);
        // SAFETY: the pipeline is alive and was made with both capture flags; a compute pipeline of RADV has executable 0.
        let (properties, statistics) = unsafe {
            (
                self.executables.get_pipeline_executable_properties(&info)?,
                self.executables.get_pipeline_executable_statistics(&executable)?,
            )
        };
        let wave = properties.first().ok_or("the pipeline has no executable")?.subgroup_size;
        let statistics =
            statistics.iter().map(|s| Ok((text(s.name_as_c_str()?), value(s)))).collect::<Result<_>>()?;
        Ok(Compiled { wave, statistics, texts: self.texts(&executable)? })
    }

    /// Internal representations: once for their sizes, once for their bytes.
    fn texts(&self, executable: &vk::PipelineExecutableInfoKHR<'_>) -> Result<Vec<(String, String)>> {
        // SAFETY: the pipeline is alive and was made with the capture flag; the pointers are null, so only sizes are written.
        let mut found =
            unsafe { self.executables.get_pipeline_executable_internal_representations(executable) }?;
        let mut bytes: Vec<Vec<u8>> = found.iter().map(|r| vec![0; r.data_size]).collect();
        for (representation, bytes) in found.iter_mut().zip(&mut bytes) {
            representation.p_data = bytes.as_mut_ptr().cast();
        }
        let mut count = found.len() as u32;
        // SAFETY: `found` has `count` structures, each with a pointer to as many writable bytes as it says; `bytes` outlives the call.
        let result = unsafe {
            (self.executables.fp().get_pipeline_executable_internal_representations_khr)(
                self.device.handle(),
                executable,
                &mut count,
                found.as_mut_ptr(),
            )
        };
        result.result()?;
        let pairs = found.iter().zip(bytes).map(|(r, bytes)| {
            let bytes = bytes.split(|b| *b == 0).next().unwrap_or_default();
            Ok((text(r.name_as_c_str()?), String::from_utf8_lossy(bytes).into_owned()))
        });
        pairs.collect()
    }
}

fn text(name: &CStr) -> String {
    name.to_string_lossy().into_owned()
}

fn value(statistic: &vk::PipelineExecutableStatisticKHR<'_>) -> u64 {
    match statistic.format {
        // SAFETY: the format says which member was written.
        vk::PipelineExecutableStatisticFormatKHR::FLOAT64 => unsafe { statistic.value.f64 as u64 },
        // SAFETY: booleans and integers lie in the zeroed union from its first byte on (this is little-endian code: amd64, arm64).
        _ => unsafe { statistic.value.u64 },
    }
}

fn layout_binding((binding, access): (u32, Access)) -> vk::DescriptorSetLayoutBinding<'static> {
    let kind = match access {
        Access::Uniform => vk::DescriptorType::UNIFORM_BUFFER,
        Access::Read | Access::Write => vk::DescriptorType::STORAGE_BUFFER,
    };
    vk::DescriptorSetLayoutBinding::default()
        .binding(binding)
        .descriptor_type(kind)
        .descriptor_count(1)
        .stage_flags(vk::ShaderStageFlags::COMPUTE)
}

/// What `Caps::of` would find through wgpu.
fn caps(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Result<Caps> {
    let mut sizes = vk::PhysicalDeviceSubgroupSizeControlProperties::default();
    let mut maintenance = vk::PhysicalDeviceMaintenance4Properties::default();
    let mut properties =
        vk::PhysicalDeviceProperties2::default().push_next(&mut sizes).push_next(&mut maintenance);
    // SAFETY: the handle is of this instance, and the chain holds structures of Vulkan 1.3 that outlive the call.
    unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
    let properties = properties.properties;
    let limits = &properties.limits;
    Ok(Caps {
        workgroup_memory: limits.max_compute_shared_memory_size,
        invocations: limits.max_compute_work_group_invocations.min(limits.max_compute_work_group_size[0]),
        workgroups: limits.max_compute_work_group_count[0],
        binding_size: u64::from(limits.max_storage_buffer_range).min(i32::MAX as u64),
        buffer_size: maintenance.max_buffer_size.min(i32::MAX as u64),
        offset_alignment: limits.min_storage_buffer_offset_alignment as u32,
        subgroup: Some((sizes.min_subgroup_size, sizes.max_subgroup_size)),
        f16: true,
        unpack_f16: true,
        int64: false,
        cooperative_matrix: has_matrices(instance, physical)?,
        loop_iterations: None,
        vector_registers: 16,
        class: Class::Discrete,
    })
}

/// Whether it has matrix units.
fn has_matrices(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Result<bool> {
    // SAFETY: the handle is of this instance.
    let extensions = unsafe { instance.enumerate_device_extension_properties(physical) }?;
    let is_it =
        |e: &vk::ExtensionProperties| e.extension_name_as_c_str() == Ok(khr::cooperative_matrix::NAME);
    Ok(extensions.iter().any(is_it))
}

/// A device with what wgpu asks for on behalf of the kernels, and with the extension that tells of pipelines.
fn create_device(
    instance: &ash::Instance,
    physical: vk::PhysicalDevice,
    has_matrices: bool,
) -> Result<ash::Device> {
    let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
    let mut extensions =
        vec![khr::pipeline_executable_properties::NAME.as_ptr(), ext::robustness2::NAME.as_ptr()];
    let mut matrices =
        vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default().cooperative_matrix(has_matrices);
    if has_matrices {
        extensions.push(khr::cooperative_matrix::NAME.as_ptr());
    }
    let mut executable =
        vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
    // wgpu asks for robustness whatever a shader is trusted with, and the compiler joins fewer loads under it.
    let core = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true).shader_int16(true);
    let mut robust = vk::PhysicalDeviceRobustness2FeaturesEXT::default()
        .robust_buffer_access2(true)
        .robust_image_access2(true);
    let mut v11 = vk::PhysicalDeviceVulkan11Features::default()
        .storage_buffer16_bit_access(true)
        .uniform_and_storage_buffer16_bit_access(true);
    let mut v12 = vk::PhysicalDeviceVulkan12Features::default()
        .shader_float16(true)
        .shader_int8(true)
        .vulkan_memory_model(true)
        .shader_subgroup_extended_types(true);
    let mut v13 = vk::PhysicalDeviceVulkan13Features::default()
        .subgroup_size_control(true)
        .compute_full_subgroups(true)
        .shader_integer_dot_product(true)
        .maintenance4(true);
    let mut info = vk::DeviceCreateInfo::default()
        .queue_create_infos(&queues)
        .enabled_extension_names(&extensions)
        .enabled_features(&core)
        .push_next(&mut executable)
        .push_next(&mut robust)
        .push_next(&mut v11)
        .push_next(&mut v12)
        .push_next(&mut v13);
    if has_matrices {
        info = info.push_next(&mut matrices);
    }
    // SAFETY: the handle is of this instance; `info` and its chain live through the call. A feature that is missing is an error.
    Ok(unsafe { instance.create_device(physical, &info, None) }?)
}
