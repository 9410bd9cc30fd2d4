//! One forward call, prepared for the strides that its tensors turn out to have.

use std::sync::Arc;

use gqa::{AttentionSpec, Batch, Dtype, KvCache, Layout, Mask, MaskLayout, Sequence};

use crate::GqaAttention;
use crate::error::Error;
use crate::view::View;

/// What all layers of one forward call share; from [`GqaAttention::begin`].
#[derive(Debug)]
pub struct Step<'a> {
    pub(crate) sequences: Vec<Sequence<'a>>,
    /// Tokens of each sequence at `begin`.
    pub(crate) lengths: Vec<u32>,
    pub(crate) mask: Option<StepMask>,
    /// Steps of the library, one for each attention and set of strides that came: in most models one.
    pub(crate) prepared: Vec<(u64, Layouts, Arc<Prepared>)>,
}

/// A dense mask, and for whom it is.
#[derive(Debug)]
pub(crate) struct StepMask {
    kind: Mask,
    dtype: Dtype,
    layout: MaskLayout,
    view: View,
}

impl StepMask {
    /// That it is what a spec with a dense mask asks for.
    fn check(&self, spec: &AttentionSpec) -> Result<(), Error> {
        // Booleans are bytes, whatever the queries are.
        let is_typed = self.kind == Mask::Keep || self.dtype == spec.q_dtype();
        let heads = self.view.shape[1];
        if self.kind == spec.mask() && is_typed && [1, spec.q_heads() as usize].contains(&heads) {
            return Ok(());
        }
        let [needed, found] =
            [(spec.mask(), spec.q_dtype(), spec.q_heads() as usize), (self.kind, self.dtype, heads)]
                .map(|(mask, dtype, heads)| format!("Mask::{mask:?} beside {dtype}, of {heads} heads"));
        Err(Error::Tensor { name: "mask", problem: "the step has one for another attention", needed, found })
    }
}

/// The library's step, and what its way back needs once it is wanted.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) step: gqa::Step,
    #[cfg(feature = "autodiff")]
    gradients: std::sync::OnceLock<gqa::BackwardStep>,
}

#[cfg(feature = "autodiff")]
impl Prepared {
    /// One for all layers: they go back one after another.
    pub(crate) fn gradients(&self, attention: &GqaAttention) -> Result<&gqa::BackwardStep, Error> {
        if let Some(gradients) = self.gradients.get() {
            return Ok(gradients);
        }
        let gradients = attention.inner().prepare_backward(&self.step)?;
        Ok(self.gradients.get_or_init(|| gradients))
    }
}

/// Strides of queries, outputs, new keys and new values, and of the log-sum-exp where it is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layouts {
    pub(crate) q: Layout,
    pub(crate) out: Layout,
    pub(crate) lse: Option<Layout>,
    pub(crate) new_k: Layout,
    pub(crate) new_v: Layout,
}

impl Step<'_> {
    /// The library's step for tensors of these strides, prepared when they come for the first time.
    pub(crate) fn of(
        &mut self,
        attention: &GqaAttention,
        cache: &KvCache,
        layouts: Layouts,
    ) -> Result<Arc<Prepared>, Error> {
        self.check_lengths(cache)?;
        let known = |(id, known, _): &(u64, Layouts, _)| *id == attention.id() && *known == layouts;
        let nth = match self.prepared.iter().position(known) {
            Some(nth) => nth,
            None => {
                let Layouts { q, out, lse, new_k, new_v } = layouts;
                // Layers without a dense mask share the step of those that have one.
                let given = self.mask.as_ref().filter(|_| attention.spec().mask().is_dense());
                given.map_or(Ok(()), |mask| mask.check(attention.spec()))?;
                let mask = given.map(|mask| mask.layout);
                let batch = Batch { sequences: &self.sequences, q, out, lse, new_k, new_v, mask };
                let step = attention.inner().prepare(attention.queue(), cache, &batch)?;
                if let Some(StepMask { view, .. }) = given {
                    // Submitted apart: whatever becomes of this call, the step has its mask.
                    let mut encoder = attention.encoder();
                    attention.inner().mask(&mut encoder, &step, view.binding())?;
                    attention.queue().submit([encoder.finish()]);
                }
                let prepared = Prepared {
                    step,
                    #[cfg(feature = "autodiff")]
                    gradients: Default::default(),
                };
                self.prepared.push((attention.id(), layouts, Arc::new(prepared)));
                self.prepared.len() - 1
            }
        };
        Ok(self.prepared[nth].2.clone())
    }

    /// Takes the new tokens back out of the cache: what to do when a [`forward`](GqaAttention::forward) of the step has failed.
    ///
    /// # Errors
    /// [`Error::Stale`] when the cache has changed since, and what [`KvCache::truncate`] says.
    pub fn undo(self, cache: &mut KvCache) -> Result<(), Error> {
        self.check_lengths(cache)?;
        for (sequence, len) in self.sequences.iter().zip(&self.lengths) {
            cache.truncate(sequence.id, len - sequence.new_len)?;
        }
        Ok(())
    }

    /// That the tensors have as many tokens as the sequences.
    pub(crate) fn check_tokens(&self, [q, k, v]: [usize; 3]) -> Result<(), Error> {
        // Where sequences say themselves where their tokens lie, the library checks how far they reach.
        let queries: Vec<_> = self.sequences.iter().map(|s| (s.q_len, s.token)).collect();
        let new: Vec<_> = self.sequences.iter().map(|s| (s.new_len, s.new_token)).collect();
        let counts = [("q", q, &queries), ("k", k, &new), ("v", v, &new)];
        for (name, found, spans) in counts {
            let needed: usize = spans.iter().map(|(len, _)| *len as usize).sum();
            if found != needed && spans.iter().all(|(_, at)| at.is_none()) {
                let [needed, found] = [needed, found].map(|tokens| format!("{tokens} tokens"));
                return Err(Error::Tensor {
                    name,
                    problem: "the step's sequences have others",
                    needed,
                    found,
                });
            }
        }
        Ok(())
    }

    /// A dense mask, whose elements are `unit` of the library's.
    pub(crate) fn mask(&mut self, spec: &AttentionSpec, view: View, unit: u32) -> Result<(), Error> {
        let most = |f: fn(&Sequence<'_>) -> u32| self.sequences.iter().map(f).max().unwrap_or(0) as usize;
        let longest = self.lengths.iter().max().copied().unwrap_or(0) as usize;
        let needed = [self.sequences.len(), spec.q_heads() as usize, most(|s| s.q_len), longest];
        let fits =
            view.shape.len() == 4 && view.shape.iter().zip(needed).all(|(n, needed)| *n == 1 || *n == needed);
        if !fits {
            let (needed, found) = (format!("{needed:?}, or 1 for all"), format!("{:?}", view.shape));
            return Err(Error::Tensor { name: "mask", problem: "shape", needed, found });
        }
        let stride = |axis: usize| match view.shape[axis] {
            1 => 0,
            _ => u32::try_from(view.strides[axis]).unwrap_or(u32::MAX).saturating_mul(unit),
        };
        let layout = MaskLayout {
            offset: view.first,
            sequence_stride: stride(0),
            head_stride: stride(1),
            token_stride: stride(2),
            key_stride: stride(3),
        };
        self.mask = Some(StepMask { kind: spec.mask(), dtype: spec.q_dtype(), layout, view });
        // Steps that were prepared without it.
        self.prepared.clear();
        Ok(())
    }

    /// The step would mean other tokens, had a sequence changed.
    fn check_lengths(&self, cache: &KvCache) -> Result<(), Error> {
        for (index, (sequence, expected)) in self.sequences.iter().zip(&self.lengths).enumerate() {
            let found = cache.len(sequence.id)?;
            if found != *expected {
                return Err(Error::Stale { index, expected: *expected, found });
            }
        }
        Ok(())
    }
}
