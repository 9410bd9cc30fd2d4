// Where the token of a row is. Rows of one sequence are one token after the other; rows of several, which share a prefix, are listed:
// LIST_WORDS words for each token.

// Its token in the queries.
fn row_token(item: WorkItem, row: u32) -> u32 {
    if item.list == NO_LIST {
        return item.token + row / GROUP;
    }
    return words[item.list + row / GROUP * LIST_WORDS];
}

// Its place in the sequence or document: what causality, windows and ALiBi go by.
fn row_place(item: WorkItem, row: u32) -> i32 {
    if item.list == NO_LIST {
        return item.q_start + i32(row / GROUP);
    }
    return bitcast<i32>(words[item.list + row / GROUP * LIST_WORDS + 1u]);
}

// The position that it turns to, where that is not its place.
fn listed_position(item: WorkItem, row: u32) -> i32 {
    return bitcast<i32>(words[item.list + row / GROUP * LIST_WORDS + 2u]);
}
