//! A Burn tensor as the buffer range that it is.

use std::any::Any;

use burn::tensor::{Bool, DType, Tensor};
use burn_fusion::{FusionBackend, FusionRuntime, FusionTensor};
use burn_wgpu::{AutoCompiler, CubeBackend, CubeTensor, Wgpu, WgpuResource};
use cubecl::wgpu::WgpuServer;
use gqa::wgpu;
use gqa::{Dtype, Layout};

use crate::error::Error;

/// A tensor's place in GPU memory, which stays its own for as long as this lives.
#[derive(Debug)]
pub(crate) struct View {
    resource: WgpuResource,
    /// Keeps Burn from moving it or giving it to another tensor, and, as one more owner, from computing in place.
    _held: Box<dyn Any + Send + Sync>,
    /// Where the binding starts: a multiple of the device's alignment.
    offset: u64,
    /// Elements from there to the tensor's first.
    pub(crate) first: u32,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<usize>,
    pub(crate) dtype: DType,
}

/// What a tensor is when Burn, with or without fusion, has computed it.
pub(crate) trait Resolve<B> {
    fn float(self) -> CubeTensor;
    fn bool(self) -> CubeTensor;
}

impl<B> Resolve<B> for CubeTensor {
    fn float(self) -> CubeTensor {
        self
    }

    fn bool(self) -> CubeTensor {
        self
    }
}

impl<R: FusionRuntime, B> Resolve<B> for FusionTensor<R>
where
    B: FusionBackend<FusionRuntime = R, FloatTensorPrimitive = CubeTensor, BoolTensorPrimitive = CubeTensor>,
{
    fn float(self) -> CubeTensor {
        self.client.clone().resolve_tensor_float::<B>(self)
    }

    fn bool(self) -> CubeTensor {
        self.client.clone().resolve_tensor_bool::<B>(self)
    }
}

/// The tensor behind Burn's dispatch.
pub(crate) fn float<const D: usize>(name: &'static str, tensor: Tensor<D>) -> Result<CubeTensor, Error> {
    let found = tensor.try_into_primitive::<Wgpu>();
    let found = found.map_err(|error| Error::Backend { name, found: format!("{error:?}") })?;
    Ok(Resolve::<CubeBackend>::float(found))
}

/// The same for a bool tensor.
pub(crate) fn bool<const D: usize>(name: &'static str, tensor: Tensor<D, Bool>) -> Result<CubeTensor, Error> {
    let found = tensor.try_into_primitive::<Wgpu>();
    let found = found.map_err(|error| Error::Backend { name, found: format!("{error:?}") })?;
    Ok(Resolve::<CubeBackend>::bool(found))
}

impl View {
    /// The range of `tensor`, in elements of `bytes`, to be bound at a multiple of `alignment`. All that Burn has recorded so far is
    /// then on the queue.
    pub(crate) fn new(
        name: &'static str,
        tensor: &CubeTensor,
        (bytes, alignment): (u32, u32),
    ) -> Result<Self, Error> {
        let held = tensor.client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone());
        let held = held.map_err(|error| Error::Memory { name, found: error.to_string() })?;
        let (resource, held) = (held.resource().clone(), Box::new((tensor.handle.clone(), held)));
        let start = resource.offset;
        let offset = start - start % u64::from(alignment);
        let first = ((start - offset) / u64::from(bytes)) as u32;
        let (shape, strides) = (tensor.meta.shape().to_vec(), tensor.meta.strides().to_vec());
        Ok(Self { resource, _held: held, offset, first, shape, strides, dtype: tensor.dtype })
    }

    /// The same as `[tokens, heads, dim]`.
    pub(crate) fn layout(&self, name: &'static str, heads: u32, dim: u32) -> Result<Layout, Error> {
        let wrong =
            |problem, needed: String, found: String| Err(Error::Tensor { name, problem, needed, found });
        let [_, found_heads, found_dim] = self.shape[..] else {
            return wrong("rank", "3".to_owned(), self.shape.len().to_string());
        };
        if (found_heads, found_dim) != (heads as usize, dim as usize) {
            return wrong("shape", format!("[tokens, {heads}, {dim}]"), format!("{:?}", self.shape));
        }
        if dim > 1 && self.strides[2] != 1 {
            let found = format!("a stride of {}", self.strides[2]);
            return wrong("elements of a head are apart", "a stride of 1".to_owned(), found);
        }
        let stride = |axis: usize| u32::try_from(self.strides[axis]).unwrap_or(u32::MAX);
        Ok(Layout { offset: self.first, token_stride: stride(0), head_stride: stride(1) })
    }

    /// Whether its elements follow each other from the binding's start.
    #[cfg(feature = "autodiff")]
    pub(crate) fn is_dense(&self) -> bool {
        let mut expected = 1;
        let follow = |(&n, &stride): (&usize, &usize)| {
            let dense = n == 1 || stride == expected;
            expected *= n;
            dense
        };
        self.first == 0 && self.shape.iter().zip(&self.strides).rev().all(follow)
    }

    /// What to bind.
    pub(crate) fn binding(&self) -> wgpu::BufferBinding<'_> {
        let resource = &self.resource;
        // Up to the end of the tensor's own range: the rest of the buffer belongs to others.
        let size =
            std::num::NonZeroU64::new((resource.offset - self.offset + resource.size).next_multiple_of(4));
        wgpu::BufferBinding { buffer: &resource.buffer, offset: self.offset, size }
    }
}

/// That `tensor` holds numbers of `dtype`.
pub(crate) fn check_dtype(name: &'static str, tensor: &CubeTensor, dtype: Dtype) -> Result<(), Error> {
    let needed = match dtype {
        Dtype::F16 => DType::F16,
        _ => DType::F32,
    };
    if tensor.dtype == needed {
        return Ok(());
    }
    let found = format!("{:?}", tensor.dtype);
    Err(Error::Tensor { name, problem: "type", needed: format!("{needed:?}, the spec's q_dtype"), found })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use burn::tensor::{Distribution, Tensor};

    use super::*;

    #[test]
    fn a_view_is_the_tensors_own_buffer() {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapter = crate::choose(&instance, None).unwrap();
        let (device, setup) = crate::open(&instance, &adapter).unwrap();
        let alignment = setup.device.limits().min_storage_buffer_offset_alignment;
        let whole = Tensor::<3>::random([5, 3, 40], Distribution::Default, &device);
        let parts = [whole.clone(), whole.clone().narrow(1, 1, 2), whole.clone().swap_dims(0, 1)];
        for part in parts {
            let tensor = float("q", part).unwrap();
            let held = tensor.client.get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone()).unwrap();
            let own = held.resource();
            let view = View::new("q", &tensor, (4, alignment)).unwrap();
            let bound = view.binding();
            assert_eq!(*bound.buffer, own.buffer);
            assert_eq!(bound.offset + u64::from(view.first) * 4, own.offset);
            assert_eq!(bound.offset % u64::from(alignment), 0);
            assert_eq!(bound.offset + bound.size.unwrap().get(), own.offset + own.size);
        }
    }
}
