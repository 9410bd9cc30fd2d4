//! The container of a case: safetensors, read strictly.
//!
//! Read here and not by `SafeTensors::deserialize`, which keeps the last of two tensors of one name, and whose sum of
//! offsets and lengths can wrap around on a hostile header.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use gqa::Dtype as Float;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::CaseError;

/// Largest header of a case, which has ten tensors at most: ample.
pub(crate) const MAX_HEADER: u64 = 1 << 20;
const METADATA: &str = "__metadata__";

/// A tensor of the file: its bytes are as many as its shape and dtype say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    pub(crate) data: &'a [u8],
}

impl Tensor<'_> {
    /// The storage type, where it is one that this crate knows.
    pub(crate) fn float(&self) -> Option<Float> {
        match self.dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::Bf16),
            _ => None,
        }
    }

    /// Elements `from` to `from + count` as f32: of floats, bytes and booleans; none of any other.
    pub(crate) fn floats(&self, from: usize, count: usize) -> impl Iterator<Item = f32> {
        // Never 0, though there are types of fewer than 8 bits: a chunk must have a size.
        let size = (self.dtype.bitsize() / 8).max(1);
        let bytes = self.data.get(from * size..(from + count) * size).unwrap_or_default();
        let dtype = self.dtype;
        bytes.chunks_exact(size).filter_map(move |bytes| match (dtype, bytes) {
            (Dtype::F32, &[a, b, c, d]) => Some(f32::from_le_bytes([a, b, c, d])),
            (Dtype::F16, &[a, b]) => Some(half::f16::from_le_bytes([a, b]).to_f32()),
            (Dtype::BF16, &[a, b]) => Some(half::bf16::from_le_bytes([a, b]).to_f32()),
            (Dtype::U8 | Dtype::BOOL, &[x]) => Some(f32::from(x)),
            _ => None,
        })
    }

    /// All elements of an i32 tensor.
    pub(crate) fn ints(&self) -> impl Iterator<Item = i32> {
        self.data.chunks_exact(4).filter_map(|bytes| Some(i32::from_le_bytes(bytes.try_into().ok()?)))
    }
}

/// What stands before the data.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Reads the header of a file, of at most `max` bytes, and checks that its tensors fill the rest of the file without gap or overlap. Gives the
    /// header and the rest.
    pub(crate) fn read(file: &[u8], max: u64) -> Result<(Self, &[u8]), CaseError> {
        let refuse = |why: String| CaseError::Container(why);
        let Some((length, rest)) = file.split_first_chunk::<8>() else {
            return Err(refuse(format!("it has {} bytes, fewer than the 8 of a header length", file.len())));
        };
        let length = u64::from_le_bytes(*length);
        if length > max {
            return Err(refuse(format!("its header claims {length} bytes, more than {max}")));
        }
        let Some((text, data)) = rest.split_at_checked(length as usize) else {
            return Err(refuse(format!("its header claims {length} bytes, but only {} follow", rest.len())));
        };
        let header: Self = serde_json::from_slice(text).map_err(|e| refuse(format!("its header: {e}")))?;
        header.check_ranges(data.len())?;
        Ok((header, data))
    }

    fn check_ranges(&self, size: usize) -> Result<(), CaseError> {
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        let mut end = 0;
        for (name, info) in tensors {
            let refuse = |problem| Err(CaseError::Tensor { name: name.clone(), problem });
            let (from, to) = info.data_offsets;
            if from < end {
                return refuse(format!("starts at byte {from}, inside another, which ends at {end}"));
            }
            if from > end {
                return refuse(format!("starts at byte {from}, but the one before ends at {end}"));
            }
            if to > size {
                return refuse(format!(
                    "ends at byte {to}, but the file has {size} bytes of data: truncated?"
                ));
            }
            let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, dim| n.checked_mul(*dim));
            if from > to || bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != to - from) {
                let TensorInfo { dtype, shape, .. } = info;
                return refuse(format!("has bytes {from} to {to}, which do not fit {dtype} {shape:?}"));
            }
            end = to;
        }
        match size - end {
            0 => Ok(()),
            more => Err(CaseError::Container(format!("{more} bytes follow behind its last tensor"))),
        }
    }

    /// The tensors, by name.
    pub(crate) fn tensors<'a>(&'a self, data: &'a [u8]) -> BTreeMap<&'a str, Tensor<'a>> {
        let tensor = |info: &'a TensorInfo| {
            let data = data.get(info.data_offsets.0..info.data_offsets.1).unwrap_or_default();
            Tensor { dtype: info.dtype, shape: &info.shape, data }
        };
        self.tensors.iter().map(|(name, info)| (name.as_str(), tensor(info))).collect()
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let (mut metadata, mut tensors) = (None, BTreeMap::new());
        while let Some(name) = map.next_key::<String>()? {
            if name != METADATA {
                let info = map.next_value()?;
                insert(&mut tensors, name, info)?;
            } else if metadata.replace(map.next_value::<Unique<String>>()?.0).is_some() {
                return Err(twice(METADATA));
            }
        }
        Ok(Header { metadata: metadata.unwrap_or_default(), tensors })
    }
}

/// A JSON object none of whose keys is repeated.
pub(crate) struct Unique<V>(pub(crate) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = Unique<V>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some((key, value)) = map.next_entry()? {
            insert(&mut entries, key, value)?;
        }
        Ok(Unique(entries))
    }
}

fn insert<V, E: serde::de::Error>(map: &mut BTreeMap<String, V>, key: String, value: V) -> Result<(), E> {
    if map.contains_key(&key) {
        return Err(twice(&key));
    }
    map.insert(key, value);
    Ok(())
}

fn twice<E: serde::de::Error>(name: &str) -> E {
    E::custom(format!("`{name}` appears twice"))
}
