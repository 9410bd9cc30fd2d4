//! One device for Burn and the library.

use burn::tensor::Device;
use burn::tensor::wgpu::{WgpuInitError, WgpuSetup};
use gqa::wgpu;

use crate::error::Error;

/// Opens `adapter` with all that Burn and the library make use of, and gives it to Burn: once per program, since Burn keeps it.
///
/// Programs that let Burn choose an adapter take `Device::wgpu_options().init_with_setup()` instead, and so must those that use Burn's own
/// shader compilers (its features `vulkan` and `metal`), which want more of a device.
///
/// # Errors
/// [`Error::Device`] when the adapter refuses, or Burn does.
pub fn open(instance: &wgpu::Instance, adapter: &wgpu::Adapter) -> Result<(Device, WgpuSetup), Error> {
    // Burn goes by the adapter's features, not by the device's.
    let features = adapter.features() - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS;
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("gqa.burn"),
        required_features: features - wgpu::Features::all_experimental_mask(),
        required_limits: adapter.limits(),
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
        .map_err(|error| Error::Device(error.to_string()))?;
    let setup = WgpuSetup {
        instance: instance.clone(),
        adapter: adapter.clone(),
        device,
        queue,
        backend: adapter.get_info().backend,
    };
    let device = Device::wgpu_options().setup(setup.clone()).init();
    Ok((device.map_err(|error: WgpuInitError| Error::Device(error.to_string()))?, setup))
}

/// The adapter that `name`, or else the environment's `WGPU_ADAPTER_NAME`, is a part of the name of; without either the best there is.
///
/// # Errors
/// [`Error::Device`] when there is none, with the names of those that are.
pub fn choose(instance: &wgpu::Instance, name: Option<&str>) -> Result<wgpu::Adapter, Error> {
    let name = name.map(str::to_owned).or_else(|| std::env::var("WGPU_ADAPTER_NAME").ok());
    let name = name.unwrap_or_default().to_lowercase();
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let names = adapters.iter().map(|adapter| adapter.get_info().name).collect::<Vec<_>>().join(", ");
    adapters.retain(|adapter| adapter.get_info().name.to_lowercase().contains(&name));
    // Stable: of equals the first, in the order of wgpu's backends.
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        // Of software Mesa's: SwiftShader takes minutes for Burn's kernels.
        _ => 3 + u8::from(!adapter.get_info().name.contains("llvmpipe")),
    });
    let none = || match names.is_empty() {
        true => Error::Device("there is no adapter: install a driver".to_owned()),
        false => Error::Device(format!("no adapter is called '{name}': there are {names}")),
    };
    adapters.into_iter().next().ok_or_else(none)
}
