//! Writes loops out: an array that a loop indexes lies in memory, and no compiler of software adapters takes all loops apart.
//!
//! Mesa unrolls a loop of up to 32 turns and some 830 instructions; SwiftShader unrolls none, and computes an index lane by lane unless it is a literal.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::{Kernel, Side, Tile, Variant, row_fours};

/// What marks a loop: `for (var i = 0u; i < COUNT; i++) { // written out`, up to the line `}` below it. No `break` or `continue` of its own, no blank line at
/// its end.
const MARK: &str = "{ // written out";

impl Variant {
    /// Rows of a lane in the second walk of [`Kernel::PrefillSubgroup`], for tiles that are half empty or emptier. SwiftShader, whose subgroups have
    /// 4 lanes, has none: it keeps what both walks name on the stack.
    pub(super) fn few_rows_each(&self) -> Option<u32> {
        let Tile { rows, threads, .. } = self.tile;
        let halves = self.kernel == Kernel::PrefillSubgroup && threads == 8 && rows / threads >= 2;
        halves.then(|| rows / threads / 2)
    }

    /// Counts of loops by their names in the text of kernels of small subgroups.
    pub(super) fn loop_counts(&self) -> [(&'static str, u32); 13] {
        let tile = self.tile;
        let [k, v] = [self.spec.head_dim(), self.spec.v_head_dim()]
            .map(|dim| row_fours(dim).div_ceil(tile.threads.max(1)));
        let [k_fours, v_fours] = [Side::K, Side::V].map(|side| self.unit_fours(side));
        [
            ("LANES", tile.threads),
            ("ROWS", tile.rows),
            ("ROWS_EACH", tile.rows / tile.threads.max(1)),
            ("KEYS", tile.keys),
            ("KEYS_EACH", tile.keys / tile.threads.max(1)),
            ("K_PART", k),
            ("V_PART", v),
            ("V_WIDE", v * tile.threads),
            ("K_WIDE", k * tile.threads),
            ("K_FOURS", k_fours),
            ("V_FOURS", v_fours),
            ("K_LOADS", k / k_fours),
            ("V_LOADS", v / v_fours),
        ]
    }
}

/// `text` with each marked loop replaced by as many blocks as its count among `counts` says. Blocks after the first share the line of
/// its end, so that lines keep their numbers. A loop of another count stays as it is.
pub(super) fn write_out<'a>(text: &'a str, counts: &[(&str, u32)]) -> Cow<'a, str> {
    if !text.contains(MARK) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some((name, count)) = header(line, counts) else {
            let _ = writeln!(out, "{line}");
            continue;
        };
        let indent = &line[..line.len() - line.trim_start().len()];
        let end = format!("{indent}}}");
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != end).collect();
        let body = body.join("\n");
        let body = write_out(&body, counts);
        let _ = writeln!(out, "{indent}{{");
        for line in body.lines() {
            let _ = writeln!(out, "{}", folded(&replaced(line, name, 0), counts));
        }
        out.push_str(&end);
        for nth in 1..count {
            out.push_str(" {");
            for line in body.lines() {
                let code = line.split("//").next().unwrap_or_default().trim();
                let _ = write!(out, " {}", folded(&replaced(code, name, nth), counts));
            }
            out.push_str(" }");
        }
        out.push('\n');
    }
    Cow::Owned(out)
}

/// The walk `attend` once more, as `attend_few`, with `each` rows a lane.
pub(super) fn few(text: &str, counts: &[(&str, u32)], each: u32) -> String {
    let own = |(name, count): &(_, u32)| (*name, if *name == "ROWS_EACH" { each } else { *count });
    let counts: Vec<(&str, u32)> = counts.iter().map(own).collect();
    let text = write_out(text, &counts);
    text.lines()
        .map(|line| replaced(line, "ROWS_EACH", each).replace("fn attend(", "fn attend_few(") + "\n")
        .collect()
}

/// Variable and count of a marked loop.
fn header<'a>(line: &'a str, counts: &[(&str, u32)]) -> Option<(&'a str, u32)> {
    let head = line.trim_start().strip_prefix("for (var ")?.strip_suffix(MARK)?;
    let (name, rest) = head.split_once(" = 0u; ")?;
    let (_, count) = rest.split(';').next()?.split_once(" < ")?;
    let (_, count) = counts.iter().find(|(known, _)| *known == count)?;
    Some((name, *count))
}

/// `code` with the number `nth` where it names `name`.
fn replaced(code: &str, name: &str, nth: u32) -> String {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let length = match is_name(first) {
            true => rest.find(|c| !is_name(c)).unwrap_or(rest.len()),
            false => first.len_utf8(),
        };
        let (word, after) = rest.split_at(length);
        match word == name {
            true => {
                let _ = write!(out, "{nth}u");
            }
            false => out.push_str(word),
        }
        rest = after;
    }
    out
}

/// `code` with what is known of its indices added up: naga looks at all expressions of a function for each new one, and written-out loops are
/// mostly indices.
fn folded(code: &str, counts: &[(&str, u32)]) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some((before, after)) = rest.split_once('[') {
        out.push_str(before);
        out.push('[');
        rest = after;
        // Of nested indices the inner ones only.
        if let Some((index, after)) = after.split_once(']').filter(|(index, _)| !index.contains(['[', '('])) {
            out.push_str(&sum(index, counts));
            out.push(']');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// A sum of products with those of literals and counts as one literal, where the first of them was.
fn sum(index: &str, counts: &[(&str, u32)]) -> String {
    let number = |factor: &str| match factor.strip_suffix('u').and_then(|digits| digits.parse().ok()) {
        Some(literal) => Some(literal),
        None => counts.iter().find(|(name, _)| *name == factor).map(|(_, count)| *count),
    };
    let product = |term: &str| term.split(" * ").map(number).product::<Option<u32>>();
    let known = format!("{}u", index.split(" + ").filter_map(product).sum::<u32>());
    let mut terms: Vec<&str> = Vec::new();
    for term in index.split(" + ") {
        match product(term) {
            None => terms.push(term),
            Some(_) if terms.contains(&known.as_str()) => {}
            Some(_) => terms.push(&known),
        }
    }
    if terms.len() > 1 {
        terms.retain(|term| *term != "0u");
    }
    terms.join(" + ")
}

#[cfg(test)]
mod tests {
    use super::{MARK, few, folded, write_out};
    use crate::shader::{Compiler, link};
    use crate::{AttentionSpec, Caps, Class, Error, Options, Plan};

    #[test]
    fn no_marked_loop_is_left() -> Result<(), Error> {
        for (lanes, vector_registers) in [(4, 16), (8, 16), (8, 32)] {
            let subgroup = Some((lanes, lanes));
            let caps = Caps { subgroup, vector_registers, class: Class::Software, ..Caps::minimal() };
            for (group, dim) in [(1, 128), (4, 64), (8, 80)] {
                let spec = AttentionSpec::builder(group, 1, dim).build()?;
                let plan = Plan::new(&spec, &caps, &Options::default())?;
                let backward = plan.backward()?;
                for variant in [plan.prefill(), plan.decode(), &backward.queries, &backward.keys] {
                    let text = link(variant, Compiler::Naga).text;
                    let left: Vec<_> =
                        text.lines().filter(|line| line.contains("for (") && line.ends_with(MARK)).collect();
                    assert_eq!(
                        left,
                        Vec::<&str>::new(),
                        "{} of {group} heads, {lanes} lanes",
                        variant.kernel
                    );
                }
            }
        }
        Ok(())
    }

    #[test]
    fn marked_loops_become_blocks_and_lines_stay() {
        let text = "\
let a = 0;
    for (var i = 0u; i < PART; i++) { // written out
        // Why.
        for (var j = 0u; j < 2u; j++) {
            x[i] += at(i, fine); // each
        }
    }
for (var j = 0u; j < PART; j++) {
}
";
        let expected = "\
let a = 0;
    {
        // Why.
        for (var j = 0u; j < 2u; j++) {
            x[0u] += at(0u, fine); // each
        }
    } {  for (var j = 0u; j < 2u; j++) { x[1u] += at(1u, fine); } }
for (var j = 0u; j < PART; j++) {
}
";
        assert_eq!(write_out(text, &[("PART", 2)]), expected);
        assert_eq!(write_out(text, &[("OTHER", 2)]), text);
    }

    #[test]
    fn known_indices_are_one_literal() {
        let fold = |code| folded(code, &[("WIDE", 8), ("KEYS", 2)]);
        assert_eq!(fold("o[3u * WIDE + 1u * KEYS + 1u] += x[2u][0u];"), "o[27u] += x[2u][0u];");
        assert_eq!(fold("q[r * WIDE + 2u * KEYS + four]"), "q[r * WIDE + 4u + four]");
        assert_eq!(fold("q[0u * WIDE + at]"), "q[at]");
        // Left alone: what is not a sum of products, nested indices but the innermost, arithmetic elsewhere.
        let alone = ["q[1u / KEYS]", "q[(1u + 1u) * KEYS]", "2u * KEYS", "q[r % 2u * KEYS]", "a[b", "name"];
        assert_eq!(alone.map(fold), alone);
        assert_eq!(fold("a[b[1u + 1u] + 1u]"), "a[b[2u] + 1u]");
    }

    #[test]
    fn the_walk_for_few_rows_has_its_own_counts_and_as_many_lines() -> Result<(), Error> {
        let spec = AttentionSpec::builder(4, 1, 64).build()?;
        let of_lanes = |lanes| {
            let caps = Caps { subgroup: Some((lanes, lanes)), class: Class::Software, ..Caps::minimal() };
            Plan::new(&spec, &caps, &Options::default()).map(|plan| plan.prefill().clone())
        };
        let (four, eight) = (of_lanes(4)?, of_lanes(8)?);
        assert_eq!((four.few_rows_each(), eight.few_rows_each()), (None, Some(1)));
        let text = "fn attend() {\n    for (var r = 0u; r < ROWS_EACH; r++) { // written out\n        x[r] = ROWS_EACH;\n    }\n}\n";
        let expected = "fn attend_few() {\n    {\n        x[0u] = 1u;\n    }\n}\n";
        assert_eq!(few(text, &eight.loop_counts(), 1), expected);
        Ok(())
    }
}
