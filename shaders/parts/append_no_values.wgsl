// Values lie in the keys: there are none to append.
fn append_values(item: AppendItem, kv_head: u32, thread: u32) {}
