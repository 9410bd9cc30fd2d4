//! A spec in words: what `gqa info` and plans print.

use super::{AttentionSpec, Mask};
use crate::rope::{Pairing, Scaling};

impl std::fmt::Display for AttentionSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (q_heads, kv_heads, group) = (self.q_heads, self.kv_heads, self.group());
        write!(f, "{q_heads}/{kv_heads} heads (group {group}), head_dim {}, ", self.head_dim)?;
        let place = if self.v_in_k { " in keys" } else { "" };
        write!(f, "v_head_dim {}{place}, q {}, kv {}", self.v_head_dim, self.q_dtype, self.k_dtype)?;
        if self.v_dtype != self.k_dtype {
            write!(f, " and {}", self.v_dtype)?;
        }
        f.write_str(if self.rotated { " rotated" } else { "" })?;
        f.write_str(if self.causal { ", causal" } else { ", full" })?;
        match (self.window_left, self.window_right) {
            (None, None) => {}
            (Some(left), None) => write!(f, ", window {left} before")?,
            (None, Some(right)) => write!(f, ", window {right} after")?,
            (Some(left), Some(right)) => write!(f, ", window {left} before {right} after")?,
        }
        if let Some(cap) = self.softcap {
            write!(f, ", softcap {cap}")?;
        }
        if self.alibi.is_some() {
            f.write_str(", ALiBi")?;
        }
        if self.sinks {
            f.write_str(", sinks")?;
        }
        f.write_str(match self.mask {
            Mask::None => "",
            Mask::Tree => ", tree mask",
            Mask::Keep => ", boolean mask",
            Mask::Add => ", added mask",
        })?;
        if self.qk_norm.is_some() {
            f.write_str(", q and k normalised")?;
        }
        if let Some(rope) = &self.rope {
            let pairing = match rope.pairing {
                Pairing::Half => "half",
                Pairing::Interleaved => "interleaved",
            };
            let scaling = match rope.scaling {
                Scaling::None => "",
                Scaling::Linear { .. } => " linear",
                Scaling::DynamicNtk { .. } => " dynamic NTK",
                Scaling::Yarn { .. } => " YaRN",
                Scaling::Llama3 { .. } => " Llama 3",
                Scaling::LongRope { .. } => " LongRoPE",
            };
            write!(f, ", RoPE {pairing} of {} theta {}{scaling}", rope.dim, rope.theta)?;
        }
        Ok(())
    }
}
