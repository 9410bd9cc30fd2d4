//! Adapters of this machine, and devices made from them.

use crate::caps::Caps;
use crate::device::device_descriptor;

/// Every adapter of every backend that can run the kernels, in wgpu's order; index and name are what `--adapter` takes.
pub fn adapters() -> Vec<wgpu::Adapter> {
    enumerate().into_iter().filter(|adapter| lack(adapter).is_none()).collect()
}

/// Adapters that cannot: each with what it lacks.
pub fn lacking() -> Vec<String> {
    let of = |adapter: &wgpu::Adapter| Some(format!("{}: {}", describe(&adapter.get_info()), lack(adapter)?));
    enumerate().iter().filter_map(of).collect()
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle_from_env()
    });
    pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()))
}

/// The limit that is below what every kernel takes.
fn lack(adapter: &wgpu::Adapter) -> Option<String> {
    let limits = adapter.limits();
    let needed = [
        ("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage, 8),
        ("max_compute_invocations_per_workgroup", limits.max_compute_invocations_per_workgroup, 128),
    ];
    let short = needed.into_iter().find(|(_, found, needed)| found < needed);
    short.map(|(limit, found, needed)| format!("{limit} is {found}, and {needed} are needed"))
}

/// Which adapters a command is about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum AdapterChoice {
    /// `WGPU_ADAPTER_NAME` if set, else the most capable: discrete, integrated, virtual, software.
    #[default]
    Best,
    /// By index in [`adapters`]; where there is no such index, the first whose name has this number of three digits or more.
    Index(usize),
    /// The first whose name, driver or backend contains this, whatever the case.
    Name(String),
    /// Every one.
    All,
}

impl std::fmt::Display for AdapterChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Best => match std::env::var("WGPU_ADAPTER_NAME") {
                Ok(name) => write!(f, "{name:?} (of $WGPU_ADAPTER_NAME)"),
                Err(_) => f.write_str("the best"),
            },
            Self::Index(index) => write!(f, "index {index}"),
            Self::Name(name) => write!(f, "{name:?}"),
            Self::All => f.write_str("all"),
        }
    }
}

impl std::str::FromStr for AdapterChoice {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match (s, s.parse()) {
            ("all", _) => Self::All,
            (_, Ok(index)) => Self::Index(index),
            (name, _) => Self::Name(name.to_owned()),
        })
    }
}

impl AdapterChoice {
    /// Indices of the chosen ones among `all`; empty where nothing matches.
    pub fn pick(&self, all: &[wgpu::Adapter]) -> Vec<usize> {
        let named = |name: &str| {
            let name = name.to_lowercase();
            let found = all.iter().position(|a| describe(&a.get_info()).to_lowercase().contains(&name));
            found.into_iter().collect()
        };
        match self {
            Self::All => (0..all.len()).collect(),
            Self::Index(index) if *index < all.len() => vec![*index],
            // Models have numbers in their names; a short one is more likely a wrong index.
            Self::Index(number) => {
                let number = number.to_string();
                let has = |name: &str| name.split(|c: char| !c.is_ascii_digit()).any(|part| part == number);
                let found = all.iter().position(|a| number.len() >= 3 && has(&a.get_info().name));
                found.into_iter().collect()
            }
            Self::Name(name) => named(name),
            Self::Best => match std::env::var("WGPU_ADAPTER_NAME") {
                Ok(name) => named(&name),
                Err(_) => (0..all.len()).min_by_key(|i| rank(&all[*i].get_info())).into_iter().collect(),
            },
        }
    }
}

/// Lower is better.
fn rank(info: &wgpu::AdapterInfo) -> u32 {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    // Among equals the modern interface, and of software adapters the wider vectors.
    2 * (2 * kind + u32::from(info.backend == wgpu::Backend::Gl))
        + u32::from(info.name.contains("SwiftShader"))
}

fn describe(info: &wgpu::AdapterInfo) -> String {
    format!("{} {} {} {}", info.name, info.driver, info.driver_info, info.backend)
}

/// A device that this process opened.
#[derive(Debug, Clone)]
pub struct Gpu {
    /// The device.
    pub device: wgpu::Device,
    /// Its queue.
    pub queue: wgpu::Queue,
    /// What it is.
    pub info: wgpu::AdapterInfo,
    /// What it can do.
    pub caps: Caps,
}

impl Gpu {
    /// Opens `adapter` with all it has.
    ///
    /// # Errors
    /// What the adapter says against it.
    pub fn open(adapter: &wgpu::Adapter) -> Result<Self, wgpu::RequestDeviceError> {
        Self::open_with(adapter, &device_descriptor(adapter))
    }

    /// Opens `adapter` with WebGPU's default limits and no optional feature.
    ///
    /// # Errors
    /// What the adapter says against it.
    pub fn open_minimal(adapter: &wgpu::Adapter) -> Result<Self, wgpu::RequestDeviceError> {
        // GL falls short of the defaults in what only graphics needs.
        let required_limits = wgpu::Limits::default().or_worse_values_from(&adapter.limits());
        Self::open_with(adapter, &wgpu::DeviceDescriptor { required_limits, ..Default::default() })
    }

    /// Opens `adapter` as `descriptor` asks.
    ///
    /// # Errors
    /// What the adapter says against it.
    pub fn open_with(
        adapter: &wgpu::Adapter,
        descriptor: &wgpu::DeviceDescriptor<'_>,
    ) -> Result<Self, wgpu::RequestDeviceError> {
        let (device, queue) = pollster::block_on(adapter.request_device(descriptor))?;
        let caps = Caps::of(&device);
        Ok(Self { device, queue, info: adapter.get_info(), caps })
    }

    /// A short name: adapter and backend.
    pub fn name(&self) -> String {
        format!("{} ({})", self.info.name, self.info.backend)
    }

    /// A storage buffer holding `bytes`, which are padded to whole words.
    pub fn upload(&self, label: &str, bytes: &[u8]) -> wgpu::Buffer {
        let size = (bytes.len() as u64).next_multiple_of(4).max(4);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut padded = bytes.to_vec();
        padded.resize(size as usize, 0);
        self.queue.write_buffer(&buffer, 0, &padded);
        buffer
    }

    /// Submits `encoder` and waits until the device is done.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn finish(&self, encoder: wgpu::CommandEncoder) -> Result<(), String> {
        self.queue.submit([encoder.finish()]);
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map(drop)
            .map_err(|e| format!("the device is lost: {e}"))
    }

    /// Waits for the contents of `buffer`.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn download(&self, buffer: &wgpu::Buffer) -> Result<Vec<u8>, String> {
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("gqa.download"),
            size: buffer.size(),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
        self.queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        let lost = |e: &dyn std::fmt::Display| format!("the device is lost: {e}");
        self.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| lost(&e))?;
        let bytes = staging.get_mapped_range(..).map_err(|e| lost(&e))?.to_vec();
        Ok(bytes)
    }
}
