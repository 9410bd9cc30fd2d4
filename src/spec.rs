//! What is asked of attention: heads, dims, storage types, scale, causality. Pure data, validated once.

use crate::error::Error;

/// Largest `head_dim` and `v_head_dim`.
pub const MAX_HEAD_DIM: u32 = 256;
/// Largest number of query heads: KV heads are one dimension of a dispatch, and every device allows this many.
pub const MAX_HEADS: u32 = 65_535;

/// How a number is stored in a buffer. Arithmetic is f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32 (8 exponent bits, 7 mantissa bits).
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Half a unit in the last place, relative: the rounding error of one stored number.
    pub const fn epsilon(self) -> f64 {
        match self {
            Self::F32 => 5.960_464_477_539_063e-8,
            Self::F16 => 4.882_812_5e-4,
            Self::Bf16 => 3.906_25e-3,
        }
    }

    /// The name used by the command line and in shader file names: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The nearest number that this type can store (ties to even), as f32.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => half::f16::from_f32(x).to_f32(),
            Self::Bf16 => half::bf16::from_f32(x).to_f32(),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Dtype {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        [Self::F32, Self::F16, Self::Bf16]
            .into_iter()
            .find(|d| d.name() == s)
            .ok_or_else(|| Error::field("dtype", s, "it must be f32, f16 or bf16"))
    }
}

/// A validated attention problem: everything that kernels are compiled for. Made by [`AttentionSpec::builder`].
///
/// The formula is `out = softmax(scale * q k^T + mask) v` per query head, where query head `h` reads KV head
/// `h / group` (Ainslie et al., "GQA", arXiv 2305.13245).
///
/// ```
/// use gqa::{AttentionSpec, Dtype};
/// let llama = AttentionSpec::builder(32, 8, 128).kv_dtype(Dtype::F16).build()?;
/// assert_eq!(llama.group(), 4);
/// # Ok::<(), gqa::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    v_head_dim: u32,
    q_dtype: Dtype,
    kv_dtype: Dtype,
    scale: f32,
    causal: bool,
}

impl AttentionSpec {
    /// Starts a spec: f32 storage, `v_head_dim = head_dim`, scale `1/sqrt(head_dim)`, causal.
    pub fn builder(q_heads: u32, kv_heads: u32, head_dim: u32) -> SpecBuilder {
        SpecBuilder(Self {
            q_heads,
            kv_heads,
            head_dim,
            v_head_dim: head_dim,
            q_dtype: Dtype::F32,
            kv_dtype: Dtype::F32,
            scale: (1.0 / f64::from(head_dim.max(1)).sqrt()) as f32,
            causal: true,
        })
    }

    /// Query heads.
    pub fn q_heads(&self) -> u32 {
        self.q_heads
    }
    /// Key/value heads, a divisor of [`Self::q_heads`].
    pub fn kv_heads(&self) -> u32 {
        self.kv_heads
    }
    /// Query heads that share one KV head: 1 is MHA, `q_heads` is MQA.
    pub fn group(&self) -> u32 {
        self.q_heads / self.kv_heads
    }
    /// Elements of a query or key.
    pub fn head_dim(&self) -> u32 {
        self.head_dim
    }
    /// Elements of a value and of an output row.
    pub fn v_head_dim(&self) -> u32 {
        self.v_head_dim
    }
    /// Storage of queries, new keys and values, and outputs: f32 or f16.
    pub fn q_dtype(&self) -> Dtype {
        self.q_dtype
    }
    /// Storage of keys and values in the cache.
    pub fn kv_dtype(&self) -> Dtype {
        self.kv_dtype
    }
    /// What multiplies `q k^T`.
    pub fn scale(&self) -> f32 {
        self.scale
    }
    /// Whether key `j` is visible to query `i` only where `j <= q_start + i`.
    pub fn causal(&self) -> bool {
        self.causal
    }

    /// Keys that the query at `position` sees among `kv_len`: those before the returned index.
    pub fn visible_end(&self, position: i64, kv_len: u32) -> u32 {
        if self.causal { (position + 1).clamp(0, i64::from(kv_len)) as u32 } else { kv_len }
    }

    /// Bytes that one token takes in one layer of the cache, without padding.
    pub fn kv_bytes_per_token(&self) -> u64 {
        u64::from(self.kv_heads)
            * u64::from(self.head_dim + self.v_head_dim)
            * u64::from(self.kv_dtype.bytes())
    }
}

/// Sets what differs from the defaults; [`SpecBuilder::build`] validates the whole.
#[derive(Debug, Clone)]
#[must_use]
pub struct SpecBuilder(AttentionSpec);

impl SpecBuilder {
    /// Elements of a value, where they differ from those of a key.
    pub fn v_head_dim(mut self, v_head_dim: u32) -> Self {
        self.0.v_head_dim = v_head_dim;
        self
    }
    /// Storage of queries, new keys and values, and outputs: f32 or f16.
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
    /// `true` (the default): a query sees the keys up to its own position. `false`: it sees all.
    pub fn causal(mut self, causal: bool) -> Self {
        self.0.causal = causal;
        self
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Field`] names the first field that cannot be.
    pub fn build(self) -> Result<AttentionSpec, Error> {
        let spec = self.0;
        let range = |field, value: u32, max| {
            if (1..=max).contains(&value) {
                Ok(())
            } else {
                Err(Error::field(field, value, format!("it must lie in 1..={max}")))
            }
        };
        range("q_heads", spec.q_heads, MAX_HEADS)?;
        range("kv_heads", spec.kv_heads, MAX_HEADS)?;
        range("head_dim", spec.head_dim, MAX_HEAD_DIM)?;
        range("v_head_dim", spec.v_head_dim, MAX_HEAD_DIM)?;
        if !spec.q_heads.is_multiple_of(spec.kv_heads) {
            let needed = format!("it must divide q_heads, which is {}", spec.q_heads);
            return Err(Error::field("kv_heads", spec.kv_heads, needed));
        }
        if spec.q_dtype == Dtype::Bf16 {
            return Err(Error::field(
                "q_dtype",
                spec.q_dtype,
                "queries and outputs are stored as f32 or f16",
            ));
        }
        // Kernels work in base 2: the scale is multiplied by log2(e) before it meets a logit.
        if !(spec.scale * std::f32::consts::LOG2_E).is_finite() {
            return Err(Error::field(
                "scale",
                spec.scale,
                "it must be finite, and at most 2.3e38 in magnitude",
            ));
        }
        Ok(spec)
    }
}
