// Called once for every four K or V values that are read: nothing to do.

fn fetched() {}
