//! Laws of a log, then its refusals one by one.

use proptest::{collection::vec, prelude::*};

use crate::{Appended, Chunk, Content, Error, Kind, Limits, Memory, Place, Store};

fn text(document: &str, text: &str, end_of_document: bool) -> Chunk {
    Chunk {
        document: document.to_owned(),
        content: Content::Text(text.to_owned()),
        end_of_document,
    }
}

fn ids(document: &str, ids: &[u32]) -> Chunk {
    Chunk {
        document: document.to_owned(),
        content: Content::Ids(ids.to_vec()),
        end_of_document: false,
    }
}

fn store() -> Memory {
    let store = Memory::new(Limits {
        max_chunks: 8,
        max_bytes: 64,
        max_documents: 3,
    });
    store.create("s").unwrap();
    store
}

/// Chunks of any few documents, text and ids.
fn chunk() -> impl Strategy<Value = Chunk> {
    let content = prop_oneof![
        "[a-c]{0,3}".prop_map(Content::Text),
        vec(0_u32..4, 0..3).prop_map(Content::Ids),
    ];
    ("[xy]{0,1}", content, any::<bool>()).prop_map(|(document, content, end_of_document)| Chunk {
        document,
        content,
        end_of_document,
    })
}

proptest! {
    #[test]
    fn whatever_comes_the_log_is_contiguous_and_repeating_it_changes_nothing(chunks in vec((0_u64..12, chunk()), 0..40)) {
        let store = Memory::new(Limits::default());
        store.create("s").unwrap();
        let mut accepted = Vec::new();
        for (seq, chunk) in chunks {
            let before = store.head("s").unwrap();
            let foretold = store.check("s", seq, &chunk);
            prop_assert_eq!(store.head("s").unwrap(), before);
            let done = store.append("s", seq, chunk.clone());
            prop_assert_eq!(&foretold, &done);
            match done {
                Ok(Appended::Accepted(_)) => {
                    prop_assert_eq!(seq, before.seq + 1);
                    accepted.push(chunk);
                }
                Ok(Appended::Duplicate) => {
                    prop_assert_eq!(&accepted[usize::try_from(seq).unwrap() - 1], &chunk);
                    prop_assert_eq!(store.head("s").unwrap(), before);
                }
                Err(_) => prop_assert_eq!(store.head("s").unwrap(), before),
            }
        }
        let head = store.head("s").unwrap();
        prop_assert_eq!(head.seq, accepted.len() as u64);
        for (index, chunk) in accepted.iter().enumerate() {
            prop_assert_eq!(store.append("s", index as u64 + 1, chunk.clone()), Ok(Appended::Duplicate));
        }
        prop_assert_eq!(store.head("s").unwrap(), head);
        let rows = store.read("s", 0, usize::MAX).unwrap();
        prop_assert_eq!(rows.iter().map(|row| (*row.chunk).clone()).collect::<Vec<_>>(), accepted);
    }

    #[test]
    fn a_replayed_log_has_the_same_chain_and_documents(chunks in vec(chunk(), 0..30)) {
        let store = Memory::new(Limits::default());
        store.create("a").unwrap();
        store.create("b").unwrap();
        let mut seq = 1;
        for chunk in chunks {
            if store.append("a", seq, chunk).is_ok() {
                seq += 1;
            }
        }
        for row in store.read("a", 0, usize::MAX).unwrap() {
            store.append("b", row.seq, (*row.chunk).clone()).unwrap();
        }
        prop_assert_eq!(store.head("a").unwrap(), store.head("b").unwrap());
        prop_assert_eq!(store.documents("a").unwrap(), store.documents("b").unwrap());
    }
}

#[test]
fn another_chunk_under_a_used_seq_is_a_conflict_and_a_later_seq_a_gap() {
    let store = store();
    store.append("s", 1, text("", "one", false)).unwrap();
    assert_eq!(
        store.append("s", 1, text("", "one", false)),
        Ok(Appended::Duplicate)
    );
    assert_eq!(
        store.append("s", 1, text("", "One", false)),
        Err(Error::Conflict { seq: 1 })
    );
    assert_eq!(
        store.append("s", 1, text("", "one", true)),
        Err(Error::Conflict { seq: 1 })
    );
    assert_eq!(
        store.append("s", 3, text("", "two", false)),
        Err(Error::Gap { want: 2, got: 3 })
    );
    assert_eq!(
        store.append("s", 0, text("", "two", false)),
        Err(Error::Gap { want: 2, got: 0 })
    );
    assert_eq!(
        store.append("s", u64::MAX, text("", "two", false)),
        Err(Error::Gap {
            want: 2,
            got: u64::MAX
        })
    );
}

#[test]
fn a_new_name_ends_the_open_document_and_used_names_stay_used() {
    let store = store();
    let place = |document: &str, begins, ends_open| {
        Ok(Appended::Accepted(Place {
            document: document.to_owned(),
            begins,
            ends_open,
        }))
    };
    assert_eq!(
        store.append("s", 1, text("", "a", false)),
        place("doc-1", true, false)
    );
    assert_eq!(
        store.append("s", 2, text("", "b", false)),
        place("doc-1", false, false)
    );
    assert_eq!(
        store.append("s", 3, text("x", "c", false)),
        place("x", true, true)
    );
    assert_eq!(
        store.append("s", 4, text("doc-1", "d", false)),
        Err(Error::NameUsed("doc-1".into()))
    );
    assert_eq!(
        store.append("s", 4, text("x", "", true)),
        place("x", false, false)
    );
    assert_eq!(
        store.append("s", 5, text("x", "d", false)),
        Err(Error::NameUsed("x".into()))
    );
    let documents = store.documents("s").unwrap();
    assert!(documents.iter().all(|document| document.complete));
    assert_eq!(
        (
            documents[0].first_seq,
            documents[0].last_seq,
            documents[1].last_seq
        ),
        (1, 2, 4)
    );
}

#[test]
fn a_document_is_text_or_ids_throughout_but_an_empty_chunk_may_end_either() {
    let store = store();
    store.append("s", 1, ids("x", &[1, 2])).unwrap();
    assert_eq!(
        store.append("s", 2, text("x", "a", false)),
        Err(Error::MixedContent("x".into()))
    );
    store.append("s", 2, text("", "", true)).unwrap();
    assert_eq!(store.documents("s").unwrap()[0].kind, Kind::Ids);
    assert!(store.documents("s").unwrap()[0].complete);
}

#[test]
fn an_empty_chunk_that_ends_nothing_is_refused() {
    let store = store();
    assert_eq!(
        store.append("s", 1, text("x", "", true)),
        Err(Error::EmptyChunk)
    );
    store.append("s", 1, text("x", "a", false)).unwrap();
    assert_eq!(
        store.append("s", 2, text("x", "", false)),
        Err(Error::EmptyChunk)
    );
    assert_eq!(store.append("s", 2, ids("y", &[])), Err(Error::EmptyChunk));
}

#[test]
fn chunks_bytes_documents_and_names_are_bounded() {
    let store = store();
    let name = "n".repeat(257);
    assert_eq!(
        store.append("s", 1, text(&name, "a", false)),
        Err(Error::NameTooLong {
            bytes: 257,
            limit: 256
        })
    );
    let long = "a".repeat(65);
    assert_eq!(
        store.append("s", 1, text("", &long, false)),
        Err(Error::Full {
            what: "bytes",
            limit: 64
        })
    );
    for seq in 1..=3 {
        store.append("s", seq, text("", "a", true)).unwrap();
    }
    assert_eq!(
        store.append("s", 4, text("", "a", true)),
        Err(Error::Full {
            what: "documents",
            limit: 3
        })
    );
    let store = super::Memory::new(Limits {
        max_chunks: 2,
        max_bytes: 64,
        max_documents: 3,
    });
    store.create("s").unwrap();
    store.append("s", 1, text("", "a", false)).unwrap();
    store.append("s", 2, text("", "a", false)).unwrap();
    assert_eq!(
        store.append("s", 3, text("", "a", false)),
        Err(Error::Full {
            what: "chunks",
            limit: 2
        })
    );
}

#[test]
fn a_forgotten_document_is_gone_from_a_replay_while_its_chunks_stay_known() {
    let store = store();
    store.append("s", 1, text("x", "secret", true)).unwrap();
    store.append("s", 2, text("y", "kept", false)).unwrap();
    let head = store.head("s").unwrap();
    store.forget("s", "x").unwrap();
    assert_eq!(
        store.forget("s", "x"),
        Err(Error::UnknownDocument("x".into()))
    );
    let rows = store.read("s", 0, 10).unwrap();
    assert_eq!(rows.iter().map(|row| row.seq).collect::<Vec<_>>(), [2]);
    assert_eq!(
        store.append("s", 1, text("x", "secret", true)),
        Ok(Appended::Duplicate)
    );
    assert_eq!(
        store.append("s", 3, text("x", "again", true)),
        Err(Error::NameUsed("x".into()))
    );
    assert_eq!(store.head("s").unwrap(), head);
    store.forget("s", "y").unwrap();
    store.append("s", 3, text("", "new", false)).unwrap();
    assert_eq!(store.documents("s").unwrap()[2].name, "doc-3");
}

#[test]
fn a_fork_goes_its_own_way() {
    let store = store();
    store.append("s", 1, text("x", "a", false)).unwrap();
    store.fork("s", "t").unwrap();
    store.append("t", 2, text("x", "b", true)).unwrap();
    assert_eq!(store.head("s").unwrap().seq, 1);
    assert_eq!(store.head("t").unwrap().seq, 2);
    assert_eq!(store.fork("s", "t"), Err(Error::SessionExists("t".into())));
    store.remove("s").unwrap();
    assert_eq!(store.head("s"), Err(Error::UnknownSession("s".into())));
    assert_eq!(store.head("t").unwrap().seq, 2);
}
