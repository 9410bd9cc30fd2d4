//! The `gqa` command.
fn main() {}
