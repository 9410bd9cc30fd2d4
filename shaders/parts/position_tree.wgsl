// Position that a row's query turns to, in a tree of draft tokens: a token's depth is the number of draft tokens that it sees,
// itself not counted. A sequence without a tree has one token after the other.

fn query_position(item: WorkItem, row: u32) -> i32 {
    if item.list != NO_LIST {
        return listed_position(item, row);
    }
    let token = row / GROUP;
    if item.mask_token == 0u {
        return i32(item.origin) + item.q_start + i32(token);
    }
    let first = item.mask + token * item.mask_token;
    let seen = countOneBits(words[first]) + countOneBits(words[first + 1u]);
    return item.q_start + max(i32(seen) - 1, 0);
}
