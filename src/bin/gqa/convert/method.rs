//! Which layer is pooled how.

use std::collections::BTreeMap;
use std::path::Path;

use gqa::uptrain::Pooling;

use super::{bad, read_text};
use crate::Failure;
use crate::case::header::Unique;
use crate::hash::fnv1a;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Mean,
    First,
    Random,
}

impl Method {
    fn of(name: &str) -> Option<Self> {
        match name {
            "mean" => Some(Self::Mean),
            "first" => Some(Self::First),
            "random" => Some(Self::Random),
            _ => None,
        }
    }
}

/// The method of every layer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Methods {
    default: Method,
    layers: BTreeMap<usize, Method>,
    seed: u64,
}

impl Methods {
    /// Reads `--method`: a name, or a file of names for a model of `layers` layers.
    pub(super) fn read(method: &str, seed: u64, layers: usize) -> Result<Self, Failure> {
        if let Some(default) = Method::of(method) {
            return Ok(Self { default, layers: BTreeMap::new(), seed });
        }
        let path = Path::new(method);
        if !path.exists() {
            return Err(bad(format!(
                "--method {method:?} is neither mean, first or random, nor a file that exists"
            )));
        }
        let text = read_text(path)?;
        let entries: Unique<String> =
            serde_json::from_str(&text).map_err(|e| bad(format!("{method}: {e}")))?;
        let mut methods = Self { default: Method::Mean, layers: BTreeMap::new(), seed };
        for (key, value) in &entries.0 {
            let Some(value) = Method::of(value) else {
                return Err(bad(format!(
                    "{method}: {key:?} is {value:?}, but it must be mean, first or random"
                )));
            };
            // A number as it would be printed: "01" beside "1" would be one layer twice.
            match key.parse::<usize>() {
                Ok(layer) if layer.to_string() == *key && layer < layers => {
                    methods.layers.insert(layer, value);
                }
                Ok(_) => {
                    let last = layers - 1;
                    return Err(bad(format!(
                        "{method}: layer {key:?} does not exist: the model has 0 to {last}"
                    )));
                }
                Err(_) if key == "default" => methods.default = value,
                Err(_) => {
                    let needed = "neither \"default\" nor the number of a layer";
                    return Err(bad(format!("{method}: the key {key:?} is {needed}")));
                }
            }
        }
        Ok(methods)
    }

    /// How to pool a layer's tensor; each pool of each tensor has random numbers of its own.
    pub(super) fn pooling(&self, layer: usize, name: &str, pool: usize) -> Pooling {
        match self.layers.get(&layer).unwrap_or(&self.default) {
            Method::Mean => Pooling::Mean,
            Method::First => Pooling::First,
            Method::Random => Pooling::Random { seed: self.seed ^ fnv1a(name.bytes().chain([pool as u8])) },
        }
    }
}
