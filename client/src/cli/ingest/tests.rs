//! How a text is cut.

use proptest::prelude::*;

use super::Chunks;
use crate::cli::Failure;

fn cut(text: &[u8], chunk_bytes: u32) -> Result<Vec<String>, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut chunks = Chunks::new(text, "text", chunk_bytes);
        let mut pieces = Vec::new();
        while let Some(piece) = chunks.next().await? {
            pieces.push(piece);
        }
        Ok(pieces)
    })
}

proptest! {
    #[test]
    fn the_pieces_are_the_text_and_none_is_empty_or_too_large(text in ".{0,200}", size in 4_u32..40) {
        let pieces = cut(text.as_bytes(), size).unwrap();
        prop_assert_eq!(pieces.concat(), text);
        for (i, piece) in pieces.iter().enumerate() {
            prop_assert!(!piece.is_empty() && piece.len() <= size as usize);
            // Full but for a cut character, so that a file is cut the same way again.
            prop_assert!(i + 1 == pieces.len() || piece.len() + 4 > size as usize);
        }
    }

    #[test]
    fn a_byte_that_is_no_text_is_found_wherever_it_stands(head in "[a-zé]{0,60}", tail in "[a-z]{0,60}") {
        let text = [head.as_bytes(), &[0xff], tail.as_bytes()].concat();
        match cut(&text, 16) {
            Err(Failure::NotText { at, .. }) => prop_assert_eq!(at, head.len() as u64),
            other => prop_assert!(false, "{other:?}"),
        }
    }
}

#[test]
fn a_character_that_breaks_off_at_the_end_is_no_text() {
    let Err(Failure::NotText { at: 2, .. }) = cut(b"ab\xc3", 16) else {
        panic!("half a character went through");
    };
}
