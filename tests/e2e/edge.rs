//! The edge: health, reflection, messages that cannot be read, models, and files that cannot be served.

use std::fs;

use imprint_proto::v1::{self, model_service_client::ModelServiceClient};
use server::Server;
use testkit::{GeneratorSpec, TinySpec, tiny_base, tiny_generator};
use tonic::{Code, codegen::http::uri::PathAndQuery};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1 as reflection, v1alpha as reflection_alpha};

use crate::support::{World, ask, chunk, refused, tiny};

const SERVICES: [&str; 5] = [
    "imprint.v1.AdapterService",
    "imprint.v1.ContextService",
    "imprint.v1.GenerationService",
    "imprint.v1.ModelService",
    "imprint.v1.SessionService",
];

#[tokio::test(flavor = "multi_thread")]
async fn all_services_are_healthy() {
    let world = World::tiny().await;
    let mut client = HealthClient::new(world.channel.clone());
    for service in SERVICES.into_iter().chain([""]) {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = client.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_services_are_told_by_reflection_in_both_its_versions() {
    let world = World::tiny().await;
    let mut client =
        reflection::server_reflection_client::ServerReflectionClient::new(world.channel.clone());
    let ask = |message| reflection::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message),
    };
    let list =
        ask(reflection::server_reflection_request::MessageRequest::ListServices(String::new()));
    let file = ask(
        reflection::server_reflection_request::MessageRequest::FileContainingSymbol(
            SERVICES[1].to_owned(),
        ),
    );
    let mut answers = client
        .server_reflection_info(tokio_stream::iter([list, file]))
        .await
        .unwrap()
        .into_inner();
    let mut next = async || {
        answers
            .message()
            .await
            .unwrap()
            .unwrap()
            .message_response
            .unwrap()
    };
    let reflection::server_reflection_response::MessageResponse::ListServicesResponse(list) =
        next().await
    else {
        panic!("a list")
    };
    let names: Vec<_> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    assert!(
        SERVICES
            .iter()
            .all(|service| names.iter().any(|name| name == service)),
        "{names:?}"
    );
    assert!(
        names.iter().any(|name| name == "grpc.health.v1.Health"),
        "{names:?}"
    );
    let reflection::server_reflection_response::MessageResponse::FileDescriptorResponse(file) =
        next().await
    else {
        panic!("a file")
    };
    assert!(!file.file_descriptor_proto.is_empty());

    let mut client = reflection_alpha::server_reflection_client::ServerReflectionClient::new(
        world.channel.clone(),
    );
    let message =
        reflection_alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = reflection_alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message),
    };
    let mut answers = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    assert!(answers.message().await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_tells_what_it_is() {
    let world = World::tiny().await;
    let mut client = ModelServiceClient::new(world.channel.clone());
    let model = client
        .get_model(v1::GetModelRequest::default())
        .await
        .unwrap()
        .into_inner()
        .model
        .unwrap();
    assert_eq!(
        (model.architecture.as_str(), model.layers, model.vocab_size),
        ("llama", 2, 288)
    );
    let generator = model.generator.clone().unwrap();
    assert_eq!(
        (generator.write.as_str(), generator.read_out.as_str()),
        ("associative", "ridge")
    );
    assert_eq!((generator.window, generator.sites.len()), (8, 2));
    assert!(model.digest.len() == 64 && generator.digest.len() == 64);
    let listed = client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(listed, [model]);
    let error = client
        .get_model(v1::GetModelRequest {
            name: "other".into(),
        })
        .await
        .unwrap_err();
    refused(&error, Code::NotFound, "MODEL_NOT_FOUND");
}

/// A request whose string is not UTF-8.
#[derive(Clone, PartialEq, prost::Message)]
struct Raw {
    #[prost(bytes = "vec", tag = "1")]
    session_id: Vec<u8>,
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_is_not_utf8_is_the_callers_fault() {
    let world = World::tiny().await;
    let mut grpc = tonic::client::Grpc::new(world.channel.clone());
    let raw = || Raw {
        session_id: vec![0x66, 0xff, 0xfe],
    };
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<Raw, v1::GetSessionResponse>::default();
    let path = PathAndQuery::from_static("/imprint.v1.SessionService/GetSession");
    let error = grpc
        .unary(tonic::Request::new(raw()), path, codec)
        .await
        .unwrap_err();
    refused(&error, Code::InvalidArgument, "MALFORMED_MESSAGE");
    // In a stream: field 1 of IngestRequest is `open`, which begins with the session's name.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Open {
        #[prost(message, tag = "1")]
        open: Option<Raw>,
    }
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<Open, v1::IngestResponse>::default();
    let path = PathAndQuery::from_static("/imprint.v1.ContextService/Ingest");
    let messages = tokio_stream::once(Open { open: Some(raw()) });
    let mut answers = grpc
        .streaming(tonic::Request::new(messages), path, codec)
        .await
        .unwrap()
        .into_inner();
    refused(
        &answers.message().await.unwrap_err(),
        Code::InvalidArgument,
        "MALFORMED_MESSAGE",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_over_the_limit_is_refused_and_the_server_goes_on() {
    let world = World::tiny_with(|config| {
        config.limits.chunk_bytes = 1024;
        config.limits.prompt_bytes = 1024;
    })
    .await;
    let error = world
        .generate(ask(&"x".repeat(100_000), 1))
        .await
        .unwrap_err();
    refused(&error, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    world.generate(ask("x", 1)).await.unwrap();
    let session = world.session().await;
    let mut ingest = world.ingest(&session).await;
    let error = ingest.chunk(chunk(1, &"x".repeat(100_000))).await;
    refused(
        &error.unwrap_err(),
        Code::ResourceExhausted,
        "MESSAGE_TOO_LARGE",
    );
    world.tell(&session, &["x"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_generator_only_the_bare_model_answers() {
    let world = World::tiny_with(|config| config.generator = "none".into()).await;
    world.generate(ask("x", 1)).await.unwrap();
    let error = world
        .create(v1::CreateSessionRequest::default())
        .await
        .unwrap_err();
    refused(&error, Code::FailedPrecondition, "NO_GENERATOR");
}

/// What a server says that cannot start, its causes included.
async fn says(change: impl FnOnce(&mut server::Config, &std::path::Path)) -> String {
    let (folder, mut config) = tiny();
    change(&mut config, folder.path());
    let error = Server::start(config).await.unwrap_err();
    let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| {
        error.source()
    });
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_no_model_or_no_generator_for_it_are_refused_by_name() {
    let truncated = says(|_, folder| {
        let weights = folder.join("base/model.safetensors");
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    })
    .await;
    assert!(truncated.contains("model.safetensors"), "{truncated}");
    let lying = says(|_, folder| {
        fs::write(
            folder.join("base/model.safetensors"),
            u64::MAX.to_le_bytes(),
        )
        .unwrap();
    })
    .await;
    assert!(lying.contains("model.safetensors"), "{lying}");
    let gguf = says(|config, folder| {
        let path = folder.join("x.gguf");
        fs::write(&path, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff").unwrap();
        config.model = path.into_os_string().into_string().unwrap();
    })
    .await;
    assert!(gguf.contains("x.gguf"), "{gguf}");
    let shapes = says(|config, folder| {
        let other = TinySpec {
            hidden: 64,
            ..TinySpec::default()
        };
        let (base, generator) = (folder.join("other"), folder.join("foreign"));
        tiny_base(&base, &other);
        tiny_generator(&generator, &other, &GeneratorSpec::default());
        config.generator = generator.into_os_string().into_string().unwrap();
    })
    .await;
    assert!(shapes.contains("fastlora"), "{shapes}");
    let base = says(|config, folder| {
        let generator = folder.join("foreign");
        let form = GeneratorSpec {
            base_digest: Some("ab".repeat(32)),
            ..GeneratorSpec::default()
        };
        tiny_generator(&generator, &TinySpec::default(), &form);
        config.generator = generator.into_os_string().into_string().unwrap();
    })
    .await;
    assert!(base.contains(&"ab".repeat(32)), "{base}");
    let nothing = says(|config, _| config.model = "/no/such/model".into()).await;
    assert!(nothing.contains("/no/such/model"), "{nothing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_taken_is_named() {
    let world = World::tiny().await;
    let address = world.running.address();
    let said = says(|config, _| config.listen = address).await;
    assert!(said.contains(&address.to_string()), "{said}");
}
