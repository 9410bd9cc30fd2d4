//! Sets and validates the fields of a spec.

use super::{AttentionSpec, Dtype, Mask};
use crate::error::Error;
use crate::rope::Rope;

/// Largest `head_dim`: that of DeepSeek's absorbed MLA.
pub const MAX_HEAD_DIM: u32 = 576;
/// Largest `v_head_dim`.
pub const MAX_V_HEAD_DIM: u32 = 512;
/// Largest number of query heads: KV heads are one dimension of a dispatch, and every device allows this many.
pub const MAX_HEADS: u32 = 65_535;

/// Sets what differs from the defaults; [`SpecBuilder::build`] validates the whole.
#[derive(Debug, Clone)]
#[must_use]
pub struct SpecBuilder(pub(super) AttentionSpec);

impl SpecBuilder {
    /// Key/value heads, a divisor of the query heads.
    pub fn kv_heads(mut self, kv_heads: u32) -> Self {
        self.0.kv_heads = kv_heads;
        self
    }
    /// Elements of a value, where they differ from those of a key.
    pub fn v_head_dim(mut self, v_head_dim: u32) -> Self {
        (self.0.v_head_dim, self.0.v_in_k) = (v_head_dim, false);
        self
    }
    /// Values are the first `v_head_dim` elements of the keys; the cache has no values of its own.
    pub fn v_in_k(mut self, v_head_dim: u32) -> Self {
        (self.0.v_head_dim, self.0.v_in_k) = (v_head_dim, true);
        self
    }
    /// Storage of queries, new keys and values, outputs, and masks that are added: f32 or f16.
    pub fn q_dtype(mut self, dtype: Dtype) -> Self {
        self.0.q_dtype = dtype;
        self
    }
    /// Storage of keys and values in the cache.
    pub fn kv_dtype(mut self, dtype: Dtype) -> Self {
        self.0.kv_dtype = dtype;
        self
    }
    /// What multiplies `q k^T`: any number of magnitude 2.3e38 or less.
    pub fn scale(mut self, scale: f32) -> Self {
        self.0.scale = scale;
        self
    }
    /// Bends logits to at most `softcap` in magnitude: 1e-6 to 1e30.
    pub fn softcap(mut self, softcap: f32) -> Self {
        self.0.softcap = Some(softcap);
        self
    }
    /// ALiBi, with a slope for each query head: usually [`alibi_slopes`](super::alibi_slopes). The bias is `-slope * (i - j)` for
    /// later keys, too, which it favours: ALiBi is made for causal attention.
    pub fn alibi(mut self, slopes: &[f32]) -> Self {
        self.0.alibi = Some(slopes.to_vec());
        self
    }
    /// Whether each query head has a sink: a logit without a key and a value.
    pub fn sinks(mut self, sinks: bool) -> Self {
        self.0.sinks = sinks;
        self
    }
    /// `true` (the default): a query sees the keys up to its own position. `false`: it sees all.
    pub fn causal(mut self, causal: bool) -> Self {
        self.0.causal = causal;
        self
    }
    /// A query sees `left` keys before its own position and, where given, `right` keys after it. A model whose window counts
    /// the query's own key (Mistral, Gemma: "4096") has `left` one less.
    pub fn window(mut self, left: impl Into<Option<u32>>, right: impl Into<Option<u32>>) -> Self {
        (self.0.window_left, self.0.window_right) = (left.into(), right.into());
        self
    }
    /// A mask that is data.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.0.mask = mask;
        self
    }
    /// Turns queries and keys with their positions.
    pub fn rope(mut self, rope: Rope) -> Self {
        self.0.rope = Some(rope);
        self
    }
    /// Normalises queries and keys to RMS 1, times the layer's weights, before they turn.
    pub fn qk_norm(mut self, epsilon: f32) -> Self {
        self.0.qk_norm = Some(epsilon);
        self
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Field`] names the first field that cannot be.
    pub fn build(self) -> Result<AttentionSpec, Error> {
        let spec = self.0;
        check_shape(&spec)?;
        check_logits(&spec)?;
        // Positions stay below 2^31 with a window on either side.
        for (field, window) in [("window_left", spec.window_left), ("window_right", spec.window_right)] {
            if let Some(keys) = window.filter(|keys| *keys > i32::MAX as u32) {
                return Err(Error::field(field, keys, "it must be below 2^31; leave it out for no window"));
            }
        }
        if let Some(rope) = &spec.rope {
            rope.check(spec.head_dim)?;
        }
        if let Some(epsilon) = spec.qk_norm.filter(|e| !(1e-30..=1.0).contains(e)) {
            return Err(Error::field("qk_norm", epsilon, "its epsilon must lie in 1e-30..=1"));
        }
        Ok(spec)
    }
}

fn check_shape(spec: &AttentionSpec) -> Result<(), Error> {
    let range = |field, value: u32, max| match (1..=max).contains(&value) {
        true => Ok(()),
        false => Err(Error::field(field, value, format!("it must lie in 1..={max}"))),
    };
    range("q_heads", spec.q_heads, MAX_HEADS)?;
    range("kv_heads", spec.kv_heads, MAX_HEADS)?;
    range("head_dim", spec.head_dim, MAX_HEAD_DIM)?;
    range("v_head_dim", spec.v_head_dim, MAX_V_HEAD_DIM)?;
    if !spec.q_heads.is_multiple_of(spec.kv_heads) {
        let needed = format!("it must divide q_heads, which is {}", spec.q_heads);
        return Err(Error::field("kv_heads", spec.kv_heads, needed));
    }
    if spec.v_in_k && spec.v_head_dim > spec.head_dim {
        let needed = format!("values lie in keys, which have {} elements", spec.head_dim);
        return Err(Error::field("v_head_dim", spec.v_head_dim, needed));
    }
    if !matches!(spec.q_dtype, Dtype::F32 | Dtype::F16) {
        return Err(Error::field("q_dtype", spec.q_dtype, "queries and outputs are stored as f32 or f16"));
    }
    if !matches!(spec.kv_dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
        return Err(Error::field(
            "kv_dtype",
            spec.kv_dtype,
            "no kernel reads it yet: it must be f32, f16 or bf16",
        ));
    }
    Ok(())
}

fn check_logits(spec: &AttentionSpec) -> Result<(), Error> {
    // Kernels work in base 2: the scale is multiplied by log2(e) before it meets a logit.
    if !(spec.scale * std::f32::consts::LOG2_E).is_finite() {
        return Err(Error::field("scale", spec.scale, "it must be finite, and at most 2.3e38 in magnitude"));
    }
    if let Some(cap) = spec.softcap.filter(|cap| !(1e-6..=1e30).contains(cap)) {
        return Err(Error::field("softcap", cap, "it must lie in 1e-6..=1e30"));
    }
    let Some(slopes) = &spec.alibi else { return Ok(()) };
    if slopes.len() != spec.q_heads as usize {
        let needed = format!("there must be one for each of {} query heads", spec.q_heads);
        return Err(Error::field("alibi", format!("{} slopes", slopes.len()), needed));
    }
    match slopes.iter().find(|slope| !(-1e6..=1e6).contains(*slope)) {
        Some(slope) => {
            Err(Error::field("alibi", slope, "a slope must be a number of at most 1e6 in magnitude"))
        }
        None => Ok(()),
    }
}
