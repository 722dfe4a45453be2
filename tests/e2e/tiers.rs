//! A server whose memory holds fewer sessions than it has: they answer as those of one that holds all.

use imprint_proto::v1;

use crate::support::*;

/// What each session answers, in whole and to one document.
async fn answers(world: &World, sessions: &[String]) -> Vec<(Vec<u32>, String)> {
    let mut answers = Vec::new();
    for prompt in ["hello", "word three"] {
        for session in sessions {
            let request = v1::GenerateRequest {
                adapter: adapter(session),
                ..ask(prompt, 6)
            };
            let answer = world.generate(request).await.unwrap();
            answers.push((answer.tokens, answer.finished.state_digest));
        }
    }
    answers
}

async fn told(world: &World) -> Vec<String> {
    let mut sessions = Vec::new();
    for number in 0..6 {
        let session = world.session().await;
        let first = format!("word {number} of a text that is longer than a window");
        world.tell(&session, &[&first, "word three and four"]).await;
        sessions.push(session);
    }
    sessions
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_left_memory_answer_as_if_they_had_not_and_nothing_is_left_behind() {
    let roomy = World::tiny().await;
    let sessions = told(&roomy).await;
    let want = answers(&roomy, &sessions).await;
    let core = roomy.get(&sessions[0]).await.unwrap().core_bytes;
    for (budget, rate) in [(0, 0), (1 << 20, 1 << 20), (2000, 1 << 20)] {
        let folder = tempfile::tempdir().unwrap();
        let world = World::tiny_with(|config| {
            config.engine.core_budget_bytes = Some(usize::try_from(2 * core).unwrap());
            config.engine.snapshot_budget_bytes = Some(budget);
            config.engine.snapshot_bytes_per_token = Some(rate);
            config.data = Some(folder.path().to_owned());
        })
        .await;
        let sessions = told(&world).await;
        assert_eq!(answers(&world, &sessions).await, want);
        let files =
            || std::fs::read_dir(folder.path().join("snapshots")).map_or(0, Iterator::count);
        assert_eq!(files() > 0, budget > 0);
        for session_id in sessions {
            let request = v1::DeleteSessionRequest { session_id };
            world.sessions().delete_session(request).await.unwrap();
        }
        world.end().await;
        // The thread that keeps them ends soon after the engine.
        let gone = async {
            while files() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), gone)
            .await
            .unwrap();
    }
}
