//! Links kernels from parts: text in, text out. WGSL at module scope knows no order, so linking is concatenation.
//!
//! A linked module is: directives, a prelude of constants, one implementation of each part contract, the kernel.

use std::fmt::Write as _;

use crate::spec::{AttentionSpec, Dtype};

#[derive(Debug, Clone, Copy)]
struct Source {
    file: &'static str,
    text: &'static str,
}

macro_rules! source {
    ($file:literal) => {
        Source { file: concat!("shaders/", $file), text: include_str!(concat!("../shaders/", $file)) }
    };
}

/// A compute shader of this library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Many rows: tiles of rows and keys in workgroup memory.
    Prefill,
    /// Few rows, any adapter: teams of invocations read keys, rows share them.
    Decode,
    /// Many rows, small fixed subgroups: rows across lanes.
    PrefillSubgroup,
    /// Few rows, small fixed subgroups: elements across lanes.
    DecodeSubgroup,
    /// Merges the states of chunks.
    Combine,
    /// Writes new keys and values into the cache.
    Append,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Self; 6] = [
        Self::Prefill,
        Self::Decode,
        Self::PrefillSubgroup,
        Self::DecodeSubgroup,
        Self::Combine,
        Self::Append,
    ];

    /// Its name: that of its file, and of its label behind `gqa.`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::PrefillSubgroup => "prefill_subgroup",
            Self::DecodeSubgroup => "decode_subgroup",
            Self::Combine => "combine",
            Self::Append => "append",
        }
    }

    fn source(self) -> Source {
        match self {
            Self::Prefill => source!("prefill.wgsl"),
            Self::Decode => source!("decode.wgsl"),
            Self::PrefillSubgroup => source!("prefill_subgroup.wgsl"),
            Self::DecodeSubgroup => source!("decode_subgroup.wgsl"),
            Self::Combine => source!("combine.wgsl"),
            Self::Append => source!("append.wgsl"),
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Rows x keys that one workgroup holds at a time, and its invocations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows: (token, query head of the group) pairs.
    pub rows: u32,
    /// Keys staged together; 1 where keys are walked one by one.
    pub keys: u32,
    /// Invocations of the workgroup.
    pub threads: u32,
}

/// How f16 reaches a shader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum F16 {
    /// 16-bit stores; loads are whole words, converted by `unpack2x16float`.
    Native,
    /// Whole words, converted by `unpack2x16float`.
    Unpack,
    /// Whole words, converted in integer arithmetic.
    Integer,
}

/// Everything that decides the text of one linked kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// The problem.
    pub spec: AttentionSpec,
    /// Which shader.
    pub kernel: Kernel,
    /// Its tile.
    pub tile: Tile,
    /// How f16 is read and written.
    pub f16: F16,
    /// Whether [`Kernel::Decode`] reduces by subgroup shuffles.
    pub shuffle: bool,
    /// Whether reads of K and V are counted.
    pub counted: bool,
    /// Workgroups along one dispatch dimension.
    pub workgroups: u32,
}

/// Who will compile the text: they disagree on one directive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compiler {
    /// wgpu's own: rejects `enable subgroups`.
    Naga,
    /// A browser's: requires it.
    Tint,
}

/// A linked kernel, and where its lines come from.
#[derive(Debug, Clone)]
pub struct Linked {
    /// The WGSL text; its entry point is `main`.
    pub text: String,
    /// First line (from 1) of each file, in order.
    files: Vec<(u32, &'static str)>,
}

impl Linked {
    /// The file and its line (from 1) behind a line (from 1) of the linked text.
    pub fn locate(&self, line: u32) -> (&'static str, u32) {
        let at = self.files.partition_point(|(first, _)| *first <= line);
        match at.checked_sub(1).and_then(|i| self.files.get(i)) {
            Some((first, file)) => (file, line - first + 1),
            None => ("prelude", line),
        }
    }

    /// A compiler's message with each `wgsl:LINE` replaced by `FILE:LINE`.
    pub fn explain(&self, message: &str) -> String {
        let mut pieces = message.split("wgsl:");
        let mut out = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            let digits = piece.bytes().take_while(u8::is_ascii_digit).count();
            match piece[..digits].parse() {
                Ok(line) => {
                    let (file, line) = self.locate(line);
                    let _ = write!(out, "{file}:{line}{}", &piece[digits..]);
                }
                Err(_) => {
                    let _ = write!(out, "wgsl:{piece}");
                }
            }
        }
        out
    }
}

/// Links `variant` for `compiler`.
pub fn link(variant: &Variant, compiler: Compiler) -> Linked {
    let mut text = String::new();
    if variant.native_f16_out() {
        text.push_str("enable f16;\n");
    }
    if compiler == Compiler::Tint && variant.uses_subgroups() {
        text.push_str("enable subgroups;\n");
    }
    variant.prelude(&mut text);
    let mut line = 1 + text.lines().count() as u32;
    let mut files = Vec::new();
    for part in variant.parts().into_iter().chain([variant.kernel.source()]) {
        files.push((line, part.file));
        text.push_str(part.text);
        line += part.text.lines().count() as u32;
    }
    Linked { text, files }
}

impl Variant {
    /// Whether the text needs the subgroup feature.
    pub fn uses_subgroups(&self) -> bool {
        match self.kernel {
            Kernel::PrefillSubgroup | Kernel::DecodeSubgroup => true,
            Kernel::Decode => self.shuffle,
            _ => false,
        }
    }

    fn native_f16_out(&self) -> bool {
        self.f16 == F16::Native && self.spec.q_dtype() == Dtype::F16 && self.kernel != Kernel::Append
    }

    fn prelude(&self, text: &mut String) {
        let spec = &self.spec;
        let (k4, v4) = (row_fours(spec.head_dim()), row_fours(spec.v_head_dim()));
        let words = |fours: u32| fours * spec.kv_dtype().bytes();
        let constants = [
            ("HEAD_DIM", spec.head_dim()),
            ("V_HEAD_DIM", spec.v_head_dim()),
            ("K4", k4),
            ("V4", v4),
            ("K_WORDS", words(k4)),
            ("V_WORDS", words(v4)),
            ("KV_HEADS", spec.kv_heads()),
            ("GROUP", spec.group()),
            ("ROWS", self.tile.rows),
            ("KEYS", self.tile.keys),
            ("THREADS", self.tile.threads),
            ("LANES", self.tile.threads),
            ("MAX_WORKGROUPS", self.workgroups),
            ("WHOLE", crate::params::WHOLE),
        ];
        for (name, value) in constants {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        let _ = writeln!(text, "const CAUSAL: bool = {};", spec.causal());
        let scale = spec.scale() * std::f32::consts::LOG2_E;
        // WGSL leaves subnormal literals open.
        let scale = if scale.is_subnormal() { 0.0 } else { scale };
        let _ = writeln!(text, "const SCALE_LOG2: f32 = {scale:e}f;");
    }

    /// One implementation of each part contract that the kernel calls.
    fn parts(&self) -> Vec<Source> {
        let mut parts = vec![source!("parts/params.wgsl")];
        let spec = &self.spec;
        let attends = !matches!(self.kernel, Kernel::Append | Kernel::Combine);
        let mut reads_f16 = spec.q_dtype() == Dtype::F16;
        if attends {
            parts.push(source!("parts/work.wgsl"));
            parts.push(source!("parts/contiguous.wgsl"));
            parts.push(source!("parts/query.wgsl"));
            parts.push(source!("parts/emit.wgsl"));
            parts.push(match spec.q_dtype() {
                Dtype::F16 => source!("parts/query_f16.wgsl"),
                _ => source!("parts/query_f32.wgsl"),
            });
            parts.push(match spec.kv_dtype() {
                Dtype::F32 => source!("parts/kv_f32.wgsl"),
                Dtype::F16 => source!("parts/kv_f16.wgsl"),
                Dtype::Bf16 => source!("parts/kv_bf16.wgsl"),
            });
            reads_f16 |= spec.kv_dtype() == Dtype::F16;
            parts.push(match self.counted {
                true => source!("parts/fetch_counted.wgsl"),
                false => source!("parts/fetch_uncounted.wgsl"),
            });
        }
        match self.kernel {
            Kernel::Append => {
                parts.push(source!("parts/encode.wgsl"));
                parts.push(match spec.q_dtype() {
                    Dtype::F16 => source!("parts/new_f16.wgsl"),
                    _ => source!("parts/new_f32.wgsl"),
                });
                parts.push(match spec.kv_dtype() {
                    Dtype::F32 => source!("parts/word_f32.wgsl"),
                    Dtype::F16 => source!("parts/word_f16.wgsl"),
                    Dtype::Bf16 => source!("parts/word_bf16.wgsl"),
                });
            }
            _ => {
                parts.push(source!("parts/logits.wgsl"));
                parts.push(source!("parts/state.wgsl"));
                match (spec.q_dtype(), self.f16) {
                    (Dtype::F16, F16::Native) => parts.push(source!("parts/out_f16.wgsl")),
                    (Dtype::F16, _) => {
                        parts.push(source!("parts/out_f16_words.wgsl"));
                        parts.push(source!("parts/encode.wgsl"));
                    }
                    _ => parts.push(source!("parts/out_f32.wgsl")),
                }
            }
        }
        match self.kernel {
            Kernel::Decode if self.shuffle => parts.push(source!("parts/reduce_subgroup.wgsl")),
            Kernel::Decode => parts.push(source!("parts/reduce_workgroup.wgsl")),
            Kernel::PrefillSubgroup if self.tile.threads == 4 => {
                parts.push(source!("parts/broadcast_4.wgsl"))
            }
            Kernel::PrefillSubgroup => parts.push(source!("parts/broadcast_8.wgsl")),
            _ => {}
        }
        if reads_f16 && self.kernel != Kernel::Combine {
            parts.push(match self.f16 {
                F16::Integer => source!("parts/f16_integer.wgsl"),
                F16::Native | F16::Unpack => source!("parts/f16_unpack.wgsl"),
            });
        }
        parts
    }
}

/// Groups of four values in a row of the cache: rows are padded to whole groups.
pub const fn row_fours(dim: u32) -> u32 {
    dim.div_ceil(4)
}

/// Lanes for which [`Kernel::PrefillSubgroup`] has a broadcast part.
pub const BROADCAST_LANES: [u32; 2] = [4, 8];
