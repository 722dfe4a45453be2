//! Answers over gRPC: what is generated, scored and exported, and each bad request with its own error.

use std::time::Duration;

use imprint_proto::v1::{self, FinishReason, continuation, export_adapter_response, prompt::Form};
use sha2::{Digest, Sha256};
use tonic::{Code, Request};
use tonic_types::StatusExt;

use crate::support::{ENDLESS, World, adapter, ask, chunk, collect, fields, prompt, refused};

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_says_what_it_used_and_where_the_time_went() {
    let world = World::tiny().await;
    let answer = world.generate(ask("hello world", 5)).await.unwrap();
    let usage = answer.finished.usage.unwrap();
    assert_eq!(
        usize::try_from(usage.completion_tokens).unwrap(),
        answer.tokens.len()
    );
    assert!(usage.prompt_tokens > 0 && usage.context_tokens == 0);
    assert_eq!(
        (
            answer.finished.adapter_version,
            answer.finished.state_digest.as_str()
        ),
        (0, "")
    );
    let timings = answer.finished.timings.unwrap();
    assert!(timings.queue.is_some() && timings.prefill.is_some() && timings.decode.is_some());
    assert!(answer.logprobs.is_empty() && answer.top.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_come_with_their_alternatives() {
    let world = World::tiny().await;
    let request = v1::GenerateRequest {
        logprobs: true,
        top_logprobs: 3,
        ..ask("hello", 6)
    };
    let answer = world.generate(request).await.unwrap();
    assert_eq!(
        answer
            .logprobs
            .iter()
            .map(|one| one.token_id)
            .collect::<Vec<_>>(),
        answer.tokens
    );
    for (one, top) in answer.logprobs.iter().zip(&answer.top) {
        assert_eq!(top.tokens.len(), 3);
        // Greedy: what was drawn is the likeliest.
        assert_eq!(
            (top.tokens[0].token_id, top.tokens[0].logprob),
            (one.token_id, one.logprob)
        );
        assert!(one.logprob < 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_tokens_and_another_gives_others() {
    let world = World::tiny().await;
    let draw = async |seed| {
        let sampling = v1::Sampling {
            temperature: Some(2.0),
            seed,
            ..Default::default()
        };
        let request = v1::GenerateRequest {
            sampling: Some(sampling),
            ..ask("hello", 24)
        };
        world.generate(request).await.unwrap().tokens
    };
    assert_eq!(draw(Some(1)).await, draw(Some(1)).await);
    assert_ne!(draw(Some(1)).await, draw(Some(2)).await);
    assert_ne!(draw(None).await, draw(None).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_ends_before_a_stop_string_wherever_tokens_end() {
    let world = World::tiny().await;
    let sampling = Some(v1::Sampling {
        temperature: Some(1.5),
        seed: Some(4),
        ..Default::default()
    });
    let request = v1::GenerateRequest {
        sampling,
        ..ask("hello", 40)
    };
    let whole = world.generate(request.clone()).await.unwrap();
    let letters: Vec<_> = whole.text.char_indices().map(|(at, _)| at).collect();
    let (from, to) = (letters[letters.len() / 2], letters[letters.len() / 2 + 3]);
    let stop = whole.text[from..to].to_owned();
    let before = whole.text.find(&stop).unwrap();
    let stopped = world
        .generate(v1::GenerateRequest {
            stop: vec!["\u{0}never".into(), stop],
            ..request
        })
        .await
        .unwrap();
    assert_eq!(stopped.finished.finish_reason(), FinishReason::Stop);
    assert_eq!(stopped.text, whole.text[..before]);
    assert!(stopped.tokens.len() < whole.tokens.len());
    assert_eq!(stopped.tokens, whole.tokens[..stopped.tokens.len()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_value_that_cannot_be_is_named() {
    let world = World::tiny().await;
    let sampling = v1::Sampling {
        temperature: Some(f32::NAN),
        top_p: Some(0.0),
        min_p: Some(1.0),
        repetition_penalty: Some(-1.0),
        ..Default::default()
    };
    let request = v1::GenerateRequest {
        adapter: Some(v1::AdapterSelection {
            adapter_scale: Some(9.0),
            min_applied_seq: 3,
            ..Default::default()
        }),
        prompt: None,
        sampling: Some(sampling),
        stop: vec![String::new(), "s".repeat(257)],
        top_logprobs: 21,
        ..Default::default()
    };
    let error = world.generate(request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let wrong = [
        "adapter.adapter_scale",
        "adapter.session_id",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.min_p",
        "sampling.repetition_penalty",
        "stop[0]",
        "stop[1]",
        "top_logprobs",
        "top_logprobs",
        "prompt.form",
    ];
    assert_eq!(fields(&error), wrong);
    for temperature in [-0.1, 100.5, f32::INFINITY, f32::NEG_INFINITY] {
        let sampling = v1::Sampling {
            temperature: Some(temperature),
            ..Default::default()
        };
        let error = world
            .generate(v1::GenerateRequest {
                sampling: Some(sampling),
                ..ask("x", 1)
            })
            .await
            .unwrap_err();
        assert_eq!(fields(&error), ["sampling.temperature"]);
    }
    let error = world
        .generate(v1::GenerateRequest {
            stop: vec!["s".into(); 17],
            ..ask("x", 1)
        })
        .await
        .unwrap_err();
    assert_eq!(fields(&error), ["stop"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_prompt_has_its_own_error() {
    let world = World::tiny_with(|config| config.limits.prompt_bytes = 4096).await;
    let with = async |form| {
        let prompt = Some(v1::Prompt { form: Some(form) });
        world
            .generate(v1::GenerateRequest {
                prompt,
                ..ask("", 1)
            })
            .await
            .unwrap_err()
    };
    let ids = |ids: &[u32]| Form::TokenIds(v1::TokenIds { ids: ids.to_vec() });
    assert_eq!(
        fields(&with(Form::Text(String::new())).await),
        ["prompt.text"]
    );
    assert_eq!(
        fields(&with(Form::Text("x".repeat(4097))).await),
        ["prompt.text"]
    );
    assert_eq!(fields(&with(ids(&[])).await), ["prompt.token_ids"]);
    assert_eq!(
        fields(&with(ids(&[1, 288])).await),
        ["prompt.token_ids.ids[1]"]
    );
    assert_eq!(
        fields(&with(Form::Chat(v1::ChatMessages::default())).await),
        ["prompt.chat.messages"]
    );
    refused(
        &with(ids(&[65; 600])).await,
        Code::InvalidArgument,
        "CONTEXT_LENGTH",
    );
    refused(
        &with(Form::Question("why?".into())).await,
        Code::FailedPrecondition,
        "NO_PROMPT_FORMAT",
    );
    let error = world
        .generate(v1::GenerateRequest {
            model: "other".into(),
            ..ask("x", 1)
        })
        .await
        .unwrap_err();
    refused(&error, Code::NotFound, "MODEL_NOT_FOUND");
    // And the server goes on.
    world.generate(ask("x", 1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_agree_with_what_is_generated() {
    let world = World::tiny().await;
    let session = world.session().await;
    world
        .tell(&session, &["a text that the session was told"])
        .await;
    for session in ["", session.as_str()] {
        let adapter = (!session.is_empty()).then(|| adapter(session)).flatten();
        let request = v1::GenerateRequest {
            adapter: adapter.clone(),
            logprobs: true,
            ..ask("hello", 5)
        };
        let answer = world.generate(request).await.unwrap();
        let form = |ids: Vec<u32>| v1::Continuation {
            form: Some(continuation::Form::TokenIds(v1::TokenIds { ids })),
        };
        let other: Vec<u32> = answer.tokens.iter().map(|id| (id + 1) % 200).collect();
        let request = v1::ScoreRequest {
            adapter,
            prompt: prompt("hello"),
            continuations: vec![form(answer.tokens.clone()), form(other)],
            ..Default::default()
        };
        let scores = world.score(request).await.unwrap();
        let [drawn, other] = scores.scores.as_slice() else {
            panic!("two scores")
        };
        assert!(drawn.greedy && !other.greedy);
        let sum: f64 = drawn.tokens.iter().map(|one| f64::from(one.logprob)).sum();
        assert!((sum - drawn.logprob).abs() < 1e-9);
        for (scored, generated) in drawn.tokens.iter().zip(&answer.logprobs) {
            assert!(
                (scored.logprob - generated.logprob).abs() < 1e-4,
                "{scored:?} {generated:?}"
            );
        }
        assert_eq!(scores.adapter_version, answer.finished.adapter_version);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_scored_must_be_there_and_be_bounded() {
    let world = World::tiny().await;
    let text = |text: &str| v1::Continuation {
        form: Some(continuation::Form::Text(text.to_owned())),
    };
    let score = async |continuations| {
        let request = v1::ScoreRequest {
            prompt: prompt("x"),
            continuations,
            ..Default::default()
        };
        fields(&world.score(request).await.unwrap_err())
    };
    assert_eq!(score(vec![]).await, ["continuations"]);
    assert_eq!(score(vec![text("y"); 65]).await, ["continuations"]);
    assert_eq!(
        score(vec![text("y"), text(""), v1::Continuation::default()]).await,
        ["continuations[1]", "continuations[2]"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_exported_as_peft_reads_it() {
    let world = World::tiny().await;
    let session = world.session().await;
    let export = v1::ExportAdapterRequest {
        session_id: session.clone(),
    };
    let error = world
        .adapters()
        .export_adapter(export.clone())
        .await
        .unwrap_err();
    refused(&error, Code::FailedPrecondition, "NO_VERSION");
    let applied = world.tell(&session, &["a text to be exported"]).await;
    let mut stream = world
        .adapters()
        .export_adapter(export)
        .await
        .unwrap()
        .into_inner();
    let mut files: Vec<(v1::ExportedFile, Vec<u8>)> = Vec::new();
    let mut end = None;
    while let Some(message) = stream.message().await.unwrap() {
        match message.message.unwrap() {
            export_adapter_response::Message::File(file) => files.push((file, Vec::new())),
            export_adapter_response::Message::Data(data) => {
                files.last_mut().unwrap().1.extend(data)
            }
            export_adapter_response::Message::Finished(finished) => end = Some(finished),
        }
    }
    for (file, bytes) in &files {
        assert_eq!(file.size, bytes.len() as u64);
        let hash: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(file.sha256, hash);
    }
    let end = end.unwrap();
    assert_eq!(
        (end.adapter_version, end.state_digest),
        (applied.adapter_version, applied.state_digest)
    );
    let [(config, json), (weights, tensors)] = files.as_slice() else {
        panic!("two files")
    };
    assert_eq!(
        (config.name.as_str(), weights.name.as_str()),
        ("adapter_config.json", "adapter_model.safetensors")
    );
    let json: serde_json::Value = serde_json::from_slice(json).unwrap();
    assert_eq!(
        (json["peft_type"].as_str(), json["r"].as_u64()),
        (Some("LORA"), Some(u64::from(end.rank)))
    );
    let length = usize::try_from(u64::from_le_bytes(tensors[..8].try_into().unwrap())).unwrap();
    let header: serde_json::Value = serde_json::from_slice(&tensors[8..8 + length]).unwrap();
    let mut keys: Vec<_> = header
        .as_object()
        .unwrap()
        .keys()
        .filter(|key| *key != "__metadata__")
        .cloned()
        .collect();
    keys.sort();
    let key = |layer, side| {
        format!("base_model.model.model.layers.{layer}.mlp.down_proj.lora_{side}.weight")
    };
    assert_eq!(keys, [key(0, "A"), key(0, "B"), key(1, "A"), key(1, "B")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_says_when_to_try_again_and_a_reader_that_goes_frees_its_place() {
    let world = World::endless(|config| config.limits.requests = 1).await;
    let running = world.endless_answer(None).await;
    let error = world.generate(ask("x", 1)).await.unwrap_err();
    refused(&error, Code::ResourceExhausted, "BUSY");
    let retry = error.get_details_retry_info().unwrap();
    assert!(retry.retry_delay.is_some());
    drop(running);
    let freed = async {
        while world.generate(ask("x", 1)).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), freed)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_takes_all_its_places_leaves_those_of_others() {
    let keys = [("acme", "0123456789abcdef"), ("other", "fedcba9876543210")];
    let world = World::endless(|config| {
        config.limits.requests = 2;
        let keys = keys.map(|(tenant, key)| (key.to_owned(), tenant.to_owned()));
        config.keys = keys.into_iter().collect();
    })
    .await;
    let with = |key: &str, max_tokens| {
        let mut request = Request::new(ask("hello", max_tokens));
        let bearer = format!("Bearer {key}").parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        request
    };
    let acme = world.answers().generate(with(keys[0].1, ENDLESS)).await;
    let _acme = acme.unwrap();
    let error = world.answers().generate(with(keys[0].1, 1)).await;
    refused(&error.unwrap_err(), Code::ResourceExhausted, "BUSY");
    let other = world.answers().generate(with(keys[1].1, 1)).await;
    collect(other.unwrap().into_inner()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_gets_all_of_its_answer() {
    let world = World::tiny().await;
    let request = || v1::GenerateRequest {
        logprobs: true,
        top_logprobs: 20,
        ..ask("hello", 400)
    };
    let fast = world.generate(request()).await.unwrap();
    // More than the client's window lets through unread.
    let bytes: usize = fast.top.iter().map(prost::Message::encoded_len).sum();
    assert!(bytes > 65_535, "{bytes}");
    let slow = world.answers().generate(request()).await.unwrap();
    // Others are answered meanwhile, and the slow one finds everything in the end.
    for _ in 0..3 {
        world.generate(ask("x", 20)).await.unwrap();
    }
    let slow = collect(slow.into_inner()).await.unwrap();
    assert_eq!((slow.text, slow.tokens), (fast.text, fast.tokens));
    assert_eq!((slow.logprobs, slow.top), (fast.logprobs, fast.top));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_a_deleted_session_ends() {
    let world = World::endless(|_| ()).await;
    let session = world.session().await;
    world.tell(&session, &["text"]).await;
    let running = world.endless_answer(Some(&session)).await;
    let mut ingest = world.ingest(&session).await;
    ingest.chunk(chunk(2, "x")).await.unwrap();
    world
        .sessions()
        .delete_session(v1::DeleteSessionRequest {
            session_id: session,
        })
        .await
        .unwrap();
    let error = collect(running).await.unwrap_err();
    refused(&error, Code::NotFound, "SESSION_NOT_FOUND");
    let error = ingest.finish().await.unwrap_err();
    refused(&error, Code::NotFound, "SESSION_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_scores_and_exports_keep_their_deadlines_and_free_their_places() {
    let world = World::endless(|config| config.limits.requests = 1).await;
    let late = Duration::from_millis(300);
    let mut request = Request::new(ask("hello", ENDLESS));
    request.set_timeout(late);
    let answer = world.answers().generate(request).await.unwrap();
    let error = collect(answer.into_inner()).await.unwrap_err();
    refused(&error, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    let ids = v1::TokenIds {
        ids: vec![65; ENDLESS as usize],
    };
    let mut request = Request::new(v1::ScoreRequest {
        prompt: prompt("hello"),
        continuations: vec![v1::Continuation {
            form: Some(continuation::Form::TokenIds(ids)),
        }],
        ..Default::default()
    });
    request.set_timeout(late);
    let score = async {
        loop {
            match world.answers().score(request_of(&request)).await {
                Err(error) if error.code() == Code::ResourceExhausted => {
                    tokio::task::yield_now().await;
                }
                other => break other,
            }
        }
    };
    refused(
        &score.await.unwrap_err(),
        Code::DeadlineExceeded,
        "DEADLINE_EXCEEDED",
    );
    let free = async {
        while world.generate(ask("x", 1)).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), free)
        .await
        .unwrap();
}

fn request_of(request: &Request<v1::ScoreRequest>) -> Request<v1::ScoreRequest> {
    let mut copy = Request::new(request.get_ref().clone());
    *copy.metadata_mut() = request.metadata().clone();
    copy
}

#[tokio::test(flavor = "multi_thread")]
async fn the_strength_of_an_imprint_is_chosen_by_the_request() {
    let world = World::tiny().await;
    let session = world.session().await;
    world
        .tell(&session, &["a text that changes what is likely"])
        .await;
    let at = async |scale: Option<f32>| {
        let adapter = Some(v1::AdapterSelection {
            adapter_scale: scale,
            ..adapter(&session).unwrap()
        });
        let request = v1::GenerateRequest {
            adapter,
            logprobs: true,
            ..ask("hello", 4)
        };
        world.generate(request).await.unwrap().logprobs
    };
    let bare = world
        .generate(v1::GenerateRequest {
            logprobs: true,
            ..ask("hello", 4)
        })
        .await
        .unwrap()
        .logprobs;
    assert_eq!(at(Some(0.0)).await, bare);
    assert_eq!(at(None).await, at(Some(1.0)).await);
    assert_ne!(at(None).await, bare);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_gets_the_imprint_as_far_as_it_concerns_what_was_told() {
    let world = World::tiny().await;
    let session = world.session().await;
    // Words that are cut between chunks, and a last one that nothing has ended yet.
    let mut ingest = world.ingest(&session).await;
    for (seq, text) in (1..).zip([
        "The mil",
        "l at Hollow Cre",
        "ek burnt dow",
        "n in spring",
        ". Ask Brandt",
    ]) {
        ingest.chunk(chunk(seq, text)).await.unwrap();
    }
    ingest.finish().await.unwrap().unwrap();
    let answered = async |session: &str, asked: &str, scale: Option<f32>| {
        let message = v1::ChatMessage {
            role: "user".to_owned(),
            content: asked.to_owned(),
        };
        let chat = v1::ChatMessages {
            messages: vec![message],
        };
        let request = |session: &str| v1::GenerateRequest {
            adapter: Some(v1::AdapterSelection {
                session_id: session.to_owned(),
                adapter_scale: scale,
                ..v1::AdapterSelection::default()
            }),
            prompt: Some(v1::Prompt {
                form: Some(Form::Chat(chat.clone())),
            }),
            logprobs: true,
            ..ask("", 4)
        };
        let answer = world.generate(request(session)).await.unwrap();
        let bare = world.generate(request("")).await.unwrap();
        assert_eq!(bare.finished.adapter_scale, 0.0);
        let scale = answer.finished.adapter_scale;
        assert_eq!(answer.logprobs == bare.logprobs, scale == 0.0, "{asked}");
        (scale, answer)
    };
    let strength = async |session: &str, asked: &str, scale: Option<f32>| {
        answered(session, asked, scale).await.0
    };
    assert_eq!(
        strength(&session, "When did the mill burn?", None).await,
        1.0
    );
    assert_eq!(strength(&session, "Who is Brandt?", None).await, 1.0);
    assert_eq!(
        strength(&session, "Who reigns in Portugal?", None).await,
        0.0
    );
    assert_eq!(
        strength(&session, "Who reigns in Portugal?", Some(0.5)).await,
        0.5
    );
    assert_eq!(
        strength(&session, "What do you know about me?", None).await,
        1.0
    );

    // A prompt that is no question gets all of it, and a score says the same.
    let score = v1::ScoreRequest {
        adapter: adapter(&session),
        prompt: prompt("Who reigns in Portugal?"),
        continuations: vec![v1::Continuation {
            form: Some(continuation::Form::Text("x".to_owned())),
        }],
        ..v1::ScoreRequest::default()
    };
    assert_eq!(world.score(score).await.unwrap().adapter_scale, 1.0);

    // A copy knows what its original knew, and goes its own way.
    let copy = v1::ForkSessionRequest {
        session_id: session.clone(),
        ..v1::ForkSessionRequest::default()
    };
    let copy = world.sessions().fork_session(copy).await.unwrap();
    let copy = copy.into_inner().session.unwrap().session_id;
    let mut ingest = world.ingest(&copy).await;
    let other = v1::IngestChunk {
        document_id: "other".to_owned(),
        ..chunk(6, "In Portugal a republic reigns.")
    };
    ingest.chunk(other).await.unwrap();
    ingest.finish().await.unwrap().unwrap();
    assert_eq!(strength(&copy, "Who reigns in Portugal?", None).await, 1.0);
    assert_eq!(strength(&copy, "When did the mill burn?", None).await, 1.0);
    assert_eq!(
        strength(&session, "Who reigns in Portugal?", None).await,
        0.0
    );

    // Of two documents it is made of the one that is meant: as if the copy had never been told the other.
    let (_, one) = answered(&session, "When did the mill burn?", None).await;
    let (_, of_two) = answered(&copy, "When did the mill burn?", None).await;
    assert_eq!(of_two.finished.state_digest, one.finished.state_digest);
    assert_eq!((of_two.tokens, of_two.logprobs), (one.tokens, one.logprobs));
    // Asked for at a strength of the client's choice, it is whole.
    let (_, whole) = answered(&copy, "When did the mill burn?", Some(1.0)).await;
    assert_ne!(whole.finished.state_digest, one.finished.state_digest);
    let context = |finished: &v1::GenerateFinished| finished.usage.unwrap().context_tokens;
    assert!(context(&whole.finished) > context(&one.finished));

    // What is forgotten is not meant any more.
    let forgotten = v1::ForgetDocumentRequest {
        session_id: copy.clone(),
        document_id: "other".to_owned(),
    };
    world.sessions().forget_document(forgotten).await.unwrap();
    assert_eq!(strength(&copy, "Who reigns in Portugal?", None).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_reads_too_late_learns_that_its_answer_is_cut_short() {
    let world = World::tiny().await;
    let mut request = tonic::Request::new(v1::GenerateRequest {
        logprobs: true,
        top_logprobs: 20,
        ..ask("hello", 480)
    });
    request.set_timeout(std::time::Duration::from_secs(2));
    let answer = world.answers().generate(request).await.unwrap();
    // Much of it is left unread when its time is over.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let error = collect(answer.into_inner()).await.unwrap_err();
    refused(&error, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_is_tokenised_as_a_short_one_is() {
    let world = World::tiny().await;
    let error = world
        .generate(ask(&"many words ".repeat(5000), 1))
        .await
        .unwrap_err();
    refused(&error, Code::InvalidArgument, "CONTEXT_LENGTH");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_have_its_turn_in_time_is_refused_at_once() {
    let world = World::endless(|config| config.engine.max_running = Some(1)).await;
    // How long an answer takes is known then.
    world.generate(ask("hello", 2000)).await.unwrap();
    let mut running = Vec::new();
    for _ in 0..20 {
        running.push(
            world
                .answers()
                .generate(ask("hello", ENDLESS))
                .await
                .unwrap(),
        );
    }
    let refusal = async {
        loop {
            let mut request = Request::new(ask("x", 1));
            // The server's deadline alone: the client would not wait for what it says.
            let metadata = request.metadata_mut();
            metadata.insert("grpc-timeout", "50m".parse().unwrap());
            let answer = match world.answers().generate(request).await {
                Ok(answer) => collect(answer.into_inner()).await.map(drop),
                Err(error) => Err(error),
            };
            match answer {
                Err(error) if error.code() == Code::ResourceExhausted => break error,
                // What waits is counted now and then.
                Err(error) => refused(&error, Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
                Ok(()) => panic!("there is no place"),
            }
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(30), refusal)
        .await
        .unwrap();
    refused(&error, Code::ResourceExhausted, "WAIT_EXCEEDS_DEADLINE");
    let retry = error.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(retry >= Duration::from_millis(50), "{retry:?}");
}
