use imprint_proto::v1::{IngestChunk, TokenIds, ingest_chunk::Content};
use tonic::Code;

use super::{Bounds, Contexts};

const BOUNDS: Bounds = Bounds {
    sessions: 2,
    bytes: 64,
    chunks: 8,
};

fn chunk(seq: u64, document: &str, text: &str, end: bool) -> IngestChunk {
    IngestChunk {
        seq,
        content: Some(Content::Text(text.to_owned())),
        document_id: document.to_owned(),
        end_of_document: end,
    }
}

fn one() -> Result<(Contexts, String), tonic::Status> {
    let mut contexts = Contexts::new("model".to_owned(), BOUNDS);
    let session = contexts.create(None)?.session_id;
    Ok((contexts, session))
}

#[test]
fn documents_are_paragraphs_however_they_are_cut() -> Result<(), tonic::Status> {
    let (mut contexts, id) = one()?;
    assert!(!contexts.take(&id, chunk(1, "a", "The cat ", false))?);
    assert!(!contexts.take(&id, chunk(2, "", "is red.\n", false))?);
    assert!(!contexts.take(&id, chunk(3, "b", "The dog is blue.", true))?);
    assert_eq!(contexts.text(&id)?, "The cat is red.\n\nThe dog is blue.");
    let documents = contexts.documents(&id)?;
    let places: Vec<_> = documents
        .iter()
        .map(|one| (one.first_seq, one.last_seq))
        .collect();
    assert_eq!(places, [(1, 2), (3, 3)]);
    assert!(documents.iter().all(|document| document.complete));
    Ok(())
}

#[test]
fn a_chunk_is_taken_once_and_in_order() -> Result<(), tonic::Status> {
    let (mut contexts, id) = one()?;
    contexts.take(&id, chunk(1, "a", "x", false))?;
    assert!(contexts.take(&id, chunk(1, "a", "x", false))?);
    let code = |contexts: &mut Contexts, chunk| contexts.take(&id, chunk).map_err(|no| no.code());
    assert_eq!(
        code(&mut contexts, chunk(1, "a", "y", false)),
        Err(Code::AlreadyExists)
    );
    assert_eq!(
        code(&mut contexts, chunk(3, "a", "y", false)),
        Err(Code::FailedPrecondition)
    );
    assert_eq!(
        code(&mut contexts, chunk(0, "a", "y", false)),
        Err(Code::InvalidArgument)
    );
    let ids = IngestChunk {
        content: Some(Content::TokenIds(TokenIds { ids: vec![1] })),
        ..chunk(2, "a", "", false)
    };
    assert_eq!(code(&mut contexts, ids), Err(Code::InvalidArgument));
    assert_eq!(contexts.text(&id)?, "x");
    Ok(())
}

#[test]
fn an_ended_or_forgotten_name_is_not_used_again() -> Result<(), tonic::Status> {
    let (mut contexts, id) = one()?;
    contexts.take(&id, chunk(1, "a", "x", true))?;
    let again = contexts
        .take(&id, chunk(2, "a", "y", true))
        .map_err(|no| no.code());
    assert_eq!(again, Err(Code::FailedPrecondition));
    let before = contexts.publish(&id)?.adapter_version;
    assert_eq!(contexts.publish(&id)?.adapter_version, before);
    assert_eq!(contexts.forget(&id, "a")?.adapter_version, before + 1);
    assert_eq!(contexts.text(&id)?, "");
    let again = contexts
        .take(&id, chunk(2, "a", "y", true))
        .map_err(|no| no.code());
    assert_eq!(again, Err(Code::FailedPrecondition));
    Ok(())
}

#[test]
fn what_is_too_much_is_refused_and_nothing_of_it_stays() -> Result<(), tonic::Status> {
    let (mut contexts, id) = one()?;
    let much = "x".repeat(BOUNDS.bytes);
    let code = contexts
        .take(&id, chunk(1, "a", &much, false))
        .map_err(|no| no.code());
    assert_eq!(code, Err(Code::ResourceExhausted));
    assert_eq!(contexts.session(&id)?.accepted_seq, 0);
    let fork = contexts.create(Some(&id))?;
    assert_eq!(fork.forked_from, id);
    let third = contexts.create(None).map_err(|no| no.code());
    assert_eq!(third.err(), Some(Code::ResourceExhausted));
    contexts.delete(&id)?;
    assert_eq!(
        contexts.session(&id).map_err(|no| no.code()).err(),
        Some(Code::NotFound)
    );
    let (page, more) = contexts.page("", 1)?;
    assert_eq!((page.len(), more), (1, false));
    Ok(())
}
