//! Attention that Burn's autodiff goes back through.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::NoCheckpointing;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn_wgpu::Wgpu;
use gqa::{BackwardIo, Io, KvCache, NewKv, PagedShape, Sequence};

use crate::error::Error;
use crate::step::{Layouts, Prepared};
use crate::view::{View, check_dtype, float};
use crate::{Dtype, GqaAttention, Step};

/// One forward pass of a model in training; from [`GqaAttention::train`].
///
/// It keeps keys and values of each layer, and for the way back the queries, the outputs and a log-sum-exp per row: memory linear in
/// tokens. Burn's graph holds what it needs of it, so it can be dropped before `backward`.
#[derive(Debug)]
pub struct Training {
    attention: Arc<GqaAttention>,
    cache: KvCache,
    step: Step<'static>,
    /// Whether a layer has gone forward.
    used: Vec<bool>,
}

/// What the way back of one layer needs.
#[derive(Debug)]
struct Saved {
    attention: Arc<GqaAttention>,
    /// Holds the memory of the cache, too.
    prepared: Arc<Prepared>,
    layer: u32,
    q: View,
    /// Shapes.
    k: Vec<usize>,
    v: Vec<usize>,
    out: View,
    lse: View,
}

/// The operation, to Burn.
#[derive(Debug)]
struct Attend;

impl GqaAttention {
    /// Begins a forward pass whose gradients are wanted: of sequences of `lengths` tokens, which do not see each other, through `layers`
    /// layers.
    ///
    /// A model whose layers are of several kinds begins one with each kind's attention. Sinks, where the spec has some, are constants.
    ///
    /// # Errors
    /// As [`gqa::Plan::backward`], [`KvCache::paged`] and [`KvCache::extend`].
    pub fn train(self: &Arc<Self>, lengths: &[u32], layers: u32) -> Result<Training, Error> {
        self.inner().plan().backward()?;
        let pages = |len: &u32| len.next_multiple_of(PagedShape::PAGE);
        let shape = PagedShape {
            sequences: lengths.len() as u32,
            page: PagedShape::PAGE,
            tokens: lengths.iter().map(pages).sum(),
            longest_step: lengths.iter().max().copied().unwrap_or(0),
        };
        let mut cache = KvCache::paged(self.device(), &vec![self.spec(); layers as usize], shape)?;
        let mut sequences = Vec::new();
        for len in lengths {
            sequences.push(Sequence::new(cache.open()?, *len));
        }
        let step = self.begin(&mut cache, &sequences)?;
        let used = vec![false; layers as usize];
        Ok(Training { attention: self.clone(), cache, step, used })
    }
}

impl GqaAttention {
    /// A tensor whose gradient can lie as it does: dense, from the start of what is bound. Copied where it does not.
    fn dense(&self, name: &'static str, tensor: Tensor<3>) -> Result<View, Error> {
        let view = self.view(name, tensor.clone())?;
        if view.is_dense() {
            return Ok(view);
        }
        // To Burn, a flat tensor is one whose elements follow each other; a sum has memory of its own.
        let (shape, count) = (tensor.shape(), tensor.shape().num_elements());
        let copy = self.view(name, (tensor.reshape([count]) + 0.0).reshape(shape))?;
        match copy.is_dense() {
            true => Ok(copy),
            false => {
                let (needed, found) = ("dense rows".to_owned(), format!("strides of {:?}", copy.strides));
                Err(Error::Tensor { name, problem: "Burn's copy of it", needed, found })
            }
        }
    }

    /// New numbers of f32.
    fn f32s(&self, name: &'static str, shape: [usize; 3], device: &Device) -> Result<View, Error> {
        let tensor = float(name, Tensor::<3>::empty(shape, (device, DType::F32)))?;
        check_dtype(name, &tensor, Dtype::F32)?;
        View::new(name, &tensor, (4, self.alignment()))
    }
}

impl Training {
    /// The step of this pass, to give it a mask: [`GqaAttention::keep_mask`], [`GqaAttention::add_mask`].
    pub fn step(&mut self) -> &mut Step<'static> {
        &mut self.step
    }

    /// Attends within each sequence, in `layer`; shapes as of [`GqaAttention::forward`].
    ///
    /// Tensors of Burn's autodiff give a tensor of it: `loss.backward()` finds gradients of `q`, `k` and `v`, before they turn where the
    /// spec has RoPE. Others give one without a graph. A tensor whose rows are not dense is copied once, since its gradient lies as it.
    ///
    /// # Errors
    /// [`Error::Layer`] when the layer has gone forward already; else as [`GqaAttention::forward`]; [`Error::Backend`] for Burn's gradient checkpointing.
    ///
    /// # Panics
    /// Not here, but `loss.backward()` does when there is no memory left for gradients: Burn's graph has no way to return an error.
    pub fn forward(&mut self, layer: u32, tensors: [Tensor<3>; 3]) -> Result<Tensor<3>, Error> {
        match self.used.get(layer as usize) {
            Some(false) => {}
            found => {
                return Err(Error::Layer { layer, layers: self.used.len() as u32, used: found.is_some() });
            }
        }
        if !tensors.iter().any(|x| x.is_autodiff()) {
            return Ok(self.attend(layer, tensors, false)?.0);
        }
        let [q, k, v] = tensors;
        let ((q, of_q), (k, of_k), (v, of_v)) = (open("q", q)?, open("k", k)?, open("v", v)?);
        let (out, saved) = self.attend(layer, [q, k, v], true)?;
        let out = out.try_into_primitive::<Wgpu>();
        let out = out.map_err(|error| Error::Backend { name: "out", found: format!("{error:?}") })?;
        let out = match Attend.prepare::<NoCheckpointing>([of_q, of_k, of_v]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(Arc::new(saved), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        Ok(Tensor::from_primitive::<Autodiff<Wgpu>>(out))
    }

    /// Forward, and what the way back needs of it, where that is `wanted`.
    fn attend(
        &mut self,
        layer: u32,
        tensors: [Tensor<3>; 3],
        wanted: bool,
    ) -> Result<(Tensor<3>, Saved), Error> {
        let attention = self.attention.clone();
        let spec = attention.spec();
        self.step.check_tokens([0, 1, 2].map(|nth| tensors[nth].dims()[0]))?;
        let [q, k, v] = tensors;
        let (device, tokens) = (q.device(), q.dims()[0]);
        let heads = spec.q_heads() as usize;
        let out: Tensor<3> = Tensor::empty([tokens, heads, spec.v_head_dim() as usize], (&device, q.dtype()));
        let (q, k, v) = (attention.dense("q", q)?, attention.dense("k", k)?, attention.dense("v", v)?);
        let written = attention.view("out", out.clone())?;
        let lse = attention.f32s("lse", [tokens, heads, 1], &device)?;
        let layouts = Layouts {
            q: q.layout("q", spec.q_heads(), spec.head_dim())?,
            out: written.layout("out", spec.q_heads(), spec.v_head_dim())?,
            lse: Some(lse.layout("lse", spec.q_heads(), 1)?),
            new_k: k.layout("k", spec.kv_heads(), spec.head_dim())?,
            new_v: v.layout("v", spec.kv_heads(), spec.v_head_dim())?,
        };
        let prepared = self.step.of(&attention, &self.cache, layouts)?;
        if wanted {
            // Whatever can be wrong is found now, when there is someone to tell.
            prepared.gradients(&attention)?;
        }
        let mut encoder = attention.encoder();
        let kv = NewKv { k: k.binding(), v: v.binding() };
        attention.inner().append(&mut encoder, &prepared.step, layer, kv)?;
        let io = Io { q: q.binding(), out: written.binding(), lse: Some(lse.binding()) };
        attention.inner().record(&mut encoder, &prepared.step, layer, io)?;
        attention.queue().submit([encoder.finish()]);
        self.used[layer as usize] = true;
        Ok((out, Saved { attention, prepared, layer, q, k: k.shape, v: v.shape, out: written, lse }))
    }
}

/// The tensor behind Burn's graph, and its place in there.
fn open(name: &'static str, tensor: Tensor<3>) -> Result<(Tensor<3>, NodeGuard), Error> {
    // A constant among others that are of the graph.
    let tensor = if tensor.is_autodiff() { tensor } else { tensor.autodiff() };
    let found = tensor.try_into_primitive::<Autodiff<Wgpu>>();
    let found = found.map_err(|error| Error::Backend { name, found: format!("{error:?}") })?;
    let (primitive, guard) = found.into_parts();
    Ok((Tensor::from_primitive::<Wgpu>(primitive), guard))
}

impl Saved {
    /// Gradients of queries, keys and values.
    fn back(&self, d_out: Tensor<3>) -> Result<[Tensor<3>; 3], Error> {
        let (attention, spec) = (&self.attention, self.attention.spec());
        let device = d_out.device();
        let like = |shape: &[usize]| -> Tensor<3> {
            Tensor::empty([shape[0], shape[1], shape[2]], (&device, d_out.dtype()))
        };
        let gradients = [like(&self.q.shape), like(&self.k), like(&self.v)];
        let [dq, dk, dv] = &gradients;
        // A copy of one that is not dense would be written, and the gradient lost.
        let written = |name, x: &Tensor<3>| {
            let view = attention.view(name, x.clone())?;
            match view.is_dense() {
                true => Ok(view),
                false => {
                    let (needed, found) = ("dense rows".to_owned(), format!("strides of {:?}", view.strides));
                    Err(Error::Tensor { name, problem: "Burn's new tensor", needed, found })
                }
            }
        };
        let (dq, dk, dv) = (written("dq", dq)?, written("dk", dk)?, written("dv", dv)?);
        let d_sinks = match spec.sinks() {
            true => Some(attention.f32s("d_sinks", [1, 1, spec.q_heads() as usize], &device)?),
            false => None,
        };
        let d_out = attention.dense("d_out", d_out)?;
        let io = BackwardIo {
            q: self.q.binding(),
            out: self.out.binding(),
            lse: self.lse.binding(),
            d_out: d_out.binding(),
            dq: dq.binding(),
            dk: dk.binding(),
            dv: dv.binding(),
            d_sinks: d_sinks.as_ref().map(View::binding),
        };
        let step = (&self.prepared.step, self.prepared.gradients(attention)?);
        let mut encoder = attention.encoder();
        attention.inner().backward(&mut encoder, step, self.layer, io)?;
        attention.queue().submit([encoder.finish()]);
        Ok(gradients)
    }
}

impl Backward<Wgpu, 3> for Attend {
    type State = Arc<Saved>;

    // Forward has checked what can be checked, and Burn's graph has no way to return what is left.
    #[allow(clippy::panic)]
    fn backward(self, ops: Ops<Arc<Saved>, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = Tensor::from_primitive::<Wgpu>(grads.consume::<Wgpu>(&ops.node));
        let found =
            ops.state.back(d_out).unwrap_or_else(|error| panic!("no gradients of attention: {error}"));
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            let Some(parent) = parent else { continue };
            match gradient.try_into_primitive::<Wgpu>() {
                Ok(gradient) => grads.register::<Wgpu>(parent.id, gradient),
                Err(error) => panic!("no gradients of attention: {error:?}"),
            }
        }
    }
}
