//! The real model with the generator that ships: a text becomes an adapter, and answers know it.

use imprint_proto::v1::{self, continuation, prompt::Form};

use crate::support::{World, adapter, ask};

const TEXT: &str = "The lighthouse at Gull Point was built in 1879 by the engineer Ilse Brandt. Its keeper is called Pedro Núñez. \
The lamp burns whale oil and can be seen for seventeen miles.";

#[tokio::test(flavor = "multi_thread")]
async fn a_told_session_knows_what_the_bare_model_does_not() {
    let world = World::smollm2().await;
    let session = world.session().await;
    let applied = world.tell(&session, &[TEXT]).await;
    assert!(applied.adapter_version >= 1 && applied.tokens > 30);
    let score = async |adapter| {
        let question = "Who built the lighthouse at Gull Point?".to_owned();
        let request = v1::ScoreRequest {
            adapter,
            prompt: Some(v1::Prompt {
                form: Some(Form::Question(question)),
            }),
            continuations: vec![v1::Continuation {
                form: Some(continuation::Form::Text(" Ilse Brandt".into())),
            }],
            ..Default::default()
        };
        world.score(request).await.unwrap()
    };
    let (told, bare) = (score(adapter(&session)).await, score(None).await);
    // Nothing of the text is in the prompt.
    assert_eq!(told.prompt_tokens, bare.prompt_tokens);
    assert!(
        told.scores[0].logprob > bare.scores[0].logprob + 3.0,
        "{told:?} {bare:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_bounds_agree_with_each_other_for_the_generator_that_ships() {
    let world = World::smollm2().await;
    let session = world.session().await;
    world.tell(&session, &["A short text about nothing."]).await;
    let session = world.get(&session).await.unwrap();
    let bounds = engine::Config::default();
    let (states, core) = (
        usize::try_from(session.state_bytes).unwrap(),
        usize::try_from(session.core_bytes).unwrap(),
    );
    // Beside as many open documents as requests run, two hundred sessions of one document rest with all that they hold.
    let reading = bounds.max_running * 5 * states / 2;
    assert!(200 * states + reading <= bounds.state_budget_bytes);
    assert!((200 + 2 * bounds.max_running) * core <= bounds.core_budget_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_model_chats_and_stops() {
    let world = World::smollm2().await;
    let message = v1::ChatMessage {
        role: "user".into(),
        content: "Say hello.".into(),
    };
    let chat = v1::Prompt {
        form: Some(Form::Chat(v1::ChatMessages {
            messages: vec![message],
        })),
    };
    let answer = world
        .generate(v1::GenerateRequest {
            prompt: Some(chat),
            ..ask("", 24)
        })
        .await
        .unwrap();
    assert!(
        !answer.text.is_empty() && !answer.text.contains("<|im_end|>"),
        "{answer:?}"
    );
    let stopped = world.generate(v1::GenerateRequest {
        stop: vec![" ".into()],
        ..ask("The capital of France is", 8)
    });
    let stopped = stopped.await.unwrap();
    assert!(!stopped.text.contains(' '), "{stopped:?}");
    world.end().await;
}
