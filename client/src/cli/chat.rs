//! `imprint chat`: a conversation in the model's chat template, streamed turn by turn.
//!
//! The conversation is kept here and sent whole each turn; the session's context is not in it.
//! Lines come in, answers go out; `/reset` begins anew, `/exit` or the end of input leaves. Start at
//! [`run`].

use std::io::IsTerminal as _;

use tokio::io::{AsyncBufRead, AsyncBufReadExt as _};

use super::{ChatArgs, Failure, Output, adapter, view};
use crate::{
    Client, Error, prompt,
    v1::{ChatMessage, GenerateRequest},
};

pub(super) async fn run(
    client: &Client,
    args: &ChatArgs,
    input: impl AsyncBufRead + Unpin,
    output: &mut Output,
) -> Result<(), Failure> {
    let people = !output.json() && std::io::stdin().is_terminal();
    if people {
        output.line("/reset begins anew, /exit leaves")?;
    }
    let mut lines = input.lines();
    let mut history: Vec<ChatMessage> = Vec::new();
    loop {
        if people {
            output.piece("you> ")?;
        }
        let line = lines.next_line().await.map_err(|source| Failure::Input {
            name: "standard input".to_owned(),
            source,
        })?;
        let Some(line) = line else {
            return Ok(());
        };
        match line.trim() {
            "" => continue,
            "/exit" => return Ok(()),
            "/reset" => history.clear(),
            said => {
                history.push(message("user", said));
                let answer = turn(client, args, &history, output).await?;
                history.push(message("assistant", &answer));
                forget_oldest(&mut history, usize::from(args.keep));
            }
        }
    }
}

/// One answer to the conversation so far, shown as it comes.
async fn turn(
    client: &Client,
    args: &ChatArgs,
    history: &[ChatMessage],
    output: &mut Output,
) -> Result<String, Failure> {
    let system = args.system.iter().map(|system| message("system", system));
    let request = GenerateRequest {
        adapter: Some(adapter(args.session.as_deref(), args.draw.scale)),
        prompt: Some(prompt::chat(
            system.chain(history.iter().cloned()).collect(),
        )),
        sampling: Some(args.draw.sampling()),
        max_tokens: args.draw.max_tokens,
        ..GenerateRequest::default()
    };
    let mut generation = client.generate(request).await?;
    let mut text = String::new();
    while let Some(delta) = generation.next().await? {
        if !output.json() {
            output.piece(&delta.text)?;
        }
        text.push_str(&delta.text);
    }
    let finished = generation
        .finished()
        .ok_or_else(|| Error::protocol("a generation ended without `finished`"))?;
    if output.json() {
        output.document(&view::answer(&text, finished))?;
    } else {
        output.line("")?;
    }
    Ok(text)
}

/// Keeps the newest `keep` messages, beginning with one of the user's.
fn forget_oldest(history: &mut Vec<ChatMessage>, keep: usize) {
    let mut from = history.len().saturating_sub(keep);
    while history.get(from).is_some_and(|first| first.role != "user") {
        from += 1;
    }
    history.drain(..from);
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}

#[cfg(test)]
mod tests;
