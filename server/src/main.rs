//! The program `imprint`.

fn main() {}
