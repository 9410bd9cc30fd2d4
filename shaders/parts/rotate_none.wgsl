// Rows are stored as they are.

fn rotate_rows(count: u32, pitch: u32, length: u32, thread: u32) {}
