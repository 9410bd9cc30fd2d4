//! `__metadata__` of a case.

use std::collections::BTreeMap;

use gqa::Mask;

use super::CaseError;

/// Its entries, but for `source`, which is for people.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Metadata {
    pub(super) scale: Option<f32>,
    pub(super) causal: bool,
    pub(super) q_start: Option<i32>,
    pub(super) window_left: Option<u32>,
    pub(super) window_right: Option<u32>,
    pub(super) softcap: Option<f32>,
    pub(super) mask_kind: Option<Mask>,
}

impl Metadata {
    /// Reads every entry. Ranges are the library's to check, where it has the same field.
    pub(super) fn read(entries: &BTreeMap<String, String>) -> Result<Self, CaseError> {
        let mut meta = Self::default();
        for (key, value) in entries {
            let refuse = |needed| CaseError::Metadata { key: key.clone(), found: value.clone(), needed };
            let real = || {
                let finite = value.parse().ok().filter(|x: &f32| x.is_finite());
                finite.ok_or_else(|| refuse("it must be a finite number"))
            };
            let keys = || {
                let count = value.parse().ok().filter(|n: &u32| i32::try_from(*n).is_ok());
                count.ok_or_else(|| refuse("it must be a whole number, at least 0 and below 2^31"))
            };
            match key.as_str() {
                "scale" => meta.scale = Some(real()?),
                "softcap" => meta.softcap = Some(real()?),
                "causal" => {
                    meta.causal = value.parse().map_err(|_| refuse("it must be true or false"))?;
                }
                "q_start" => {
                    let start = value.parse().ok().filter(|n: &i32| *n > i32::MIN);
                    meta.q_start =
                        Some(start.ok_or_else(|| refuse("it must be a whole number within +-2^31"))?);
                }
                "window_left" => meta.window_left = Some(keys()?),
                "window_right" => meta.window_right = Some(keys()?),
                "mask_kind" => {
                    meta.mask_kind = Some(match value.as_str() {
                        "keep" => Mask::Keep,
                        "add" => Mask::Add,
                        _ => return Err(refuse("it must be keep or add")),
                    });
                }
                "source" => {}
                _ => return Err(refuse("the format has no such key")),
            }
        }
        Ok(meta)
    }
}
