//! Names, pages, expiry, and what waits for an engine that reads nothing. What sessions do with an engine is tested end to end.

use std::time::{Duration, Instant, SystemTime};

use engine::Strategy;

use super::{Wanted, name::Names};
use crate::testing::{Rig, tenant};

#[test]
fn names_differ_and_sort_by_their_time() {
    let names = Names::default();
    let early = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let (a, b) = (
        names.next(early),
        names.next(early + Duration::from_secs(1)),
    );
    assert!(a < b && a.len() == 28 && a.starts_with("s_"), "{a} {b}");
    assert_ne!(names.next(early), names.next(early));
    assert_ne!(
        Names::default().next(early)[12..],
        Names::default().next(early)[12..]
    );
}

#[test]
fn a_page_token_is_read_by_its_tenant_and_its_server_only() {
    let names = Names::default();
    let token = names.page("acme", 300);
    assert_eq!(names.read_page("acme", &token).unwrap(), 300);
    assert!(names.read_page("other", &token).is_err());
    assert!(Names::default().read_page("acme", &token).is_err());
    for wrong in [
        "",
        "-",
        "12c",
        "12c-",
        &token.replace("12c", "12d"),
        &format!("0{token}"),
    ] {
        assert!(names.read_page("acme", wrong).is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn a_session_that_is_found_or_used_does_not_expire() {
    let mut rig = Rig::new();
    let ttl = Duration::from_secs(60);
    let session = rig.session(Some(ttl)).await;
    let sessions = &rig.shared.sessions;
    let (name, began) = (session.name.as_str(), Instant::now());
    let at = |seconds| began + Duration::from_secs(seconds);
    sessions.expire(at(59));
    assert!(sessions.get_at(&tenant(), name, at(59)).is_ok());
    // Found at 59: its time begins anew.
    sessions.expire(at(118));
    let user = sessions.get_at(&tenant(), name, at(118)).unwrap().user();
    sessions.expire(at(1000));
    assert!(sessions.get_at(&tenant(), name, at(1000)).is_ok());
    drop(user);
    // Over, but not yet looked for: unknown all the same.
    assert!(sessions.get_at(&tenant(), name, at(1060)).is_err());
    sessions.expire(at(1060));
    assert!(session.progress().borrow().closed);
    assert!(sessions.get_at(&tenant(), name, at(1000)).is_err());
}

#[tokio::test]
async fn a_list_has_no_session_whose_time_is_over() {
    let mut rig = Rig::new();
    let session = rig.session(Some(Duration::from_secs(60))).await;
    let listed = || rig.shared.sessions.list(&tenant(), 0, "").unwrap().sessions;
    assert_eq!(listed().len(), 1);
    session.about().used -= Duration::from_secs(61);
    assert!(listed().is_empty());
}

#[tokio::test]
async fn whoever_finds_a_session_while_others_expire_finds_a_live_one() {
    let mut rig = Rig::new();
    let ttl = Duration::from_secs(60);
    let began = Instant::now();
    for round in 1..100 {
        let session = rig.session(Some(ttl)).await;
        let over = began + ttl * (2 * round);
        let shared = rig.shared.clone();
        let reaper = std::thread::spawn(move || shared.sessions.expire(over));
        // At this moment it is not over: found, or ended before, but not both.
        let now = over - Duration::from_secs(1);
        let found = {
            session.touch(over - Duration::from_millis(60_500));
            rig.shared.sessions.get_at(&tenant(), &session.name, now)
        };
        reaper.join().unwrap();
        assert_eq!(found.is_ok(), !session.progress().borrow().closed);
        rig.shared.sessions.delete(&session);
    }
}

#[tokio::test]
async fn what_waits_for_an_engine_that_reads_nothing_is_bounded_flushes_too() {
    let mut rig = Rig::new();
    let session = rig.session(None).await;
    let chunk = store::Chunk {
        document: String::new(),
        content: store::Content::Text("a".to_owned()),
        end_of_document: false,
    };
    session.take(1, chunk).await.unwrap();
    // Each flush has one token and takes the room of 17; the mailbox and the feed's own hand hold some, the room of 64 the rest.
    let mut taken = 0;
    while let Ok(done) = tokio::time::timeout(Duration::from_millis(200), session.publish()).await {
        assert_eq!(done.unwrap(), Some(1));
        taken += 1;
        assert!(taken < 50, "flushes are taken without end");
    }
    assert!(taken >= 3, "{taken}");
    // The engine reads again, and the next is taken.
    while tokio::time::timeout(Duration::from_millis(200), rig.messages.recv())
        .await
        .is_ok()
    {}
    assert_eq!(session.publish().await.unwrap(), Some(1));
}

#[tokio::test]
async fn a_held_back_end_counts_in_tokens_and_not_in_bytes() {
    let mut rig = Rig::new();
    let shared = rig.shared.clone();
    let wanted = Wanted {
        strategy: Strategy::Concat,
        window: 8,
        labels: Default::default(),
        ttl: None,
    };
    let create = tokio::spawn(async move {
        let tenant = tenant();
        shared.sessions.create(&tenant, "", wanted).await.unwrap()
    });
    rig.open().await;
    let session = create.await.unwrap();
    let take = async |seq, text: &str| {
        let chunk = store::Chunk {
            document: String::new(),
            content: store::Content::Text(text.to_owned()),
            end_of_document: false,
        };
        session.take(seq, chunk).await
    };
    // A document of this session has at most 16 tokens.
    let text = rig.shared.text.clone();
    let word = (4..40)
        .map(|length| format!(" {}", "the".repeat(length)))
        .chain([
            "                                ".to_owned(),
            "the".to_owned(),
        ])
        .find(|word| {
            let tokens = text.encode(&format!("{word}\n\n")).unwrap().len();
            word.len() + 2 > 16 && tokens <= 16
        })
        .expect("a text of more bytes than tokens");
    take(1, &word).await.unwrap();
    take(2, &word.repeat(20)).await.unwrap_err();
}
