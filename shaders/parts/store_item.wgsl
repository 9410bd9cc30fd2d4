// Tokens one behind the other, and the position that the first turns to.

struct StoreItem {
    token: u32,
    tokens: u32,
    position: i32,
}
