//! Where an element of a caller's tensor lies: offset and strides, so that no tensor is copied or reshaped.

use crate::error::Error;

/// Strides of a `(token, head, element)` tensor, in elements; the innermost stride is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Index of the first element, behind the offset of the buffer binding.
    pub offset: u32,
    /// From a token to the next.
    pub token_stride: u32,
    /// From a head to the next.
    pub head_stride: u32,
}

impl Layout {
    /// `[tokens, heads, dim]`, dense.
    pub const fn tokens_heads(heads: u32, dim: u32) -> Self {
        Self { offset: 0, token_stride: heads.saturating_mul(dim), head_stride: dim }
    }

    /// `[heads, tokens, dim]`, dense.
    pub const fn heads_tokens(tokens: u32, dim: u32) -> Self {
        Self { offset: 0, token_stride: dim, head_stride: tokens.saturating_mul(dim) }
    }

    /// The same strides, `offset` elements further.
    #[must_use]
    pub const fn at(mut self, offset: u32) -> Self {
        self.offset = offset;
        self
    }

    /// Elements from the start of the binding to behind the last one of `shape`; 0 when the shape is empty.
    pub fn extent(&self, shape: Shape) -> u64 {
        if shape.tokens == 0 || shape.heads == 0 || shape.dim == 0 {
            return 0;
        }
        let last = |count: u32, stride: u32| u64::from(count - 1) * u64::from(stride);
        // Each product is below 2^64, their sum need not be.
        last(shape.tokens, self.token_stride)
            .saturating_add(last(shape.heads, self.head_stride))
            .saturating_add(u64::from(self.offset) + u64::from(shape.dim))
    }

    /// That shader indices (u32) reach every element.
    pub(crate) fn check_reach(&self, name: &'static str, shape: Shape) -> Result<(), Error> {
        let extent = self.extent(shape);
        if extent > u64::from(u32::MAX) {
            let needed = "a shader index has 32 bits: bind a part of the tensor, or split the batch";
            return Err(Error::field(name, format!("{extent} elements long"), needed));
        }
        Ok(())
    }

    /// That no two elements share a place, which an output needs.
    pub(crate) fn check_disjoint(&self, name: &'static str, shape: Shape) -> Result<(), Error> {
        let dims = [(shape.heads, self.head_stride), (shape.tokens, self.token_stride)];
        let nested = |[inner, outer]: [(u32, u32); 2]| {
            let inner_span = u64::from(inner.0.max(1) - 1) * u64::from(inner.1) + u64::from(shape.dim);
            (inner.0 <= 1 || inner.1 >= shape.dim) && (outer.0 <= 1 || u64::from(outer.1) >= inner_span)
        };
        if shape.tokens == 0 || nested(dims) || nested([dims[1], dims[0]]) {
            return Ok(());
        }
        let found = format!("token stride {}, head stride {}", self.token_stride, self.head_stride);
        Err(Error::field(name, found, format!("rows of {} elements must not overlap", shape.dim)))
    }
}

/// Extents of a `(token, head, element)` tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of the batch.
    pub tokens: u32,
    /// Heads of a token.
    pub heads: u32,
    /// Elements of a head.
    pub dim: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { tokens: 5, heads: 3, dim: 7 };

    #[test]
    fn extent_of_dense_layouts_is_their_size() {
        assert_eq!(Layout::tokens_heads(3, 7).extent(SHAPE), 105);
        assert_eq!(Layout::heads_tokens(5, 7).at(2).extent(SHAPE), 107);
        assert_eq!(Layout::heads_tokens(5, 7).at(2).extent(Shape { tokens: 0, ..SHAPE }), 0);
    }

    #[test]
    fn overlap_is_found_in_either_order() {
        assert!(Layout::tokens_heads(3, 7).check_disjoint("out", SHAPE).is_ok());
        assert!(Layout::heads_tokens(5, 7).check_disjoint("out", SHAPE).is_ok());
        let broadcast = Layout { offset: 0, token_stride: 0, head_stride: 7 };
        assert!(broadcast.check_disjoint("out", SHAPE).is_err());
        let narrow = Layout { offset: 0, token_stride: 20, head_stride: 7 };
        assert!(narrow.check_disjoint("out", SHAPE).is_err());
    }

    #[test]
    fn reach_is_32_bits() {
        let far = Layout { offset: 0, token_stride: u32::MAX, head_stride: 7 };
        assert!(far.check_reach("q", SHAPE).is_err());
    }
}
