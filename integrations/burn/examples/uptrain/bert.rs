//! MiniLM, a BERT of six layers, in Burn: attention by gqa, forward and back.

use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::tensor::activation::gelu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use gqa_burn::gqa::uptrain::{HeadShape, Pooling, pool_heads};
use gqa_burn::{AttentionSpec, Dtype, GqaAttention, WgpuSetup};
use safetensors::SafeTensors;

use crate::Result;

/// Numbers of `config.json`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) width: usize,
    pub(crate) epsilon: f64,
}

/// The checkpoint as it is on disk, all in f32.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) config: Config,
    bytes: Vec<u8>,
}

/// Word, position and type embeddings, which stay as they are: they have no heads.
#[derive(Debug)]
pub(crate) struct Embeddings {
    words: Tensor<2>,
    positions: Tensor<2>,
    norm: LayerNorm,
}

/// All that is trained.
#[derive(Module, Debug)]
pub(crate) struct Encoder {
    layers: Vec<Layer>,
}

#[derive(Module, Debug)]
struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

impl Config {
    pub(crate) fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// What attention is asked for, with so many K/V heads.
    pub(crate) fn spec(&self, kv_heads: usize) -> Result<AttentionSpec> {
        let builder = AttentionSpec::builder(self.heads as u32, kv_heads as u32, self.head_dim() as u32);
        Ok(builder.causal(false).kv_dtype(Dtype::F32).build()?)
    }

    /// Its kernels.
    pub(crate) fn attention(&self, kv_heads: usize, setup: &WgpuSetup) -> Result<Arc<GqaAttention>> {
        Ok(Arc::new(GqaAttention::new(setup, self.spec(kv_heads)?)?))
    }
}

impl Checkpoint {
    /// Reads `config.json` and `model.safetensors`.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path)
                .map_err(|e| format!("{}: {e}; `cargo xtask uptrain` fetches the model", path.display()))
        };
        let json: serde_json::Value = serde_json::from_slice(&read("config.json")?)?;
        let number = |name: &str| json[name].as_f64().ok_or_else(|| format!("config.json has no {name}"));
        let config = Config {
            layers: number("num_hidden_layers")? as usize,
            heads: number("num_attention_heads")? as usize,
            width: number("hidden_size")? as usize,
            epsilon: number("layer_norm_eps")?,
        };
        if config.heads == 0 || config.layers == 0 || !config.width.is_multiple_of(config.heads) {
            return Err(format!("there must be layers, and heads must divide hidden_size: {config:?}").into());
        }
        Ok(Self { config, bytes: read("model.safetensors")? })
    }

    /// The embeddings.
    pub(crate) fn embeddings(&self, device: &Device) -> Result<Embeddings> {
        let table = |name: &str| self.matrix(&format!("embeddings.{name}_embeddings.weight"), device);
        // All text is of the first type.
        let types = table("token_type")?.narrow(0, 0, 1);
        let norm = self.norm("embeddings.LayerNorm", device)?;
        Ok(Embeddings { words: table("word")?, positions: table("position")? + types, norm })
    }

    /// The encoder; with K/V heads pooled to `kv_heads`, where that is fewer.
    pub(crate) fn encoder(&self, kv_heads: usize, pooling: Pooling, device: &Device) -> Result<Encoder> {
        let layer = |nth: usize| -> Result<Layer> {
            let name = |part: &str| format!("encoder.layer.{nth}.{part}");
            let linear = |part: &str| self.linear(&name(part), None, device);
            let pooled = |part: &str| {
                let name = name(part);
                // Other numbers for each tensor.
                let nth = name.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
                let pooling = match pooling {
                    Pooling::Random { seed } => Pooling::Random { seed: seed ^ nth },
                    other => other,
                };
                self.linear(&name, Some((kv_heads, pooling)), device)
            };
            Ok(Layer {
                q: linear("attention.self.query")?,
                k: pooled("attention.self.key")?,
                v: pooled("attention.self.value")?,
                out: linear("attention.output.dense")?,
                attention_norm: self.norm(&name("attention.output.LayerNorm"), device)?,
                up: linear("intermediate.dense")?,
                down: linear("output.dense")?,
                norm: self.norm(&name("output.LayerNorm"), device)?,
            })
        };
        Ok(Encoder { layers: (0..self.config.layers).map(layer).collect::<Result<_>>()? })
    }

    fn numbers(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let tensors = SafeTensors::deserialize(&self.bytes)?;
        let tensor = tensors.tensor(name)?;
        if tensor.dtype() != safetensors::Dtype::F32 {
            return Err(format!("{name} is {:?}, not F32", tensor.dtype()).into());
        }
        Ok((tensor.shape().to_vec(), bytemuck::pod_collect_to_vec(tensor.data())))
    }

    fn matrix(&self, name: &str, device: &Device) -> Result<Tensor<2>> {
        let (shape, numbers) = self.numbers(name)?;
        let [rows, columns] = shape[..] else { return Err(format!("{name} is no matrix").into()) };
        Ok(Tensor::from_data(TensorData::new(numbers, [rows, columns]), device))
    }

    fn vector(&self, name: &str, device: &Device) -> Result<Tensor<1>> {
        let (_, numbers) = self.numbers(name)?;
        let len = numbers.len();
        Ok(Tensor::from_data(TensorData::new(numbers, [len]), device))
    }

    fn norm(&self, name: &str, device: &Device) -> Result<LayerNorm> {
        let config = LayerNormConfig::new(self.config.width).with_epsilon(self.config.epsilon);
        let mut norm = config.init(device);
        norm.gamma = Param::from_tensor(self.vector(&format!("{name}.weight"), device)?);
        norm.beta = Some(Param::from_tensor(self.vector(&format!("{name}.bias"), device)?));
        Ok(norm)
    }

    /// `weight` is `[outputs, inputs]` on disk and the transpose in Burn. Outputs are heads where they are pooled.
    fn linear(&self, name: &str, pool: Option<(usize, Pooling)>, device: &Device) -> Result<Linear> {
        let (shape, weight) = self.numbers(&format!("{name}.weight"))?;
        let (_, bias) = self.numbers(&format!("{name}.bias"))?;
        let [outputs, inputs] = shape[..] else { return Err(format!("{name} is no matrix").into()) };
        let (heads, head_dim) = (self.config.heads, self.config.head_dim());
        let (weight, bias, outputs) = match pool {
            Some((kv_heads, pooling)) if kv_heads < heads => {
                let pool = |numbers: &[f32], columns| {
                    pool_heads(numbers, HeadShape { heads, head_dim, columns }, kv_heads, pooling)
                };
                (pool(&weight, inputs)?, pool(&bias, 1)?, kv_heads * head_dim)
            }
            _ => (weight, bias, outputs),
        };
        let weight: Tensor<2> = Tensor::from_data(TensorData::new(weight, [outputs, inputs]), device);
        let bias: Tensor<1> = Tensor::from_data(TensorData::new(bias, [outputs]), device);
        // A parameter of its own memory, dense in Burn's order.
        let weight = weight.transpose() + 0.0;
        Ok(Linear { weight: Param::from_tensor(weight), bias: Some(Param::from_tensor(bias)) })
    }
}

impl Embeddings {
    /// `[tokens, width]` of texts that lie one behind the other.
    pub(crate) fn forward(&self, texts: &[Vec<u32>], device: &Device) -> Tensor<2> {
        let select = |table: &Tensor<2>, ids: Vec<i32>| {
            let len = ids.len();
            let ids: Tensor<1, Int> = Tensor::from_data(TensorData::new(ids, [len]), device);
            table.clone().select(0, ids)
        };
        let words = texts.iter().flatten().map(|id| *id as i32).collect();
        let positions = texts.iter().flat_map(|text| 0..text.len() as i32).collect();
        self.norm.forward(select(&self.words, words) + select(&self.positions, positions))
    }
}

impl Encoder {
    /// Hidden states `[tokens, width]` behind each layer. Texts of `lengths` tokens do not see each other: nothing is padded.
    pub(crate) fn forward(
        &self,
        attention: &Arc<GqaAttention>,
        mut x: Tensor<2>,
        lengths: &[u32],
    ) -> Result<Vec<Tensor<2>>> {
        let spec = attention.spec();
        let (heads, kv_heads, dim) = (spec.q_heads(), spec.kv_heads(), spec.head_dim() as usize);
        let tokens = x.dims()[0];
        let mut pass = attention.train(lengths, self.layers.len() as u32)?;
        let mut hidden = Vec::new();
        for (nth, layer) in self.layers.iter().enumerate() {
            let split = |linear: &Linear, heads: u32| {
                linear.forward(x.clone()).reshape([tokens, heads as usize, dim])
            };
            let qkv = [split(&layer.q, heads), split(&layer.k, kv_heads), split(&layer.v, kv_heads)];
            let attended = pass.forward(nth as u32, qkv)?.reshape([tokens, heads as usize * dim]);
            x = layer.attention_norm.forward(x + layer.out.forward(attended));
            let fed = layer.down.forward(gelu(layer.up.forward(x.clone())));
            x = layer.norm.forward(x + fed);
            hidden.push(x.clone());
        }
        Ok(hidden)
    }
}

/// Means of each text's rows, of length 1.
pub(crate) fn pooled(hidden: Tensor<2>, lengths: &[u32]) -> Tensor<2> {
    let tokens = hidden.dims()[0];
    let mut weights = vec![0f32; lengths.len() * tokens];
    let mut first = 0;
    for (text, len) in lengths.iter().map(|len| *len as usize).enumerate() {
        weights[text * tokens + first..][..len].fill(1.0 / len as f32);
        first += len;
    }
    let weights: Tensor<2> =
        Tensor::from_data(TensorData::new(weights, [lengths.len(), tokens]), &hidden.device());
    let means = weights.matmul(hidden);
    let length = means.clone().square().sum_dim(1).sqrt();
    means / length
}
