//! The command line.

use std::path::PathBuf;

/// What `--help` prints.
pub(crate) const HELP: &str = "\
What AMD's compiler in Mesa (RADV, ACO) makes of gqa's kernels, on GPUs that need not be there

Usage: cargo xtask isa [OPTIONS]

  --family LIST       Some of navi21 (RDNA2), navi31 (RDNA3), gfx1201 (RDNA4), vega20 (GCN), by commas; else all.
                      Any other name that RADV_FORCE_FAMILY takes works, too
  --filter TEXT       Only variants with every word of TEXT in their name; again for more
  --format FORMAT     table (default), or json: an object for each variant and line
  --loops             Also a table of loops: the instructions of one round of each, without the loops inside it
  --disassembly DIR   Also write each variant's instructions (.s) and ACO's text with its blocks (.aco) into DIR
  --check             Instead of tables: compare with examples/isa/budget.json; 1 is the exit code where a variant spills vector registers,
                      has arrays in memory, holds fewer waves than it did, or is not in the budget
  --bless             Instead of tables: write what is found into the budget
  --help              Print this

It links the kernels that gqa plans for some twenty specs, translates them as wgpu does, and compiles them on RADV's null device: no GPU
is used, nothing runs. Registers, workgroup memory and waves are facts. Latency and inverse throughput are the compiler's model, with
guessed trip counts and no cache: good for comparing two forms of one kernel, not for milliseconds.

Examples:
  cargo xtask isa --family navi31 --filter 'decode d128-g4' --loops
  cargo xtask isa --family navi31 --filter 'prefill d128-g4-f16' --disassembly target/isa

Exit codes: 0 good, 1 over budget or failed, 2 wrong usage, 5 no RADV.
";

/// What is asked.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Arguments {
    /// Families, in order.
    pub(crate) families: Vec<String>,
    /// Parts of names.
    pub(crate) filters: Vec<String>,
    /// JSON instead of tables.
    pub(crate) json: bool,
    /// A table of loops.
    pub(crate) loops: bool,
    /// Where texts go.
    pub(crate) disassembly: Option<PathBuf>,
    /// Compare with the budget.
    pub(crate) check: bool,
    /// Write the budget.
    pub(crate) bless: bool,
    /// This process compiles for the one family of its environment and prints rows.
    pub(crate) child: bool,
    /// Print the help.
    pub(crate) help: bool,
}

/// The GPUs that are looked at: RDNA2, RDNA3, RDNA4, GCN.
pub(crate) const FAMILIES: [&str; 4] = ["navi21", "navi31", "gfx1201", "vega20"];

impl Arguments {
    /// Reads them.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("`{word}` needs a value"));
            match word.as_str() {
                "--family" => arguments.families.extend(value()?.split(',').map(str::to_owned)),
                "--filter" => arguments.filters.push(value()?),
                "--format" => {
                    arguments.json = match value()?.as_str() {
                        "json" => true,
                        "table" => false,
                        other => return Err(format!("there is no format `{other}`: table, json")),
                    }
                }
                "--disassembly" => arguments.disassembly = Some(value()?.into()),
                "--loops" => arguments.loops = true,
                "--check" => arguments.check = true,
                "--bless" => arguments.bless = true,
                "--child" => arguments.child = true,
                "--help" | "-h" => arguments.help = true,
                other => return Err(format!("`{other}` is not understood; see --help")),
            }
        }
        if arguments.families.is_empty() {
            arguments.families = FAMILIES.map(str::to_owned).to_vec();
        }
        Ok(arguments)
    }

    /// What a child is told.
    pub(crate) fn for_child(&self) -> Vec<std::ffi::OsString> {
        let mut words = vec!["--child".into()];
        for filter in &self.filters {
            words.extend(["--filter".into(), filter.into()]);
        }
        if let Some(folder) = &self.disassembly {
            words.extend(["--disassembly".into(), folder.into()]);
        }
        words
    }

    /// Whether everything is looked at.
    pub(crate) fn is_whole(&self) -> bool {
        self.filters.is_empty() && FAMILIES.iter().all(|family| self.families.iter().any(|f| f == family))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Arguments, String> {
        Arguments::parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments_are_exact() {
        assert_eq!(parse("").unwrap().families, FAMILIES);
        assert!(parse("").unwrap().is_whole());
        let some = parse("--family navi21,vega20 --filter decode --format json --check").unwrap();
        assert_eq!(some.families, ["navi21", "vega20"]);
        assert!(some.json && some.check && !some.is_whole());
        assert!(parse("--famly navi21").is_err());
        assert!(parse("--format xml").is_err());
        assert!(parse("--filter").is_err());
    }

    #[test]
    fn children_are_told_what_to_compile() {
        let told = parse("--filter decode --disassembly x --check").unwrap().for_child();
        assert_eq!(told, ["--child", "--filter", "decode", "--disassembly", "x"]);
    }
}
