//! `config.json`: what the model is, and the same with fewer KV heads.

use std::path::Path;

use serde_json::{Map, Value};

use super::names::Family;
use super::{bad, read_text};
use crate::Failure;

const KV_HEADS: &str = "num_key_value_heads";

/// What the conversion needs to know of a model. No number is 0.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Config {
    json: Map<String, Value>,
    pub(super) family: Family,
    pub(super) layers: usize,
    pub(super) q_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) hidden: usize,
}

impl Config {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let text = read_text(path)?;
        let json = serde_json::from_str(&text).map_err(|e| bad(format!("{}: {e}", path.display())))?;
        Self::of(json).map_err(|why| bad(format!("{}: {why}", path.display())))
    }

    fn of(json: Map<String, Value>) -> Result<Self, String> {
        let family = match json.get("model_type") {
            Some(Value::String(name)) => Family::of(name)?,
            Some(other) => return Err(format!("`model_type` is {other}, but it must be a string")),
            None => return Err("`model_type` is missing".to_owned()),
        };
        let needed = |key| number(&json, key)?.ok_or_else(|| format!("`{key}` is missing"));
        let layers = needed("num_hidden_layers")?;
        let q_heads = needed("num_attention_heads")?;
        let hidden = needed("hidden_size")?;
        let kv_heads = number(&json, KV_HEADS)?.unwrap_or(q_heads);
        if !q_heads.is_multiple_of(kv_heads) {
            return Err(format!("{kv_heads} KV heads do not divide {q_heads} attention heads"));
        }
        let head_dim = match number(&json, "head_dim")? {
            Some(dim) => dim,
            None if hidden.is_multiple_of(q_heads) => hidden / q_heads,
            None => return Err(format!("{q_heads} heads do not divide the hidden size {hidden}")),
        };
        // No later product of these can overflow: a fused projection has at most q, k and v of as many heads.
        if q_heads.checked_mul(3).and_then(|n| n.checked_mul(head_dim)?.checked_mul(hidden)).is_none() {
            return Err(format!(
                "{q_heads} heads of {head_dim} and a hidden size of {hidden} are beyond all memory"
            ));
        }
        Ok(Self { json, family, layers, q_heads, kv_heads, head_dim, hidden })
    }

    /// Whether this model can have `kv_heads` KV heads instead of its own.
    pub(super) fn check(&self, kv_heads: usize) -> Result<(), Failure> {
        let have = self.kv_heads;
        if kv_heads == have {
            return Err(bad(format!("the model has {have} KV heads already: nothing to do")));
        }
        if kv_heads > have {
            let why = "heads can only be pooled, not made";
            return Err(bad(format!(
                "the model has {have} KV heads, fewer than --kv-heads {kv_heads}: {why}"
            )));
        }
        if kv_heads == 0 || !have.is_multiple_of(kv_heads) {
            return Err(bad(format!(
                "--kv-heads is {kv_heads}, but it must divide the model's {have} KV heads"
            )));
        }
        Ok(())
    }

    /// The file's text with another number of KV heads; all other fields stay, in their order.
    pub(super) fn rewritten(&self, kv_heads: usize) -> String {
        let mut json = self.json.clone();
        json.insert(KV_HEADS.to_owned(), kv_heads.into());
        format!("{:#}\n", Value::Object(json))
    }

    /// Bytes that a token takes in a cache of f16, all layers together.
    pub(super) fn cache_bytes(&self, kv_heads: usize) -> u128 {
        [self.layers, kv_heads, self.head_dim, 2 * 2].iter().map(|n| *n as u128).product()
    }
}

/// A whole number of at least 1; `null` is as good as absent.
fn number(json: &Map<String, Value>, key: &str) -> Result<Option<usize>, String> {
    match json.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if n > 0 => Ok(Some(n)),
            _ => Err(format!("`{key}` is {value}, but it must be a whole number of at least 1")),
        },
    }
}
