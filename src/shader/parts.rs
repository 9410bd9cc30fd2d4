//! What a kernel is linked from: one implementation of each part contract, and the bindings that follow.

use super::{F16, Kernel, MatrixUnits, Side, Source, Variant, source};
use crate::spec::{Dtype, Mask};

/// The walk of [`Kernel::PrefillSubgroup`], of which the linker makes a second one for few rows.
pub(super) const ATTEND: Source = source!("parts/attend.wgsl");

/// How a kernel uses a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Storage, read only.
    Read,
    /// Storage, read and written.
    Write,
    /// Uniform.
    Uniform,
}

impl Variant {
    /// Whether the text needs the subgroup feature.
    pub fn uses_subgroups(&self) -> bool {
        match self.kernel {
            Kernel::PrefillSubgroup | Kernel::DecodeSubgroup | Kernel::DecodeTeams => true,
            Kernel::BackwardQSubgroup | Kernel::BackwardKvSubgroup => true,
            Kernel::Decode => self.shuffle,
            _ => self.uses_matrix_units(),
        }
    }

    /// Whether the text needs the cooperative-matrix feature, and 16-bit floats with it.
    pub fn uses_matrix_units(&self) -> bool {
        self.kernel == Kernel::PrefillMatrix && self.matrix_units == MatrixUnits::Cooperative
    }

    /// Numbers of its bindings, ascending, and how it uses them.
    pub fn bindings(&self) -> Vec<(u32, Access)> {
        use Access::{Read, Uniform, Write};
        let spec = &self.spec;
        let mut bindings = match self.kernel {
            Kernel::Append if spec.v_in_k() => vec![(0, Read), (1, Read), (3, Write), (7, Read)],
            Kernel::Append => vec![(0, Read), (1, Read), (2, Read), (3, Write), (4, Write), (7, Read)],
            Kernel::Embed => vec![(0, Read), (1, Read), (3, Write)],
            Kernel::Combine | Kernel::CombineRotated => {
                vec![(0, Read), (4, Write), (5, Write), (6, Write), (7, Read)]
            }
            Kernel::Pack => vec![(0, Read), (1, Read), (7, Write)],
            Kernel::Classify => vec![(0, Read), (7, Write)],
            Kernel::Schedule => vec![(0, Read), (1, Write), (2, Write), (3, Write), (4, Write)],
            Kernel::Merge => vec![(0, Read), (1, Read), (2, Read), (4, Write), (5, Write)],
            Kernel::BackwardRows => vec![(0, Read), (1, Read), (2, Read), (4, Read), (5, Read), (6, Write)],
            Kernel::BackwardSinks => vec![(0, Read), (1, Read), (6, Write)],
            Kernel::BackwardStore => vec![(0, Read), (4, Write), (6, Read)],
            kernel if kernel.differentiates() => {
                let read = [0, 1, 2, 3].map(|number| (number, Read));
                read.into_iter().chain([(6, Write), (7, Read)]).collect()
            }
            _ => {
                let mut all = vec![(0, Read), (1, Read), (2, Read)];
                all.extend((!spec.v_in_k()).then_some((3, Read)));
                all.extend([(4, Write), (5, Write), (6, Write), (7, Read)]);
                if self.is_pooled() {
                    all[1] = (1, Write);
                }
                all
            }
        };
        bindings.extend(self.uses_table().then_some((8, Uniform)));
        bindings.extend(self.counts().then_some((9, Write)));
        bindings
    }

    /// Whether its reads of K and V are counted.
    fn counts(&self) -> bool {
        self.counted && (self.kernel.attends() || self.kernel.differentiates())
    }

    /// Whether the kernel reads the table.
    fn uses_table(&self) -> bool {
        let spec = &self.spec;
        let turns = spec.rope().is_some() || spec.qk_norm().is_some();
        match self.kernel {
            kernel if kernel.appends() => turns,
            kernel if kernel.combines() => spec.sinks(),
            Kernel::BackwardSinks => true,
            Kernel::BackwardRows | Kernel::BackwardStore => spec.rope().is_some(),
            kernel if kernel.differentiates() => spec.alibi().is_some(),
            kernel => {
                let turns = turns && !self.is_embedded();
                kernel.attends() && (turns || spec.sinks() || spec.alibi().is_some())
            }
        }
    }

    /// Whether queries come normalised, turned and rotated, as rows of f32: from `embed`.
    pub(super) fn is_embedded(&self) -> bool {
        self.kernel.attends() && self.spec.rotated()
    }

    /// Whether its queries may share a buffer with what it writes.
    fn is_pooled(&self) -> bool {
        self.pooled && self.kernel.attends() && !self.is_embedded()
    }

    pub(super) fn native_f16_out(&self) -> bool {
        let writes = self.kernel.attends()
            || self.kernel.combines()
            || matches!(self.kernel, Kernel::Merge | Kernel::BackwardStore);
        self.f16 == F16::Native && self.spec.q_dtype() == Dtype::F16 && writes
    }

    /// One implementation of each part contract that the kernel calls.
    pub(super) fn parts(&self) -> Vec<Source> {
        let mut parts = vec![source!("parts/base2.wgsl")];
        if self.kernel != Kernel::Pack {
            parts.push(source!("parts/params.wgsl"));
        }
        match self.kernel {
            Kernel::Append | Kernel::Embed => self.append_parts(&mut parts),
            Kernel::Combine => self.combine_parts(&mut parts),
            Kernel::CombineRotated => {
                self.combine_parts(&mut parts);
                parts.extend([source!("parts/rows.wgsl"), source!("parts/rotate.wgsl")]);
            }
            Kernel::Pack => match self.spec.mask() {
                Mask::Keep => parts.push(source!("parts/pack_keep.wgsl")),
                _ => {
                    parts.push(source!("parts/pack_add.wgsl"));
                    self.raw_part(&mut parts);
                }
            },
            Kernel::Classify => {
                parts.extend([
                    source!("parts/item.wgsl"),
                    source!("parts/work.wgsl"),
                    source!("parts/tiles.wgsl"),
                ]);
                parts.push(match self.spec.mask() {
                    Mask::Keep => source!("parts/judge_bits.wgsl"),
                    _ => source!("parts/judge_add.wgsl"),
                });
            }
            Kernel::Schedule => parts.push(source!("parts/item.wgsl")),
            Kernel::Merge => {
                self.raw_part(&mut parts);
                self.store_part(&mut parts);
            }
            Kernel::BackwardRows => {
                self.embed_parts(&mut parts);
                parts.extend([source!("parts/row4.wgsl"), source!("parts/store_item.wgsl")]);
                parts.push(match self.spec.q_dtype() {
                    Dtype::F16 => source!("parts/outs_f16.wgsl"),
                    _ => source!("parts/outs_f32.wgsl"),
                });
            }
            Kernel::BackwardSinks => parts.push(source!("parts/row4.wgsl")),
            Kernel::BackwardStore => {
                parts.push(source!("parts/store_item.wgsl"));
                self.rope_part(&mut parts);
                self.store_part(&mut parts);
            }
            kernel if kernel.differentiates() => {
                self.logit_parts(&mut parts);
                parts.push(source!("parts/map_none.wgsl"));
                parts.extend([source!("parts/gradient.wgsl"), source!("parts/row4.wgsl")]);
                match self.uses_subgroups() {
                    true => parts.push(self.broadcast_part()),
                    false => {
                        parts.extend([source!("parts/staged.wgsl"), source!("parts/staged_rows.wgsl")]);
                        parts.push(match self.rolled {
                            true => source!("parts/bound_hidden.wgsl"),
                            false => source!("parts/bound.wgsl"),
                        });
                    }
                }
            }
            _ => self.attend_parts(&mut parts),
        }
        if self.uses_table() {
            parts.push(source!("parts/table.wgsl"));
        }
        if self.reads_f16() {
            parts.push(match self.f16 {
                F16::Integer => source!("parts/f16_integer.wgsl"),
                F16::Native | F16::Unpack => source!("parts/f16_unpack.wgsl"),
            });
        }
        parts
    }

    /// Rows, keys and values, and the logits between them.
    fn logit_parts(&self, parts: &mut Vec<Source>) {
        let spec = &self.spec;
        parts.extend([
            source!("parts/item.wgsl"),
            source!("parts/work.wgsl"),
            source!("parts/row.wgsl"),
            source!("parts/tiles.wgsl"),
            source!("parts/words.wgsl"),
            source!("parts/places.wgsl"),
            source!("parts/pages.wgsl"),
            source!("parts/logits.wgsl"),
        ]);
        self.cache_parts(parts);
        parts.push(match spec.softcap() {
            Some(_) => source!("parts/softcap.wgsl"),
            None => source!("parts/scale.wgsl"),
        });
        parts.push(match spec.alibi() {
            Some(_) => source!("parts/alibi.wgsl"),
            None => source!("parts/alibi_none.wgsl"),
        });
        parts.push(match spec.mask() {
            Mask::None => source!("parts/mask_none.wgsl"),
            Mask::Keep | Mask::Tree => source!("parts/mask_bits.wgsl"),
            Mask::Add => source!("parts/mask_add.wgsl"),
        });
        if spec.mask() != Mask::None {
            parts.push(source!("parts/masks.wgsl"));
        }
        parts.push(match self.counted {
            true => source!("parts/fetch_counted.wgsl"),
            false => source!("parts/fetch_uncounted.wgsl"),
        });
    }

    fn attend_parts(&self, parts: &mut Vec<Source>) {
        self.logit_parts(parts);
        parts.extend([source!("parts/query.wgsl"), source!("parts/emit.wgsl")]);
        parts.push(match self.spec.mask() {
            Mask::Tree => source!("parts/position_tree.wgsl"),
            _ => source!("parts/position.wgsl"),
        });
        self.embed_parts(parts);
        parts.push(match self.spec.mask().is_dense() {
            true => source!("parts/map.wgsl"),
            false => source!("parts/map_none.wgsl"),
        });
        match self.kernel {
            Kernel::Decode if self.shuffle => parts.push(source!("parts/reduce_subgroup.wgsl")),
            Kernel::Decode => parts.push(source!("parts/reduce_workgroup.wgsl")),
            Kernel::PrefillSubgroup => {
                parts.push(self.broadcast_part());
                parts.push(ATTEND);
                parts.push(match self.few_rows_each() {
                    Some(_) => source!("parts/few.wgsl"),
                    None => source!("parts/few_none.wgsl"),
                });
            }
            Kernel::Prefill => parts.push(source!("parts/staged.wgsl")),
            Kernel::PrefillMatrix => {
                parts.push(source!("parts/halves.wgsl"));
                parts.push(match self.uses_matrix_units() {
                    true => source!("parts/matrix_cooperative.wgsl"),
                    false => source!("parts/matrix_lanes.wgsl"),
                });
            }
            _ => {}
        }
        self.output_parts(parts);
    }

    /// Four elements of a key or value, from what the cache stores.
    fn cache_parts(&self, parts: &mut Vec<Source>) {
        if self.loads_units() {
            parts.push(match self.uses_int64() {
                true => source!("parts/unit_first_lanes.wgsl"),
                false => source!("parts/unit_in_turn.wgsl"),
            });
        }
        let (k, v) = (self.spec.k_dtype(), self.spec.v_dtype());
        let is_half = self.uses_matrix_units();
        let [k_units, v_units] =
            [Side::K, Side::V].map(|side| self.loads_units() && self.unit(side).is_some());
        if !k_units {
            parts.push(match k.is_blocked() {
                true => source!("parts/keys_blocks.wgsl"),
                false => source!("parts/keys.wgsl"),
            });
        }
        parts.push(match k {
            Dtype::F16 if is_half => source!("parts/k_half.wgsl"),
            Dtype::F32 => source!("parts/k_f32.wgsl"),
            Dtype::F16 => source!("parts/k_f16.wgsl"),
            Dtype::Bf16 => source!("parts/k_bf16.wgsl"),
            Dtype::Fp8 => source!("parts/k_fp8.wgsl"),
            Dtype::Q8 | Dtype::Q4 => source!("parts/four_block.wgsl"),
        });
        if self.spec.v_in_k() {
            parts.push(source!("parts/values_in_keys.wgsl"));
        } else {
            if !v_units && !v.is_blocked() {
                parts.push(source!("parts/values.wgsl"));
            }
            parts.extend(match v {
                Dtype::F16 if is_half => Some(source!("parts/v_half.wgsl")),
                Dtype::F32 => Some(source!("parts/v_f32.wgsl")),
                Dtype::F16 => Some(source!("parts/v_f16.wgsl")),
                Dtype::Bf16 => Some(source!("parts/v_bf16.wgsl")),
                Dtype::Fp8 => Some(source!("parts/v_fp8.wgsl")),
                Dtype::Q8 | Dtype::Q4 => (!v_units).then_some(source!("parts/values_blocks.wgsl")),
            });
            if v.is_blocked() && !k.is_blocked() {
                parts.push(source!("parts/four_block.wgsl"));
            }
        }
        for (dtype, part) in
            [(Dtype::Bf16, source!("parts/bf16.wgsl")), (Dtype::Fp8, source!("parts/four_fp8.wgsl"))]
        {
            if [k, v].contains(&dtype) {
                parts.push(part);
            }
        }
    }

    fn combine_parts(&self, parts: &mut Vec<Source>) {
        parts.extend([source!("parts/words.wgsl"), source!("parts/merge_states.wgsl")]);
        self.output_parts(parts);
    }

    fn append_parts(&self, parts: &mut Vec<Source>) {
        let spec = &self.spec;
        self.embed_parts(parts);
        parts.extend([
            source!("parts/rows.wgsl"),
            source!("parts/encode_rows.wgsl"),
            source!("parts/encode.wgsl"),
            source!("parts/encode_fp8.wgsl"),
            source!("parts/encode_block.wgsl"),
        ]);
        parts.push(match spec.rotated() {
            true => source!("parts/rotate.wgsl"),
            false => source!("parts/rotate_none.wgsl"),
        });
        if self.kernel == Kernel::Embed {
            parts.extend([source!("parts/slot_flat.wgsl"), source!("parts/append_no_values.wgsl")]);
            return;
        }
        parts.extend([
            source!("parts/words.wgsl"),
            source!("parts/pages.wgsl"),
            source!("parts/slot_pages.wgsl"),
        ]);
        if spec.v_in_k() {
            parts.push(source!("parts/append_no_values.wgsl"));
            return;
        }
        parts.push(source!("parts/append_values.wgsl"));
        parts.push(match spec.q_dtype() {
            Dtype::F16 => source!("parts/new_f16.wgsl"),
            _ => source!("parts/new_f32.wgsl"),
        });
    }

    /// A query or a new key: read, normalised, turned.
    fn embed_parts(&self, parts: &mut Vec<Source>) {
        if self.is_embedded() {
            parts.extend([
                source!("parts/raws_f32.wgsl"),
                source!("parts/raw_f32.wgsl"),
                source!("parts/norm_none.wgsl"),
                source!("parts/rope_none.wgsl"),
            ]);
            return;
        }
        self.raw_part(parts);
        parts.push(match self.spec.qk_norm() {
            Some(_) => source!("parts/norm_rms.wgsl"),
            None => source!("parts/norm_none.wgsl"),
        });
        self.rope_part(parts);
    }

    fn rope_part(&self, parts: &mut Vec<Source>) {
        parts.push(match self.spec.rope() {
            Some(_) => source!("parts/rope.wgsl"),
            None => source!("parts/rope_none.wgsl"),
        });
    }

    fn broadcast_part(&self) -> Source {
        match self.tile.threads {
            4 => source!("parts/broadcast_4.wgsl"),
            _ => source!("parts/broadcast_8.wgsl"),
        }
    }

    fn raw_part(&self, parts: &mut Vec<Source>) {
        parts.extend(match (self.spec.q_dtype(), self.is_pooled()) {
            (Dtype::F16, false) => [source!("parts/raws_words.wgsl"), source!("parts/raw_f16.wgsl")],
            (Dtype::F16, true) => [source!("parts/raws_words_pooled.wgsl"), source!("parts/raw_f16.wgsl")],
            (_, false) => [source!("parts/raws_f32.wgsl"), source!("parts/raw_f32.wgsl")],
            (_, true) => [source!("parts/raws_f32_pooled.wgsl"), source!("parts/raw_f32.wgsl")],
        });
    }

    /// A finished row.
    fn output_parts(&self, parts: &mut Vec<Source>) {
        parts.push(source!("parts/state.wgsl"));
        parts.push(match self.spec.sinks() {
            true => source!("parts/sinks.wgsl"),
            false => source!("parts/sinks_none.wgsl"),
        });
        self.store_part(parts);
    }

    fn store_part(&self, parts: &mut Vec<Source>) {
        match (self.spec.q_dtype(), self.f16) {
            (Dtype::F16, F16::Native) => parts.push(source!("parts/out_f16.wgsl")),
            (Dtype::F16, _) => {
                parts.extend([source!("parts/out_f16_words.wgsl"), source!("parts/encode.wgsl")]);
            }
            _ => parts.push(source!("parts/out_f32.wgsl")),
        }
    }

    /// Whether some part calls `decode_f16`.
    fn reads_f16(&self) -> bool {
        let [q, k, v] =
            [self.spec.q_dtype(), self.spec.k_dtype(), self.spec.v_dtype()].map(|dtype| dtype == Dtype::F16);
        match self.kernel {
            Kernel::Append | Kernel::Embed | Kernel::Merge | Kernel::BackwardRows => q,
            Kernel::Pack => q && self.spec.mask() == Mask::Add,
            // Outputs in whole words can be read back, too.
            Kernel::Combine | Kernel::CombineRotated | Kernel::BackwardStore => q && self.f16 != F16::Native,
            kernel if kernel.differentiates() => k || v,
            kernel => kernel.attends() && (q || k || v),
        }
    }
}
