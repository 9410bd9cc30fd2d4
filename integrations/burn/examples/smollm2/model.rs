//! A decoder of the Llama family in Burn, with attention and KV cache by gqa.

use burn::tensor::activation::silu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use gqa_burn::{AttentionSpec, Dtype, GqaAttention, KvCache, Sequence, WgpuSetup};

use crate::weights::{Config, Gguf, Result};

/// Weights on the device, and the attention that all layers share.
pub(crate) struct Model {
    /// The numbers.
    pub(crate) config: Config,
    /// What attention is asked for.
    pub(crate) spec: AttentionSpec,
    attention: GqaAttention,
    device: Device,
    embedding: Tensor<2>,
    /// The embedding again, where the file has no other.
    output: Tensor<2>,
    norm: Tensor<2>,
    layers: Vec<Layer>,
}

/// Matrices lie as `[inputs, outputs]` for Burn, by strides: in memory each output's numbers are neighbours.
#[derive(Clone)]
struct Layer {
    attention_norm: Tensor<2>,
    /// Queries, keys and values in one product.
    qkv: Tensor<2>,
    attention_output: Tensor<2>,
    feed_forward_norm: Tensor<2>,
    /// Gate and up in one product.
    gate_up: Tensor<2>,
    down: Tensor<2>,
}

impl Model {
    /// Reads all weights, telling `progress` the number of each layer that is done.
    pub(crate) fn load(
        gguf: &mut Gguf,
        (kv_dtype, rotated): (Dtype, bool),
        (device, setup): (&Device, &WgpuSetup),
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        let config = gguf.config()?;
        let Config { layers, width, heads, kv_heads, head_dim, feed_forward, vocabulary, .. } = config;
        let spec = AttentionSpec::builder(heads as u32, kv_heads as u32, head_dim as u32)
            .kv_dtype(kv_dtype)
            .rotated(rotated)
            .rope(config.rope.clone())
            .build()?;
        let attention = GqaAttention::new(setup, spec.clone())?;
        let row = |name: &str| [(name.to_owned(), 1)];
        let embedding = gguf.matrix(&[("token_embd.weight".to_owned(), vocabulary)], width, device)?;
        let output = match gguf.has("output.weight") {
            true => gguf.matrix(&[("output.weight".to_owned(), vocabulary)], width, device)?,
            false => embedding.clone(),
        };
        let mut model = Self {
            norm: gguf.matrix(&row("output_norm.weight"), width, device)?,
            layers: Vec::new(),
            embedding,
            output: output.transpose(),
            config,
            spec,
            attention,
            device: device.clone(),
        };
        for nth in 0..layers {
            let name = |part: &str| format!("blk.{nth}.{part}.weight");
            let qkv = [("attn_q", heads), ("attn_k", kv_heads), ("attn_v", kv_heads)];
            let qkv = qkv.map(|(part, heads)| (name(part), heads * head_dim));
            let gate_up = ["ffn_gate", "ffn_up"].map(|part| (name(part), feed_forward));
            model.layers.push(Layer {
                attention_norm: gguf.matrix(&row(&name("attn_norm")), width, device)?,
                qkv: gguf.matrix(&qkv, width, device)?.transpose(),
                attention_output: gguf
                    .matrix(&[(name("attn_output"), width)], heads * head_dim, device)?
                    .transpose(),
                feed_forward_norm: gguf.matrix(&row(&name("ffn_norm")), width, device)?,
                gate_up: gguf.matrix(&gate_up, width, device)?.transpose(),
                down: gguf.matrix(&[(name("ffn_down"), width)], feed_forward, device)?.transpose(),
            });
            progress(nth + 1, layers);
        }
        Ok(model)
    }

    /// The same weights, with another attention.
    pub(crate) fn attending(&self, spec: AttentionSpec, setup: &WgpuSetup) -> Result<Self> {
        Ok(Self {
            config: self.config.clone(),
            attention: GqaAttention::new(setup, spec.clone())?,
            spec,
            device: self.device.clone(),
            embedding: self.embedding.clone(),
            output: self.output.clone(),
            norm: self.norm.clone(),
            layers: self.layers.clone(),
        })
    }

    /// Runs the new `tokens` of all `sequences`, one behind the other, and returns logits `[rows, vocabulary]` of the tokens numbered
    /// in `rows`.
    pub(crate) fn forward(
        &self,
        cache: &mut KvCache,
        sequences: &[Sequence<'_>],
        tokens: &[u32],
        rows: &[usize],
    ) -> Result<Tensor<2>> {
        let (count, vocabulary) = (tokens.len(), self.config.vocabulary);
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocabulary) {
            return Err(format!("token {id} is not in the vocabulary of {vocabulary}").into());
        }
        let Config { heads, kv_heads, head_dim, feed_forward, .. } = self.config;
        let mut step = self.attention.begin(cache, sequences)?;
        let mut x = self.embedding.clone().select(0, self.indices(tokens.iter().map(|id| *id as i32)));
        for (nth, layer) in self.layers.iter().enumerate() {
            let normed = self.rms_norm(x.clone(), &layer.attention_norm);
            let qkv = normed.matmul(layer.qkv.clone()).reshape([count, heads + 2 * kv_heads, head_dim]);
            let part = |first, heads| qkv.clone().narrow(1, first, heads);
            let (k, v) = (part(heads, kv_heads), part(heads + kv_heads, kv_heads));
            let attended = self.attention.forward(cache, &mut step, nth as u32, [part(0, heads), k, v])?;
            x = x + attended.reshape([count, heads * head_dim]).matmul(layer.attention_output.clone());
            let normed = self.rms_norm(x.clone(), &layer.feed_forward_norm);
            let gate_up = normed.matmul(layer.gate_up.clone());
            let (gate, up) =
                (gate_up.clone().narrow(1, 0, feed_forward), gate_up.narrow(1, feed_forward, feed_forward));
            x = x + (silu(gate) * up).matmul(layer.down.clone());
        }
        // Most of a prefill's rows need no logits, and the vocabulary is the widest matrix.
        let x = x.select(0, self.indices(rows.iter().map(|row| *row as i32)));
        Ok(self.rms_norm(x, &self.norm).matmul(self.output.clone()))
    }

    /// Attention of one step alone, over all layers, for queries of the last token of each sequence: for timing.
    pub(crate) fn attend(&self, cache: &mut KvCache, sequences: &[Sequence<'_>]) -> Result<Tensor<3>> {
        let Config { heads, kv_heads, head_dim, layers, .. } = self.config;
        let mut step = self.attention.begin(cache, sequences)?;
        let q = Tensor::zeros([sequences.len(), heads, head_dim], &self.device);
        // Nothing is appended, and no tensor is empty.
        let none: Tensor<3> = Tensor::zeros([1, kv_heads, head_dim], &self.device);
        let none = none.slice([0..0, 0..kv_heads, 0..head_dim]);
        let mut out = q.clone();
        for layer in 0..layers {
            out = self.attention.forward(
                cache,
                &mut step,
                layer as u32,
                [q.clone(), none.clone(), none.clone()],
            )?;
        }
        Ok(out)
    }

    fn rms_norm(&self, x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
        let mean = x.clone().powi_scalar(2).mean_dim(1);
        x * (mean + self.config.epsilon).sqrt().recip() * weight.clone()
    }

    fn indices(&self, ids: impl Iterator<Item = i32>) -> Tensor<1, Int> {
        let ids: Vec<i32> = ids.collect();
        let len = ids.len();
        Tensor::from_data(TensorData::new(ids, [len]), &self.device)
    }
}
