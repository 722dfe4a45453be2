//! Tables line up, and no text steers a terminal.

use super::{Align, printable, table};

#[test]
fn a_table_lines_up_by_characters_and_ends_no_line_in_space() {
    let columns = [
        ("NAME", Align::Left),
        ("N", Align::Right),
        ("END", Align::Left),
    ];
    let rows = [
        ["é".to_owned(), "7".to_owned(), "x".to_owned()],
        ["longer".to_owned(), "1234".to_owned(), String::new()],
    ];
    assert_eq!(
        table(columns, &rows),
        "NAME       N  END\n\
         é          7  x\n\
         longer  1234"
    );
}

#[test]
fn control_characters_are_shown_and_not_obeyed() {
    assert_eq!(
        printable("a\u{1b}[2Jb\rc\u{9b}\n\td"),
        "a\u{fffd}[2Jb\u{fffd}c\u{fffd}\n\td"
    );
}
