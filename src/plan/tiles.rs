//! Which kernels and tiles: what suits the class of the adapter, cut down to what its limits and the spec allow.

use super::{Family, Options};
use crate::caps::{Caps, Class};
use crate::error::Error;
use crate::params::MAP_KEYS;
use crate::shader::{BROADCAST_LANES, Kernel, MatrixUnits, Tile, UNIT, WIDE_UNIT, row_fours, team_lanes};
use crate::spec::{AttentionSpec, Dtype};

/// What suits a class of adapters: a row of [`TABLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassTiles {
    /// The adapters that it is for.
    pub class: Class,
    /// Which kernels.
    pub family: Family,
    /// Rows of a prefill tile, at most.
    pub prefill_rows: u32,
    /// Rows of a decode tile, at most.
    pub decode_rows: u32,
    /// Workgroups that fill the device: keys are cut into chunks until there are as many. wgpu does not tell how many cores there are.
    pub fill: u32,
    /// Why.
    pub why: &'static str,
}

/// The tile table. The first row of a class whose kernels an adapter can run is its default; [`Options`] say otherwise.
#[rustfmt::skip]
pub const TABLE: [ClassTiles; 5] = [
    row(Class::Discrete,   Family::Portable, [64, 16, 1024],
        "64 rows fit 32 KiB of workgroup memory, 16 fit the registers; some hundred cores want several workgroups each"),
    row(Class::Integrated, Family::Portable, [64, 16, 256],
        "the same tiles on a tenth of the cores; each chunk's state crosses the memory that it shares"),
    row(Class::Apple,      Family::Portable, [64, 16, 512],
        "32 KiB of workgroup memory as elsewhere; 8 to 80 cores, each with room for several workgroups"),
    row(Class::Software,   Family::Subgroup, [16, 6, 16],
        "barriers cost more than they share: a workgroup is one subgroup; a few threads want few chunks"),
    row(Class::Software,   Family::Portable, [64, 16, 16],
        "tiles in workgroup memory, where subgroups have not 4 or 8 lanes or the driver ends loops; a few threads want few chunks"),
];

const fn row(
    class: Class,
    family: Family,
    [prefill_rows, decode_rows, fill]: [u32; 3],
    why: &'static str,
) -> ClassTiles {
    ClassTiles { class, family, prefill_rows, decode_rows, fill, why }
}

/// Most rows of a lane of [`Kernel::PrefillSubgroup`] that [`Options`] may ask for; half as many where heads are [`LONG`].
const MAX_LANE_ROWS: u32 = 4;

/// Elements beyond which [`Kernel::PrefillSubgroup`] has half as many rows: SwiftShader keeps all that its text names on the stack, and
/// dies of 4 rows of 576 a lane.
const LONG: u32 = 256;

/// Most rows of [`Kernel::DecodeSubgroup`] that [`Options`] may ask for.
const MAX_DECODE_ROWS: u32 = 8;

pub(super) type Choice = (Kernel, Tile);

/// What a plan is made of.
pub(super) struct Tiles {
    pub(super) prefill: Choice,
    pub(super) decode: Choice,
    pub(super) fill: u32,
}

impl Tiles {
    /// Picks them and says why.
    pub(super) fn new(
        spec: &AttentionSpec,
        caps: &Caps,
        options: &Options,
        reasons: &mut Vec<String>,
    ) -> Result<Self, Error> {
        let lanes = caps.fixed_subgroup().filter(|lanes| BROADCAST_LANES.contains(lanes));
        if options.family == Family::Subgroup && lanes.is_none() {
            let found = match caps.subgroup {
                Some((min, max)) => format!("Subgroup on an adapter with subgroups of {min} to {max}"),
                None => "Subgroup on an adapter without subgroups".to_owned(),
            };
            return Err(Error::field(
                "options.family",
                found,
                "it needs subgroups of exactly 4 or exactly 8 lanes",
            ));
        }
        // A driver that ends loops is old, and took up to half a minute to compile the subgroup kernels, whose chunks would be short.
        let ends_loops = caps.loop_iterations.is_some();
        let has_matrices = options.matrix_units != MatrixUnits::None;
        if has_matrices && options.family == Family::Subgroup {
            let found = format!("{:?}", options.matrix_units);
            return Err(Error::field(
                "options.matrix_units",
                found,
                "it needs the portable family, not that of subgroups",
            ));
        }
        let suits = |row: &&ClassTiles| match options.family {
            Family::Auto => {
                row.family == Family::Portable || (lanes.is_some() && !ends_loops && !has_matrices)
            }
            family => row.family == family,
        };
        let own = |row: &&ClassTiles| row.class == caps.class;
        let of_class = TABLE.iter().find(|row| own(row) && suits(row));
        // Kernels that are not for this class, but asked for, have the tiles of the class that they are for: how many workgroups
        // fill the device is still its own.
        let mut row = *of_class.or_else(|| TABLE.iter().find(suits)).unwrap_or(&TABLE[0]);
        row.fill = TABLE.iter().find(own).unwrap_or(&row).fill;
        reasons.push(match row.class == caps.class {
            true => format!("{} adapter: {}", caps.class, row.why),
            false => {
                format!("{} adapter: tiles of {} ones, whose kernels were asked for", caps.class, row.class)
            }
        });
        let picker = Picker { spec, caps, options, row };
        let (prefill, decode) = match lanes.filter(|_| row.family == Family::Subgroup) {
            Some(lanes) => picker.subgroup(lanes, reasons)?,
            None => picker.portable(reasons)?,
        };
        Ok(Self { prefill, decode, fill: options.fill.unwrap_or(row.fill) })
    }
}

/// Registers with which vectors of 8 lanes walk two keys a step: with 16, what two keep alive goes to memory, which costs more than they save.
const TWO_KEY_REGISTERS: u32 = 32;

/// Keys of a step of [`Kernel::PrefillSubgroup`]: outputs lie in memory, and are loaded and stored once for both. The text of three is longer
/// than caches of instructions. Of 4 lanes all lies in memory, whatever the registers (SwiftShader).
fn prefill_keys(caps: &Caps, lanes: u32) -> u32 {
    if lanes == 4 || caps.vector_registers >= TWO_KEY_REGISTERS { 2 } else { 1 }
}

/// Keys of a step of [`Kernel::DecodeSubgroup`]. What two save is outweighed by how the second is loaded, but for one or two rows of 128.
fn decode_keys(caps: &Caps, (rows, lanes): (u32, u32), widest: u32) -> u32 {
    let fits = lanes == 8 && caps.vector_registers >= TWO_KEY_REGISTERS;
    if fits && rows <= 2 && row_fours(widest).div_ceil(lanes) == 4 { 2 } else { 1 }
}

/// Most bytes of a unit of 64-bit numbers; 0 where there are none. For AVX2 a unit of 32 bytes is loaded in fewer instructions than two
/// of 16, which decode gains by and prefill does not; with AVX-512 its loads are masked, and wait for memory.
pub(super) fn long_unit(caps: &Caps, kernel: Kernel) -> u32 {
    if !caps.int64 || caps.fixed_subgroup() != Some(8) {
        return 0;
    }
    let few = caps.vector_registers < TWO_KEY_REGISTERS;
    if few && kernel == Kernel::DecodeSubgroup { WIDE_UNIT } else { UNIT }
}

struct Picker<'a> {
    spec: &'a AttentionSpec,
    caps: &'a Caps,
    options: &'a Options,
    row: ClassTiles,
}

impl Picker<'_> {
    /// Kernels whose workgroup is one subgroup.
    fn subgroup(&self, lanes: u32, reasons: &mut Vec<String>) -> Result<(Choice, Choice), Error> {
        if self.options.decode_teams == Some(true) {
            let needed = "they are of the portable family: ask for it, too";
            return Err(Error::field("options.decode_teams", "true, with the family of subgroups", needed));
        }
        if lanes == 8 {
            let numbers = if self.caps.int64 { "64-bit numbers" } else { "32-bit words" };
            let most = long_unit(self.caps, Kernel::DecodeSubgroup).max(UNIT);
            reasons.push(format!(
                "K and V are loaded up to {UNIT} bytes at a time ({most} in decode), as {numbers}: a load costs per lane and component"
            ));
        }
        let keys = prefill_keys(self.caps, lanes);
        let across = |each| (Kernel::PrefillSubgroup, Tile { rows: lanes * each, keys, threads: lanes });
        let widest = self.spec.head_dim().max(self.spec.v_head_dim());
        let few = |rows| {
            let keys = decode_keys(self.caps, (rows, lanes), widest);
            (Kernel::DecodeSubgroup, Tile { rows, keys, threads: lanes })
        };
        let full = if widest <= LONG { self.row.prefill_rows } else { self.row.prefill_rows / 2 };
        let each = match self.options.prefill_rows {
            Some(rows) => self.rows_of_lanes("options.prefill_rows", rows, lanes)?,
            None => {
                let each = full / lanes;
                reasons.push(format!(
                    "prefill: {each} rows a lane, so that each load serves many products (tiles half empty on 8 lanes: half as many); keys a step: {keys}, with {} vector registers",
                    self.caps.vector_registers
                ));
                each
            }
        };
        let prefill = across(each);
        let (group, most) = (self.spec.group(), self.row.decode_rows);
        let decode = match self.options.decode_rows {
            Some(rows) if rows > MAX_DECODE_ROWS => {
                across(self.rows_of_lanes("options.decode_rows", rows, lanes)?)
            }
            Some(rows) => few(even_tiles(group, rows)),
            None if group <= most => {
                reasons.push(format!(
                    "decode: the {group} rows of a group fit the registers, elements lie across lanes"
                ));
                few(group)
            }
            None => {
                let decode = across(even_tiles(group, full).div_ceil(lanes));
                reasons.push(format!(
                    "decode: {group} rows of a group fill the lanes, rows lie across them {} at a time",
                    decode.1.rows
                ));
                decode
            }
        };
        Ok((prefill, decode))
    }

    /// Rows of a lane of [`Kernel::PrefillSubgroup`], as an option asks for.
    fn rows_of_lanes(&self, field: &'static str, rows: u32, lanes: u32) -> Result<u32, Error> {
        let widest = self.spec.head_dim().max(self.spec.v_head_dim());
        let most = if widest <= LONG { MAX_LANE_ROWS } else { MAX_LANE_ROWS / 2 };
        match rows / lanes {
            each if (1..=most).contains(&each) && rows.is_multiple_of(lanes) => Ok(each),
            _ => {
                let needed = format!("it must be 1 to {most} times the {lanes} lanes of a subgroup here");
                Err(Error::field(field, rows, needed))
            }
        }
    }

    /// Kernels that share tiles in workgroup memory, and those on matrix units or with teams that hold rows in registers.
    fn portable(&self, reasons: &mut Vec<String>) -> Result<(Choice, Choice), Error> {
        let prefill = match self.options.matrix_units {
            MatrixUnits::None => self.prefill(reasons)?,
            units => self.matrices(units, reasons)?,
        };
        let decode = self.decode(prefill, reasons)?;
        Ok((prefill, decode))
    }

    /// Bytes that norm_rms.wgsl takes beside a tile: a number for each row, and arrays begin at multiples of 16.
    fn norm_bytes(&self, rows: u32) -> u32 {
        if self.spec.qk_norm().is_some() { (rows * 4).next_multiple_of(16) } else { 0 }
    }

    /// Tiles in workgroup memory: as many rows as were asked for, or suit the class.
    fn prefill(&self, reasons: &mut Vec<String>) -> Result<Choice, Error> {
        let Self { caps, row, .. } = self;
        // As in prefill.wgsl: q_part, kv_part (9 groups a row), weights, team.
        let bytes =
            |rows: u32| rows * 9 * 16 + 32 * 9 * 16 + 32 * rows * 4 + 8 * rows * 4 + self.norm_bytes(rows);
        let fits = |rows: u32| bytes(rows) <= caps.workgroup_memory && rows * 2 <= caps.invocations;
        let rows = match self.options.prefill_rows {
            Some(rows) if (4..=MAX_PREFILL_ROWS).contains(&rows) && rows.is_multiple_of(4) && fits(rows) => {
                rows
            }
            Some(rows) => {
                let needed = format!(
                    "it must be a multiple of 4 up to {MAX_PREFILL_ROWS}, and fit {} bytes of workgroup memory and {} invocations, 2 a row",
                    caps.workgroup_memory, caps.invocations
                );
                return Err(Error::field("options.prefill_rows", rows, needed));
            }
            None => {
                // WebGPU's least device has room for 32.
                let rows = if fits(row.prefill_rows) { row.prefill_rows } else { 32 };
                reasons.push(format!(
                    "prefill: {rows} rows, of {} that suit the class; there are {} KiB of workgroup memory",
                    row.prefill_rows,
                    caps.workgroup_memory / 1024
                ));
                rows
            }
        };
        Ok((Kernel::Prefill, Tile { rows, keys: MAP_KEYS, threads: rows * 2 }))
    }

    /// A group's rows in as few tiles as can be; those of `prefill` where they are far fewer.
    fn decode(&self, prefill: Choice, reasons: &mut Vec<String>) -> Result<Choice, Error> {
        let Self { spec, caps, options, row } = self;
        // As in decode.wgsl and reduce_workgroup.wgsl: q_tile, scores, team_dots, row_max, merge.
        let (k4, keys) = (row_fours(spec.head_dim()), MAP_KEYS);
        // An invocation for each four columns of a value.
        let threads = row_fours(spec.v_head_dim()).next_power_of_two().max(64);
        let bytes = |rows: u32| {
            let each = k4 * 16 + keys * 4 + threads * 4;
            rows * each + (rows * 4).next_multiple_of(16) + threads * 16 + threads * 4 + self.norm_bytes(rows)
        };
        let fit = (1..=row.decode_rows).rev().find(|rows| bytes(*rows) <= caps.workgroup_memory).unwrap_or(1);
        let group = spec.group();
        let most = match options.decode_rows {
            Some(rows) if rows.min(group) > fit => {
                let needed =
                    format!("it must be at most {fit}: what registers and workgroup memory hold here");
                return Err(Error::field("options.decode_rows", rows, needed));
            }
            Some(rows) => rows,
            None if group.div_ceil(fit) > 2 * group.div_ceil(prefill.1.rows) => {
                reasons.push(format!(
                    "decode: as prefill, because {group} rows of a group would need {} tiles of {fit}, each reading all keys",
                    group.div_ceil(fit)
                ));
                return Ok(prefill);
            }
            None => fit,
        };
        let rows = even_tiles(group, most);
        reasons.push(if rows == group {
            format!("decode: all {rows} rows of a group in one tile, so K and V are read once per group")
        } else {
            format!("decode: tiles of {rows} rows, because {most} is what registers and workgroup memory hold, or was asked for")
        });
        Ok(match self.team_lanes(rows)? {
            Some(lanes) => {
                reasons.push(format!(
                    "decode: teams of {lanes} lanes hold {rows} rows in registers, subgroups have at least {}",
                    self.least_subgroup()
                ));
                (Kernel::DecodeTeams, Tile { rows, keys: TEAM_THREADS, threads: TEAM_THREADS })
            }
            None => (Kernel::Decode, Tile { rows, keys, threads }),
        })
    }

    /// Lanes of a team that holds `rows` rows, where subgroups have them and it is wanted.
    fn team_lanes(&self, rows: u32) -> Result<Option<u32>, Error> {
        let (needed, subgroup) = (team_lanes(self.spec, rows), self.least_subgroup());
        let lanes = needed.filter(|lanes| *lanes <= subgroup);
        match self.options.decode_teams {
            Some(true) if lanes.is_none() => {
                let needed = match needed {
                    Some(lanes) => format!("it needs subgroups of at least {lanes} lanes"),
                    None => format!(
                        "it needs fewer rows or elements: 16 lanes do not hold {rows} rows of these dims"
                    ),
                };
                let found = format!("true, with subgroups of {subgroup}");
                Err(Error::field("options.decode_teams", found, needed))
            }
            wanted => Ok(lanes.filter(|_| wanted != Some(false))),
        }
    }

    fn least_subgroup(&self) -> u32 {
        self.caps.subgroup.map_or(0, |(least, _)| least)
    }
}

/// Rows and columns of a matrix.
const SIDE: u32 = 16;
/// Invocations for each row: so that there is a subgroup of up to 64 lanes for each `SIDE` rows.
const SHARERS: u32 = 4;

impl Picker<'_> {
    /// The kernel on matrix units, with as many rows as workgroup memory holds beside a tile of keys and values.
    fn matrices(&self, units: MatrixUnits, reasons: &mut Vec<String>) -> Result<Choice, Error> {
        let Self { spec, caps, .. } = self;
        let refuse = |needed: &str| Err(Error::field("options.matrix_units", format!("{units:?}"), needed));
        if let Some(rows) = self.options.prefill_rows {
            let needed = "tiles of matrices are as workgroup memory allows: leave it out";
            return Err(Error::field("options.prefill_rows", rows, needed));
        }
        let is_half = |dtype| matches!(dtype, Dtype::F16 | Dtype::Fp8);
        if spec.q_dtype() != Dtype::F16
            || !is_half(spec.k_dtype())
            || !is_half(spec.v_dtype())
            || spec.rotated()
        {
            return refuse(
                "queries must be f16, keys and values f16 or fp8 that are not rotated: products are of f16",
            );
        }
        if spec.head_dim().max(spec.v_head_dim()) > 128 {
            return refuse("dims must be at most 128: queries and outputs of more leave the registers");
        }
        // Larger subgroups would be fewer than blocks of `SIDE` rows.
        let has_teams = caps.subgroup.is_some_and(|(_, most)| most <= SIDE * SHARERS);
        if units == MatrixUnits::Cooperative && !(caps.cooperative_matrix && caps.f16 && has_teams) {
            return refuse(
                "the device must have EXPERIMENTAL_COOPERATIVE_MATRIX, SHADER_F16 and subgroups of at most 64",
            );
        }
        // As in prefill_matrix.wgsl: staged, weights, logits, cache_rows, grew; emulated: shares.
        let is_emulated = units == MatrixUnits::Emulated;
        let half = if is_emulated { 4 } else { 2 };
        let sides = |dim: u32| dim.div_ceil(SIDE) * SIDE;
        let [k, v] = [sides(spec.head_dim()), sides(spec.v_head_dim())];
        let of_row = half * (MAP_KEYS + 8)
            + MAP_KEYS * 4
            + if is_emulated { SHARERS * 4 } else { 0 }
            + if spec.qk_norm().is_some() { 4 } else { 0 };
        let tile = MAP_KEYS * (k + 8) + v * (MAP_KEYS + 8);
        let bytes = |rows: u32| half * tile.max(rows * (k + 8)) + rows * of_row + MAP_KEYS * 4 + 16;
        let fits = |rows: &u32| bytes(*rows) <= caps.workgroup_memory && rows * SHARERS <= caps.invocations;
        let Some(rows) = [64, 32, 16].into_iter().find(fits) else {
            return refuse(
                "it needs more workgroup memory: keys and values of this dim do not fit beside 16 rows",
            );
        };
        reasons.push(format!("prefill: {rows} rows on matrix units, {SIDE} of them a subgroup"));
        Ok((Kernel::PrefillMatrix, Tile { rows, keys: MAP_KEYS, threads: rows * SHARERS }))
    }
}

/// Invocations of [`Kernel::DecodeTeams`], and keys that they take at a time.
const TEAM_THREADS: u32 = 64;
/// Most rows of [`Kernel::Prefill`]: 256 invocations.
const MAX_PREFILL_ROWS: u32 = 128;

/// Rows of a tile when `rows` are cut evenly into tiles of at most `most`.
pub(super) fn even_tiles(rows: u32, most: u32) -> u32 {
    rows.div_ceil(rows.div_ceil(most))
}
