//! What an adapter can do, as far as kernels care. Pure data: plans are made and tested without a GPU.

/// What kind of device an adapter is: each has rows of its own in the [tile table](crate::plan::TABLE).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// A GPU with memory of its own, or one of which nothing is known (browsers do not tell).
    Discrete,
    /// A GPU that shares the processor's memory.
    Integrated,
    /// A GPU of Apple's.
    Apple,
    /// A CPU: loads cost per lane, branches and registers are cheap, barriers are not.
    Software,
}

impl Class {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Apple => "apple",
            Self::Software => "software",
        }
    }
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Limits and features that a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caps {
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations of one workgroup.
    pub invocations: u32,
    /// Workgroups along one dimension of a dispatch.
    pub workgroups: u32,
    /// Bytes that one storage binding may span.
    pub binding_size: u64,
    /// Bytes of one buffer.
    pub buffer_size: u64,
    /// What the offset of a storage binding must be a multiple of, in bytes.
    pub offset_alignment: u32,
    /// Smallest and largest subgroup, where shaders may use subgroup operations.
    pub subgroup: Option<(u32, u32)>,
    /// Whether shaders may read and write 16-bit floats.
    pub f16: bool,
    /// Whether `unpack2x16float` exists (lavapipe ties it to the f16 feature).
    pub unpack_f16: bool,
    /// Whether shaders may use 64-bit integers.
    pub int64: bool,
    /// Whether shaders may use matrix units. Which sizes they have is nothing that a device tells: see [`Options::matrix_units`](crate::Options::matrix_units).
    pub cooperative_matrix: bool,
    /// Iterations of all its loops together after which those of an invocation end, done or not, where a driver counts them: lavapipe
    /// and llvmpipe of Mesa 22.3 do, at 65,535, and report nothing; those before 25 are treated alike.
    pub loop_iterations: Option<u32>,
    /// Vector registers that the code of a software adapter has: as many as the processor has, 16 (AVX2) or 32 (AVX-512, ARM). Of GPUs, where
    /// it says nothing, 16.
    pub vector_registers: u32,
    /// What kind of device it is.
    pub class: Class,
}

impl Caps {
    /// What every WebGPU device has: no optional feature.
    pub const fn minimal() -> Self {
        Self {
            workgroup_memory: 16_384,
            invocations: 256,
            workgroups: 65_535,
            binding_size: 128 << 20,
            buffer_size: 256 << 20,
            offset_alignment: 256,
            subgroup: None,
            f16: false,
            unpack_f16: false,
            int64: false,
            cooperative_matrix: false,
            loop_iterations: None,
            vector_registers: 16,
            class: Class::Discrete,
        }
    }

    /// The subgroup size, where it is one and the same in every dispatch.
    pub fn fixed_subgroup(&self) -> Option<u32> {
        self.subgroup.filter(|(min, max)| min == max).map(|(min, _)| min)
    }
}

impl std::fmt::Display for Caps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let yes = |b| if b { "yes" } else { "no" };
        let subgroup = match self.subgroup {
            None => "none".to_owned(),
            Some((min, max)) if min == max => format!("{min}"),
            Some((min, max)) => format!("{min} to {max}"),
        };
        writeln!(f, "workgroup memory   {} KiB", self.workgroup_memory / 1024)?;
        writeln!(f, "workgroup          {} invocations", self.invocations)?;
        writeln!(f, "storage binding    {} MiB", self.binding_size >> 20)?;
        writeln!(f, "buffer             {} MiB", self.buffer_size >> 20)?;
        writeln!(f, "offset alignment   {} B", self.offset_alignment)?;
        writeln!(f, "subgroup           {subgroup}")?;
        writeln!(f, "f16 in shaders     {}", yes(self.f16))?;
        writeln!(f, "64-bit integers    {}", yes(self.int64))?;
        if let Some(iterations) = self.loop_iterations {
            writeln!(
                f,
                "loops              {iterations} iterations of an invocation, a fault of the driver"
            )?;
        }
        if self.class == Class::Software {
            writeln!(f, "vector registers   {}, of the processor", self.vector_registers)?;
        }
        write!(f, "class              {}", self.class)
    }
}
