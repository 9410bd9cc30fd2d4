//! What a long run shows while it runs: a bar on a terminal, a line for each group elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Rows, or choices, done of all.
pub(crate) struct Progress {
    bar: ProgressBar,
    is_terminal: bool,
    /// Those of groups that are done.
    done: usize,
}

impl Progress {
    /// A bar of `count` rows, or what else `unit` says, on standard error.
    pub(crate) fn new(count: usize, unit: &str) -> Self {
        let bar = ProgressBar::new(count as u64);
        let template = format!("{{bar:24}} {{pos}}/{{len}} {unit}, {{elapsed}}: {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, is_terminal: std::io::stderr().is_terminal(), done: 0 }
    }

    /// What happens now.
    pub(crate) fn now(&self, message: String) {
        self.bar.set_message(message);
    }

    /// A stage begins: for logs, too.
    pub(crate) fn stage(&self, message: String) {
        if !self.is_terminal {
            eprintln!("[{:4.0} s] {message}", self.bar.elapsed().as_secs_f64());
        }
        self.now(message);
    }

    /// So many rounds of a group's `rows` rows are done.
    pub(crate) fn rounds(&self, rows: usize, (done, all): (usize, usize)) {
        self.bar.set_position((self.done + rows * done / all.max(1)) as u64);
    }

    /// All of a group's `rows` rows are done.
    pub(crate) fn group_done(&mut self, rows: usize) {
        self.done += rows;
        self.bar.set_position(self.done as u64);
    }

    /// Says something that stays.
    pub(crate) fn tell(&self, message: &str) {
        self.bar.suspend(|| eprintln!("{message}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
