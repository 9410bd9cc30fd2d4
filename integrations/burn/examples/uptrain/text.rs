//! Sentences as token ids.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::Result;

/// Sentences to train on, and sentences of other speeches to judge by; see `sentences.py`.
pub(crate) const TRAINING: &str = include_str!("training.txt");
pub(crate) const HELD_OUT: &str = include_str!("held_out.txt");

/// Ids of each line, with the model's begin and end.
pub(crate) fn tokenize(folder: &Path, lines: &str) -> Result<Vec<Vec<u32>>> {
    let path = folder.join("tokenizer.json");
    let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    // As long as they are: texts of a batch lie one behind the other.
    tokenizer.with_padding(None);
    let lines = lines.lines().collect::<Vec<_>>();
    let found = tokenizer.encode_batch(lines, true)?;
    Ok(found.iter().map(|text| text.get_ids().to_vec()).collect())
}

/// Of a batch.
pub(crate) fn lengths(texts: &[Vec<u32>]) -> Vec<u32> {
    texts.iter().map(|text| text.len() as u32).collect()
}
