//! The budget: no variant spills vector registers, none runs with fewer waves than it did, none has more private arrays in memory.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Deserialize;

use crate::radv::Result;
use crate::row::Row;

/// What is allowed to a variant on a family, beside no spill at all.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub(crate) struct Allowance {
    /// Least subgroups per SIMD.
    pub(crate) waves: u64,
    /// Most bytes of memory for what is in no register; where nothing is said, none.
    #[serde(default)]
    pub(crate) scratch: u64,
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub(crate) struct Budget {
    /// The driver that it was made with.
    pub(crate) driver: String,
    /// By variant, then by family.
    pub(crate) variants: BTreeMap<String, BTreeMap<String, Allowance>>,
}

/// Where it lies in the repository.
pub(crate) fn path() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/isa/budget.json"))
}

impl Budget {
    /// Reads the file.
    pub(crate) fn read() -> Result<Self> {
        let path = path();
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?)
    }

    /// What `rows` are now, as the new budget. Families that were not compiled keep what they have.
    pub(crate) fn bless(&mut self, rows: &[Row], whole: bool) {
        if whole {
            self.variants.clear();
        }
        for row in rows {
            self.driver.clone_from(&row.driver);
            let allowance = Allowance { waves: row.subgroups, scratch: row.scratch };
            self.variants.entry(row.name.clone()).or_default().insert(row.family.clone(), allowance);
        }
    }

    /// Sorted, one variant a line, so that a diff tells what changed.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("{{\n  \"driver\": \"{}\",\n  \"variants\": {{", self.driver);
        for (nth, (name, families)) in self.variants.iter().enumerate() {
            let families: Vec<_> = families.iter().map(|(family, allowed)| entry(family, *allowed)).collect();
            let comma = if nth == 0 { "" } else { "," };
            let _ = write!(text, "{comma}\n    \"{name}\": {{{}}}", families.join(", "));
        }
        text + "\n  }\n}\n"
    }

    /// Sentences about what is wrong, and others about what is only worth knowing.
    pub(crate) fn check(&self, rows: &[Row]) -> (Vec<String>, Vec<String>) {
        let (mut wrong, mut notes) = (Vec::new(), Vec::new());
        let other_driver = rows.iter().find(|row| row.driver != self.driver);
        if let Some(row) = other_driver {
            let here = &row.driver;
            notes.push(format!(
                "the budget is of {}, this is {here}: lost waves are told, not counted",
                self.driver
            ));
        }
        for row in rows {
            let (name, family) = (&row.name, &row.family);
            let Some(allowed) = self.variants.get(name).and_then(|families| families.get(family)) else {
                wrong.push(format!(
                    "{name} on {family} is not in the budget: `cargo xtask isa --bless` adds it"
                ));
                continue;
            };
            if row.spilled_vgprs > 0 {
                wrong.push(format!(
                    "{name} on {family} spills {} vector registers, the budget is 0",
                    row.spilled_vgprs
                ));
            }
            if row.scratch > allowed.scratch {
                let (now, then) = (row.scratch, allowed.scratch);
                wrong.push(format!("{name} on {family} has {now} bytes in memory, the budget is {then}"));
            }
            if row.subgroups < allowed.waves {
                let (now, then) = (row.subgroups, allowed.waves);
                let message =
                    format!("{name} on {family} runs with {now} subgroups per SIMD, the budget is {then}");
                if other_driver.is_some() { notes.push(message) } else { wrong.push(message) }
            } else if row.subgroups > allowed.waves {
                let (now, then) = (row.subgroups, allowed.waves);
                notes.push(format!(
                    "{name} on {family} runs with {now} subgroups per SIMD, better than {then}: bless it"
                ));
            }
        }
        (wrong, notes)
    }
}

fn entry(family: &str, allowed: Allowance) -> String {
    match allowed.scratch {
        0 => format!("\"{family}\": {{\"waves\": {}}}", allowed.waves),
        scratch => format!("\"{family}\": {{\"waves\": {}, \"scratch\": {scratch}}}", allowed.waves),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(family: &str, name: &str, subgroups: u64) -> Row {
        let (family, name) = (family.to_owned(), name.to_owned());
        Row { family, name, driver: "Mesa 25".to_owned(), subgroups, ..Row::default() }
    }

    #[test]
    fn a_blessed_budget_is_kept() {
        let rows =
            [row("navi31", "decode d64", 16), row("navi21", "decode d64", 8), row("navi21", "append d64", 9)];
        let mut budget = Budget::default();
        budget.bless(&rows, true);
        assert_eq!(budget.check(&rows), (vec![], vec![]));
        assert_eq!(serde_json::from_str::<Budget>(&budget.text()).unwrap(), budget);
        let lines: Vec<_> = budget.text().lines().map(str::to_owned).collect();
        assert_eq!(lines[3], "    \"append d64\": {\"navi21\": {\"waves\": 9}},");
    }

    #[test]
    fn losses_are_named() {
        let mut budget = Budget::default();
        budget.bless(&[row("navi21", "decode d64", 8)], true);
        let spills = Row { spilled_vgprs: 3, scratch: 64, ..row("navi21", "decode d64", 7) };
        let (wrong, _) = budget.check(std::slice::from_ref(&spills));
        assert_eq!(wrong[0], "decode d64 on navi21 spills 3 vector registers, the budget is 0");
        assert_eq!(wrong[1], "decode d64 on navi21 has 64 bytes in memory, the budget is 0");
        assert_eq!(wrong[2], "decode d64 on navi21 runs with 7 subgroups per SIMD, the budget is 8");
        let (wrong, notes) = budget.check(&[Row { driver: "Mesa 26".to_owned(), ..spills }]);
        assert_eq!((wrong.len(), notes.len()), (2, 2));
        let (wrong, _) = budget.check(&[row("navi21", "decode d80", 8)]);
        assert!(wrong[0].contains("--bless"));
    }

    #[test]
    fn the_budget_in_the_repository_is_stable() {
        let text = std::fs::read_to_string(path()).unwrap();
        assert_eq!(Budget::read().unwrap().text(), text);
    }
}
