//! A model of the Llama family from a GGUF file: its numbers, and its weights as Burn tensors of f32.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use candle_core::quantized::gguf_file::{Content, Value};
use gqa_burn::gqa::{Pairing, Rope, Scaling};

/// Errors of the example are texts for people.
pub(crate) type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// An open GGUF file.
pub(crate) struct Gguf {
    content: Content,
    file: BufReader<File>,
}

/// The numbers of a model.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Layers.
    pub(crate) layers: usize,
    /// Elements of a token.
    pub(crate) width: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// K/V heads.
    pub(crate) kv_heads: usize,
    /// Elements of a head.
    pub(crate) head_dim: usize,
    /// Elements between the matrices of a feed-forward block.
    pub(crate) feed_forward: usize,
    /// Tokens of the vocabulary.
    pub(crate) vocabulary: usize,
    /// Tokens that the model was trained for.
    pub(crate) context: usize,
    /// Added to the mean square before its root.
    pub(crate) epsilon: f64,
    /// Positions.
    pub(crate) rope: Rope,
}

impl Gguf {
    /// Opens a file and reads its header.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let hint = "fetch SmolLM2 with `cargo xtask model`, or give the path of another GGUF file of the Llama family";
        let file = File::open(path).map_err(|error| format!("{}: {error}; {hint}", path.display()))?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file)
            .map_err(|error| format!("{}: not a GGUF file that can be read: {error}", path.display()))?;
        Ok(Self { content, file })
    }

    /// An entry of the header.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A text of the header.
    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        let value = self.value(key).ok_or_else(|| format!("the file lacks '{key}'"))?;
        Ok(value.to_string().map(String::as_str).map_err(|error| format!("'{key}': {error}"))?)
    }

    /// A number of the header, whatever its width.
    pub(crate) fn number(&self, key: &str) -> Result<f64> {
        let value = self.value(key).ok_or_else(|| format!("the file lacks '{key}'"))?;
        let integer = value.to_u64().map(|n| n as f64).or_else(|_| value.to_i64().map(|n| n as f64));
        let number = integer.or_else(|_| value.to_f32().map(f64::from)).or_else(|_| value.to_f64());
        Ok(number.map_err(|_| format!("'{key}' is not a number but {value:?}"))?)
    }

    /// The numbers of the model; an error where it is not one of the Llama family.
    pub(crate) fn config(&mut self) -> Result<Config> {
        let architecture = self.text("general.architecture")?.to_owned();
        if architecture != "llama" {
            let needed =
                "this example runs 'llama' (Llama, SmolLM2, Mistral and others stored under that name)";
            return Err(format!("the architecture is '{architecture}': {needed}").into());
        }
        let of = |key: &str| self.number(&format!("llama.{key}"));
        let (width, heads) = (of("embedding_length")? as usize, of("attention.head_count")? as usize);
        let head_dim = of("attention.key_length").map_or(width / heads.max(1), |n| n as usize);
        if self.content.tensor_infos.keys().any(|name| name.contains("_exps.")) {
            return Err("the model is a mixture of experts, which this example does not run".into());
        }
        let vocabulary = *self
            .tensor_shape("token_embd.weight")?
            .first()
            .ok_or("tensor 'token_embd.weight' is one number")?;
        if let Some(name) = self.content.tensor_infos.keys().find(|name| name.ends_with(".bias")) {
            return Err(format!("the model has biases ('{name}'), which this example does not add").into());
        }
        let config = Config {
            layers: of("block_count")? as usize,
            width,
            heads,
            kv_heads: match self.value("llama.attention.head_count_kv") {
                Some(_) => of("attention.head_count_kv")? as usize,
                None => heads,
            },
            head_dim,
            feed_forward: of("feed_forward_length")? as usize,
            vocabulary,
            context: of("context_length")? as usize,
            epsilon: of("attention.layer_norm_rms_epsilon")?,
            rope: Rope::new(2),
        };
        let Config { layers, width, kv_heads, head_dim, feed_forward, context, .. } = config;
        let numbers = [layers, width, heads, kv_heads, head_dim, feed_forward, vocabulary, context];
        // So that no product of two of them leaves 64 bits.
        if let Some(number) = numbers.iter().find(|number| !(1..1 << 24).contains(*number)) {
            return Err(format!("a size of the model is {number}: the file is damaged").into());
        }
        Ok(Config { rope: self.rope(head_dim)?, ..config })
    }

    /// llama.cpp permutes the rows of q and k, so that pairs lie side by side.
    fn rope(&mut self, head_dim: usize) -> Result<Rope> {
        let dim = self.number("llama.rope.dimension_count").map_or(head_dim, |n| n as usize);
        let mut rope = Rope::new(dim as u32);
        rope.pairing = Pairing::Interleaved;
        rope.theta = self.number("llama.rope.freq_base").unwrap_or(10_000.0);
        match self.text("llama.rope.scaling.type") {
            Err(_) | Ok("none") => {}
            Ok("linear") => {
                rope.scaling = Scaling::Linear { factor: self.number("llama.rope.scaling.factor")? };
            }
            Ok(other) => {
                return Err(format!("RoPE scaling '{other}' is not one that this example knows").into());
            }
        }
        // Llama 3.1 and later: a divisor for each frequency, which is LongRoPE without more.
        if self.has("rope_freqs.weight") && rope.scaling == Scaling::None {
            let factors: Vec<_> =
                self.numbers("rope_freqs.weight", dim / 2)?.into_iter().map(f64::from).collect();
            rope.scaling = Scaling::LongRope {
                short: factors.clone(),
                long: factors,
                original_context: 2,
                context: 2,
                attention_factor: Some(1.0),
            };
        }
        Ok(rope)
    }

    fn tensor_shape(&self, name: &str) -> Result<Vec<usize>> {
        let info =
            self.content.tensor_infos.get(name).ok_or_else(|| format!("the file lacks tensor '{name}'"))?;
        Ok(info.shape.dims().to_vec())
    }

    /// Whether the file has a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// A tensor's numbers, dequantised, which must be `len`.
    pub(crate) fn numbers(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let cpu = candle_core::Device::Cpu;
        let shape = self.tensor_shape(name)?;
        if shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n)) != Some(len) {
            return Err(format!("tensor '{name}' is {shape:?}, which should be {len} numbers").into());
        }
        let tensor = self.content.tensor(&mut self.file, name, &cpu)?;
        Ok(tensor.dequantize(&cpu)?.flatten_all()?.to_vec1()?)
    }

    /// Matrices of `width` columns, one below the other.
    pub(crate) fn matrix(
        &mut self,
        names: &[(String, usize)],
        width: usize,
        device: &Device,
    ) -> Result<Tensor<2>> {
        let mut numbers = Vec::new();
        let mut rows = 0;
        for (name, height) in names {
            numbers.extend(self.numbers(name, height * width)?);
            rows += height;
        }
        Ok(Tensor::from_data(TensorData::new(numbers, [rows, width]), device))
    }
}
