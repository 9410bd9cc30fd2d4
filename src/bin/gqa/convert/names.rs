//! Which tensor is what, in which architecture.

/// Architectures whose tensors share their names and meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// `self_attn.k_proj` and `self_attn.v_proj`.
    Llama,
    /// `self_attn.qkv_proj`: all query heads, then all key heads, then all value heads.
    Phi3,
    /// `attention.query_key_value`: for each KV head the queries of its group, its key, its value.
    GptNeox,
    /// `attention.self.key` and `attention.self.value`.
    Bert,
}

/// The values of `model_type` and what they are.
const TYPES: [(&str, Family); 13] = [
    ("llama", Family::Llama),
    ("mistral", Family::Llama),
    ("mixtral", Family::Llama),
    ("qwen2", Family::Llama),
    ("qwen2_moe", Family::Llama),
    ("qwen3", Family::Llama),
    ("qwen3_moe", Family::Llama),
    ("gemma", Family::Llama),
    ("gemma2", Family::Llama),
    ("gemma3_text", Family::Llama),
    ("phi3", Family::Phi3),
    ("gpt_neox", Family::GptNeox),
    ("bert", Family::Bert),
];

/// What a projection makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Makes {
    Key,
    Value,
    /// Queries, keys and values.
    All,
}

/// Weights or biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Leaf {
    Weight,
    Bias,
}

/// A tensor that has KV heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    pub(super) layer: usize,
    pub(super) makes: Makes,
    pub(super) leaf: Leaf,
}

/// A block of `head_dim` rows of the new tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    /// A head of the old tensor.
    Copy(usize),
    /// Head `head` of pool `pool`.
    Pooled { pool: usize, head: usize },
}

/// How a tensor's heads become those of the new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Heads {
    /// Heads of the old tensor.
    pub(super) count: usize,
    /// Old heads that are pooled together: those of the keys, of the values, or of one after the other.
    pub(super) pools: Vec<Vec<usize>>,
    /// The new tensor.
    pub(super) blocks: Vec<Block>,
}

impl Family {
    pub(super) fn of(model_type: &str) -> Result<Self, String> {
        match TYPES.iter().find(|(name, _)| *name == model_type) {
            Some((_, family)) => Ok(*family),
            None => {
                let known: Vec<_> = TYPES.iter().map(|(name, _)| *name).collect();
                Err(format!("`model_type` {model_type:?} is not known; known are {}", known.join(", ")))
            }
        }
    }

    /// What may stand before the layers, as the model with a head has it, and what they are called.
    fn layers(self) -> (&'static str, &'static str) {
        match self {
            Self::Llama | Self::Phi3 => ("model.", "layers."),
            Self::GptNeox => ("gpt_neox.", "layers."),
            Self::Bert => ("bert.", "encoder.layer."),
        }
    }

    fn modules(self) -> &'static [(&'static str, Makes)] {
        match self {
            Self::Llama => &[("self_attn.k_proj", Makes::Key), ("self_attn.v_proj", Makes::Value)],
            Self::Phi3 => &[("self_attn.qkv_proj", Makes::All)],
            Self::GptNeox => &[("attention.query_key_value", Makes::All)],
            Self::Bert => &[("attention.self.key", Makes::Key), ("attention.self.value", Makes::Value)],
        }
    }

    /// The tensors that every layer has: names without what may stand before them.
    pub(super) fn required(self, layer: usize) -> impl Iterator<Item = (Target, String)> {
        let (_, layers) = self.layers();
        self.modules().iter().map(move |(module, makes)| {
            (Target { layer, makes: *makes, leaf: Leaf::Weight }, format!("{layers}{layer}.{module}.weight"))
        })
    }

    /// What a tensor of this name is, if it has KV heads.
    ///
    /// # Errors
    /// Says what is wrong with something that belongs to such a projection and is neither weight nor bias, or has heads that are not pooled.
    pub(super) fn target(self, name: &str) -> Result<Option<Target>, String> {
        let (prefix, layers) = self.layers();
        let layer = name.strip_prefix(prefix).unwrap_or(name).strip_prefix(layers);
        let Some((layer, rest)) = layer.and_then(|rest| rest.split_once('.')) else { return Ok(None) };
        if matches!(self, Self::Bert) && rest.starts_with("crossattention.") {
            return Err("belongs to cross-attention, whose heads are not pooled".to_owned());
        }
        let part =
            |(module, makes): &(&str, Makes)| Some((*makes, rest.strip_prefix(*module)?.strip_prefix('.')?));
        let Some((makes, leaf)) = self.modules().iter().find_map(part) else { return Ok(None) };
        let Ok(layer) = layer.parse() else { return Err(format!("{layer:?} is no number of a layer")) };
        let leaf = match leaf {
            "weight" => Leaf::Weight,
            "bias" => Leaf::Bias,
            other => {
                return Err(format!(
                    "has `{other}`, neither weight nor bias: quantised checkpoints and adapters cannot be pooled"
                ));
            }
        };
        Ok(Some(Target { layer, makes, leaf }))
    }

    /// Heads of a projection, of `q_heads` and `kv_heads`.
    pub(super) fn count(self, makes: Makes, [q_heads, kv_heads]: [usize; 2]) -> usize {
        if makes == Makes::All { q_heads + 2 * kv_heads } else { kv_heads }
    }

    /// How the heads of a projection change, from `old` to `new` KV heads.
    pub(super) fn heads(self, makes: Makes, q_heads: usize, [old, new]: [usize; 2]) -> Heads {
        let count = self.count(makes, [q_heads, old]);
        let pooled = |pool| (0..new).map(move |head| Block::Pooled { pool, head });
        if makes != Makes::All {
            return Heads { count, pools: vec![(0..old).collect()], blocks: pooled(0).collect() };
        }
        if self == Self::Phi3 {
            let keys = q_heads..q_heads + old;
            let values = q_heads + old..q_heads + 2 * old;
            let blocks = (0..q_heads).map(Block::Copy).chain(pooled(0)).chain(pooled(1)).collect();
            return Heads { count, pools: vec![keys.collect(), values.collect()], blocks };
        }
        // A KV head and the queries of its group lie together, and so they do afterwards.
        let (group, more) = (q_heads / old, old / new);
        let first = |kv: usize| kv * (group + 2);
        let keys = (0..old).map(|kv| first(kv) + group).collect();
        let values = (0..old).map(|kv| first(kv) + group + 1).collect();
        let block = |head: usize| {
            let queries = (head * more..(head + 1) * more).flat_map(move |kv| first(kv)..first(kv) + group);
            let pooled = [0, 1].map(|pool| Block::Pooled { pool, head });
            queries.map(Block::Copy).chain(pooled)
        };
        Heads { count, pools: vec![keys, values], blocks: (0..new).flat_map(block).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_family() {
        let target = |layer, makes, leaf| Ok(Some(Target { layer, makes, leaf }));
        let (key, value, all) = (Makes::Key, Makes::Value, Makes::All);
        for (family, name, expected) in [
            (Family::Llama, "model.layers.3.self_attn.k_proj.weight", target(3, key, Leaf::Weight)),
            (Family::Llama, "layers.31.self_attn.v_proj.bias", target(31, value, Leaf::Bias)),
            (Family::Llama, "model.layers.3.self_attn.q_proj.weight", Ok(None)),
            (Family::Llama, "model.layers.3.self_attn.k_norm.weight", Ok(None)),
            (Family::Llama, "model.embed_tokens.weight", Ok(None)),
            (Family::Phi3, "model.layers.0.self_attn.qkv_proj.weight", target(0, all, Leaf::Weight)),
            (Family::GptNeox, "gpt_neox.layers.5.attention.query_key_value.bias", target(5, all, Leaf::Bias)),
            (Family::GptNeox, "gpt_neox.layers.5.attention.bias", Ok(None)),
            (Family::Bert, "bert.encoder.layer.7.attention.self.key.bias", target(7, key, Leaf::Bias)),
            (Family::Bert, "encoder.layer.7.attention.self.value.weight", target(7, value, Leaf::Weight)),
            (Family::Bert, "encoder.layer.7.attention.self.query.weight", Ok(None)),
        ] {
            assert_eq!(family.target(name), expected, "{name}");
        }
        let packed = Family::Llama.target("model.layers.3.self_attn.k_proj.qweight");
        assert!(packed.unwrap_err().contains("`qweight`"));
        assert!(Family::Llama.target("model.layers.x.self_attn.k_proj.weight").is_err());
        let cross = Family::Bert.target("bert.encoder.layer.7.crossattention.self.key.weight");
        assert!(cross.unwrap_err().contains("cross-attention"));
    }

    #[test]
    fn fused_heads_of_gpt_neox_stay_with_their_group() {
        let copy = Block::Copy;
        let pooled = |pool, head| Block::Pooled { pool, head };
        // Four heads of q, k, v to two, and those two to one.
        let heads = Family::GptNeox.heads(Makes::All, 4, [4, 2]);
        assert_eq!(heads.count, 12);
        assert_eq!(heads.pools, [[1, 4, 7, 10], [2, 5, 8, 11]]);
        let first = [copy(0), copy(3), pooled(0, 0), pooled(1, 0)];
        assert_eq!(heads.blocks, [first, [copy(6), copy(9), pooled(0, 1), pooled(1, 1)]].concat());
        let heads = Family::GptNeox.heads(Makes::All, 4, [2, 1]);
        assert_eq!(heads.pools, [[2, 6], [3, 7]]);
        let queries = [copy(0), copy(1), copy(4), copy(5)];
        assert_eq!(heads.blocks, [&queries[..], &[pooled(0, 0), pooled(1, 0)]].concat());
    }
}
