//! What a layer has learned about its heads: sinks, and weights of the norm of queries and keys.

use crate::error::Error;
use crate::shader::TableLayout;
use crate::spec::AttentionSpec;

/// Learned numbers of one layer, for [`Attention::set_weights`](crate::Attention::set_weights); empty where the spec has none.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerWeights<'a> {
    /// A logit for each query head that takes part in the softmax and has no value (gpt-oss).
    pub sinks: &'a [f32],
    /// What the elements of a normalised query are multiplied by, the same for every head. A model that stores them less 1
    /// (Gemma) adds it before.
    pub q_norm: &'a [f32],
    /// The same of a key.
    pub k_norm: &'a [f32],
}

impl LayerWeights<'_> {
    /// Checks lengths and numbers.
    ///
    /// # Errors
    /// [`Error::Field`].
    pub(crate) fn check(&self, spec: &AttentionSpec) -> Result<(), Error> {
        let norm = if spec.qk_norm().is_some() { spec.head_dim() } else { 0 };
        let sinks = if spec.sinks() { spec.q_heads() } else { 0 };
        let fields = [
            ("weights.sinks", self.sinks, sinks),
            ("weights.q_norm", self.q_norm, norm),
            ("weights.k_norm", self.k_norm, norm),
        ];
        for (field, numbers, needed) in fields {
            if numbers.len() != needed as usize {
                let needed = format!("this spec needs {needed}");
                return Err(Error::field(field, format!("{} numbers", numbers.len()), needed));
            }
            if let Some(x) = numbers.iter().find(|x| !(-1e30..=1e30).contains(*x)) {
                return Err(Error::field(field, x, "it must be a number of at most 1e30 in magnitude"));
            }
        }
        Ok(())
    }

    /// Words of the layer's table.
    pub(crate) fn table(&self, spec: &AttentionSpec) -> Vec<u32> {
        let layout = TableLayout::of(spec);
        let mut words = vec![0; layout.words as usize];
        let mut write = |at: u32, numbers: &mut dyn Iterator<Item = u32>| {
            for (word, number) in words[at as usize..].iter_mut().zip(numbers) {
                *word = number;
            }
        };
        let base_2 = |x: &f32| (f64::from(*x) * std::f64::consts::LOG2_E) as f32;
        write(layout.sinks, &mut self.sinks.iter().map(|x| base_2(x).to_bits()));
        write(layout.slopes, &mut spec.alibi().unwrap_or_default().iter().map(|x| base_2(x).to_bits()));
        write(layout.q_norm, &mut self.q_norm.iter().map(|x| x.to_bits()));
        write(layout.k_norm, &mut self.k_norm.iter().map(|x| x.to_bits()));
        write(layout.turns, &mut spec.rope().map(|r| r.turns()).unwrap_or_default().into_iter().flatten());
        words
    }
}
