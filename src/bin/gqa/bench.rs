//! `gqa bench`: to come.

use crate::Failure;

/// To come
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn main(_args: &Args) -> Result<(), Failure> {
    Ok(())
}
