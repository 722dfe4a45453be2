//! The verbs as typed, against a server in memory.

use std::{
    fs, io,
    io::Write,
    sync::{Arc, Mutex},
};

use clap::{CommandFactory as _, Parser};
use serde_json::Value;

use super::{Failure, Output, Verb, chat, quiet_pipe, run_with, unescape};
use crate::fake::{Fake, Quirk};

#[derive(Debug, Parser)]
struct Program {
    #[command(subcommand)]
    verb: Verb,
}

/// What was written, kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Kept {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn parse(words: &[&str]) -> Result<Verb, clap::Error> {
    let words = ["imprint"].iter().chain(words);
    Program::try_parse_from(words).map(|program| program.verb)
}

/// Runs a verb against the fake; what it wrote, or why it failed.
async fn say(fake: &Fake, words: &[&str]) -> Result<String, Failure> {
    let words = [words, &["--endpoint", fake.endpoint()]].concat();
    let verb = parse(&words).unwrap();
    let kept = Kept::default();
    let mut output = Output::new(verb.connection().json, Box::new(kept.clone()));
    run_with(verb, &mut output).await?;
    Ok(kept.text())
}

/// The same with `--json`: one value a line.
async fn json(fake: &Fake, words: &[&str]) -> Vec<Value> {
    let text = say(fake, &[words, &["--json"]].concat()).await.unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_verbs_are_well_formed() {
    Program::command().debug_assert();
}

#[test]
fn defaults_are_the_documented_ones() {
    let Verb::Ask(ask) = parse(&["ask", "why?"]).unwrap() else {
        panic!("not ask")
    };
    assert_eq!(
        (ask.question.as_str(), ask.session, ask.draw.max_tokens),
        ("why?", None, 128)
    );
    assert_eq!(ask.connection.endpoint, "http://127.0.0.1:7461");
    assert!(!ask.connection.json);
}

#[test]
fn options_of_the_connection_may_stand_after_the_action() {
    let verb = parse(&["session", "ls", "--json", "--endpoint", "http://h:1"]).unwrap();
    assert!(verb.connection().json);
    assert_eq!(verb.connection().endpoint, "http://h:1");
}

#[test]
fn wrong_commands_are_refused_before_anything_is_sent() {
    for words in [
        &["ingest", "file"][..],
        &["ingest", "--session", "new", "--chunk-bytes", "4", "file"],
        &["session", "create", "--label", "novalue"],
        &["session", "create", "--strategy", "other"],
        &["session", "rm"],
        &["score", " a"],
        &["score", "--question", "q", "--prompt", "p", " a"],
        &["ask", "q", "--stop", "\\q"],
        &["ask", "q", "--timeout", "0"],
    ] {
        assert_eq!(parse(words).unwrap_err().exit_code(), 2, "{words:?}");
    }
}

#[test]
fn escapes_are_what_a_shell_user_means() {
    assert_eq!(unescape(r"a\n\t\\n").unwrap(), "a\n\t\\n");
    assert!(unescape(r"a\").is_err());
}

#[tokio::test]
async fn a_file_goes_in_and_its_session_answers() {
    let fake = Fake::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("harbour.txt");
    fs::write(&file, "It was founded by Agnes Thorvald.").unwrap();
    let file = file.to_str().unwrap();

    let lines = json(
        &fake,
        &["ingest", "--session", "new", "--chunk-bytes", "16", file],
    )
    .await;
    let done = lines.last().unwrap();
    assert_eq!(done["document_id"], "harbour.txt");
    assert_eq!((&done["chunks"], &done["bytes"]), (&3.into(), &33.into()));
    assert_eq!(done["applied"]["seq"], 3);
    assert_eq!(lines[0]["applied"]["adapter_version"], 1);
    let session = done["session_id"].as_str().unwrap();

    let question = "Who founded Brannock Haven?";
    assert_eq!(
        say(&fake, &["ask", "--session", session, question])
            .await
            .unwrap(),
        "Agnes Thorvald\n"
    );
    assert_eq!(
        say(&fake, &["ask", question]).await.unwrap(),
        "no\u{fffd}idea\n"
    );
    let answer = &json(&fake, &["ask", "--session", session, question]).await[0];
    assert_eq!(answer["text"], " Agnes Thorvald");
    assert_eq!(answer["finish_reason"], "stop");
    assert_eq!(answer["adapter_version"], 1);

    let score = [
        "score",
        "--session",
        session,
        "--question",
        question,
        " Agnes Thorvald",
        " Joe",
    ];
    let scores = &json(&fake, &score).await[0]["scores"];
    assert_eq!(
        (&scores[0]["logprob"], &scores[1]["logprob"]),
        (&(-0.5).into(), &(-12.0).into())
    );
    let table = say(&fake, &score).await.unwrap();
    assert!(
        table.contains(" -0.500       1  yes     \" Agnes Thorvald\""),
        "{table}"
    );
}

#[tokio::test]
async fn a_document_is_never_taken_twice_by_accident_and_goes_on_when_asked() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.txt");
    fs::write(&file, "0123456789abcdef0123456789abcdefrest").unwrap();
    let mut broken_off = client
        .ingest(&session, crate::IngestOptions::default())
        .await
        .unwrap();
    broken_off.document("a.txt");
    broken_off.text("0123456789abcdef").await.unwrap();
    broken_off.finish().await.unwrap();

    let words = [
        "ingest",
        "--session",
        &session,
        "--chunk-bytes",
        "16",
        file.to_str().unwrap(),
    ];
    let failure = say(&fake, &words).await.unwrap_err();
    assert_eq!(failure.exit_code(), 2, "{failure}");
    assert_eq!(fake.state().sessions[&session].chunks.len(), 1);

    let again = [&words[..], &["--resume"]].concat();
    let done = json(&fake, &again).await.pop().unwrap();
    assert_eq!(
        (&done["chunks"], &done["duplicates"]),
        (&3.into(), &1.into())
    );
    let done = json(&fake, &again).await.pop().unwrap();
    assert_eq!(
        (&done["chunks"], &done["duplicates"]),
        (&3.into(), &3.into())
    );
    assert_eq!(fake.state().sessions[&session].chunks.len(), 3);
}

#[tokio::test]
async fn what_cannot_be_read_creates_no_session() {
    let fake = Fake::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (empty, binary) = (folder.path().join("empty"), folder.path().join("binary"));
    fs::write(&empty, "").unwrap();
    fs::write(&binary, b"text\xff").unwrap();
    let missing = folder.path().join("missing");
    for (path, code) in [(&empty, 2), (&binary, 1), (&missing, 1)] {
        let failure = say(
            &fake,
            &["ingest", "--session", "new", path.to_str().unwrap()],
        )
        .await
        .unwrap_err();
        assert_eq!(failure.exit_code(), code, "{failure}");
    }
    assert!(fake.state().sessions.is_empty());
}

#[tokio::test]
async fn an_empty_answer_is_shown_as_one() {
    let fake = Fake::with_quirk(Quirk::Silent).await;
    let said = say(&fake, &["ask", "why?"]).await.unwrap();
    assert_eq!(said, "(no answer: the model ended at once, stop)\n");
}

#[tokio::test]
async fn sessions_are_created_listed_shown_forked_and_removed() {
    let fake = Fake::start().await;
    let create = [
        "session",
        "create",
        "--label",
        "team=blue",
        "--ttl",
        "90",
        "--strategy",
        "sequential",
    ];
    let created = &json(&fake, &create).await[0];
    let session = created["session_id"].as_str().unwrap();
    assert_eq!(created["labels"]["team"], "blue");
    assert_eq!(
        (&created["ttl_s"], &created["strategy"]),
        (&90.0.into(), &"sequential".into())
    );

    let copy = say(&fake, &["session", "fork", session]).await.unwrap();
    let copy = copy.trim();
    let shown = say(&fake, &["session", "show", copy]).await.unwrap();
    assert!(shown.contains(&format!("forked    {session}")), "{shown}");
    let listed = say(&fake, &["session", "ls"]).await.unwrap();
    assert_eq!(listed.lines().count(), 3, "{listed}");
    say(&fake, &["session", "rm", session, copy]).await.unwrap();
    assert_eq!(
        json(&fake, &["session", "ls"]).await[0]["sessions"],
        Value::Array(vec![])
    );
    let failure = say(&fake, &["session", "show", session]).await.unwrap_err();
    assert_eq!(failure.exit_code(), 1);
}

#[tokio::test]
async fn an_adapter_is_exported_and_a_document_forgotten() {
    let fake = Fake::start().await;
    let (client, session) = fake.client_and_session().await;
    let mut ingest = client
        .ingest(&session, crate::IngestOptions::default())
        .await
        .unwrap();
    ingest.document("a");
    ingest.last_text("one").await.unwrap();
    ingest.finish().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let export = &json(&fake, &["export", "--session", &session, "--out", out]).await[0];
    assert_eq!(
        (&export["adapter_version"], &export["rank"]),
        (&1.into(), &256.into())
    );
    assert!(folder.path().join("adapter_model.safetensors").exists());
    let forgotten = say(&fake, &["forget", "--session", &session, "a"])
        .await
        .unwrap();
    assert_eq!(forgotten, "a is forgotten from version 2 on\n");
}

#[tokio::test]
async fn a_chat_keeps_the_conversation_and_begins_anew_on_request() {
    let fake = Fake::start().await;
    let verb = parse(&[
        "chat",
        "--system",
        "be brief",
        "--endpoint",
        fake.endpoint(),
        "--json",
    ])
    .unwrap();
    let Verb::Chat(args) = verb else {
        panic!("not chat")
    };
    let kept = Kept::default();
    let mut output = Output::new(true, Box::new(kept.clone()));
    let input = b"one\n\ntwo\n/reset\nthree\n/exit\nfour\n".as_slice();
    chat::run(&fake.client().await, &args, input, &mut output)
        .await
        .unwrap();

    let conversations: Vec<Vec<String>> = fake
        .state()
        .prompts
        .iter()
        .map(|prompt| match &prompt.form {
            Some(crate::v1::prompt::Form::Chat(chat)) => chat
                .messages
                .iter()
                .map(|message| message.content.clone())
                .collect(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        conversations,
        [
            vec!["be brief", "one"],
            vec!["be brief", "one", " you said one", "two"],
            vec!["be brief", "three"],
        ]
    );
    assert_eq!(kept.text().lines().count(), 3);
}

#[test]
fn a_reader_that_went_away_is_no_failure() {
    let gone = Failure::Output(io::ErrorKind::BrokenPipe.into());
    assert!(quiet_pipe::<()>(Err(gone)).is_ok());
    let full = Failure::Output(io::ErrorKind::StorageFull.into());
    assert!(quiet_pipe::<()>(Err(full)).is_err());
}
