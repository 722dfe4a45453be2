//! Deadlines: what a call whose time is over leaves behind.

use engine::Command;
use imprint_proto::v1::{self, session_service_server::SessionService};
use tonic::{Code, Request, Status};

use super::Service;
use crate::{
    sessions::Session,
    testing::{Rig, tenant},
};

/// A call of a tenant that waits for a fifth of a second.
fn hurried<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(tenant());
    request
        .metadata_mut()
        .insert("grpc-timeout", "200m".parse().unwrap());
    request
}

fn late(status: &Status) {
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
}

async fn sessions(service: &Service) -> usize {
    let mut list = Request::new(v1::ListSessionsRequest::default());
    list.extensions_mut().insert(tenant());
    let list = service.list_sessions(list).await.unwrap();
    list.into_inner().sessions.len()
}

/// Tells the session the document `a`, whole, and sees the engine told of it.
async fn tell(rig: &mut Rig, session: &Session) {
    let chunk = store::Chunk {
        document: "a".to_owned(),
        content: store::Content::Text("some text".to_owned()),
        end_of_document: true,
    };
    session.take(1, chunk).await.unwrap();
    let (command, _) = rig.next().await;
    assert!(matches!(command, Command::Ingest { .. }), "{command:?}");
}

#[tokio::test]
async fn a_session_that_opens_too_late_ends_unless_it_can_be_asked_for_again() {
    for (request_id, left) in [("", 0), ("again", 1)] {
        let mut rig = Rig::new();
        let service = Service(rig.shared.clone());
        let create = v1::CreateSessionRequest {
            request_id: request_id.to_owned(),
            ..Default::default()
        };
        late(
            &service
                .create_session(hurried(create.clone()))
                .await
                .unwrap_err(),
        );
        rig.open().await;
        if left == 0 {
            let (command, _) = rig.next().await;
            assert!(matches!(command, Command::Close { .. }), "{command:?}");
        } else {
            service.create_session(hurried(create)).await.unwrap();
        }
        assert_eq!(sessions(&service).await, left);
    }
}

#[tokio::test]
async fn a_fork_that_opens_too_late_ends_and_its_source_stays() {
    let mut rig = Rig::new();
    let session = rig.session(None).await;
    let service = Service(rig.shared.clone());
    let fork = v1::ForkSessionRequest {
        session_id: session.name.clone(),
        ..Default::default()
    };
    late(&service.fork_session(hurried(fork)).await.unwrap_err());
    rig.open().await;
    let (command, _) = rig.next().await;
    assert!(
        matches!(command, Command::Close { session: of } if of != session.id),
        "{command:?}"
    );
    assert_eq!(sessions(&service).await, 1);
}

#[tokio::test]
async fn a_fork_that_waits_for_who_writes_until_it_is_late_never_begins() {
    let mut rig = Rig::new();
    let session = rig.session(None).await;
    let service = Service(rig.shared.clone());
    tell(&mut rig, &session).await;
    let fork = || v1::ForkSessionRequest {
        session_id: session.name.clone(),
        ..Default::default()
    };
    let writer = session.writer().await.unwrap();
    late(&service.fork_session(hurried(fork())).await.unwrap_err());
    drop(writer);
    session.publish().await.unwrap();
    let (command, _) = rig.next().await;
    assert!(matches!(command, Command::Publish { .. }), "{command:?}");
    assert_eq!(sessions(&service).await, 1);
    // A fork that is under way has a place, also when nobody waits for it any more.
    late(&service.fork_session(hurried(fork())).await.unwrap_err());
    let take = || rig.shared.requests.take(&tenant());
    let places: Vec<_> = (0..15).map(|_| take().unwrap()).collect();
    assert!(take().is_err());
    let refused = service.fork_session(hurried(fork())).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(places);
}

#[tokio::test]
async fn a_document_is_forgotten_by_the_deadline_or_stays_whole() {
    let mut rig = Rig::new();
    let session = rig.session(None).await;
    let service = Service(rig.shared.clone());
    tell(&mut rig, &session).await;
    let forget = || {
        hurried(v1::ForgetDocumentRequest {
            session_id: session.name.clone(),
            document_id: "a".to_owned(),
        })
    };
    // Somebody writes.
    let writer = session.writer().await.unwrap();
    let status = service.forget_document(forget()).await.unwrap_err();
    late(&status);
    assert!(
        status.message().contains("nothing is forgotten"),
        "{status:?}"
    );
    drop(writer);
    assert_eq!(session.document_count(), 1);
    let status = service.forget_document(forget()).await.unwrap_err();
    late(&status);
    assert!(status.message().contains("being forgotten"), "{status:?}");
    assert_eq!(session.document_count(), 0);
    let (command, _) = rig.next().await;
    assert!(matches!(command, Command::Forget { .. }), "{command:?}");
    // Once only: what comes next is what is asked next.
    session.publish().await.unwrap();
    let (command, _) = rig.next().await;
    assert!(matches!(command, Command::Publish { .. }), "{command:?}");
}
