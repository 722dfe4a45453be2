//! `imprint ask`: one question, one answer, shown as it comes.
//!
//! The server puts the question into the format that the generator was trained with. An answer
//! that is empty is shown as such. Start at [`run`].

use super::{AskArgs, Failure, Output, adapter, view};
use crate::{Client, Error, prompt, v1::GenerateRequest};

pub(super) async fn run(
    client: &Client,
    args: AskArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    let stop = if args.stop.is_empty() {
        vec!["\n".to_owned()]
    } else {
        args.stop
    };
    let request = GenerateRequest {
        adapter: Some(adapter(args.session.as_deref(), args.draw.scale)),
        prompt: Some(prompt::question(args.question)),
        sampling: Some(args.draw.sampling()),
        stop,
        max_tokens: args.draw.max_tokens,
        ..GenerateRequest::default()
    };
    let mut generation = client.generate(request).await?;
    let mut text = String::new();
    while let Some(delta) = generation.next().await? {
        if !output.json() {
            // The formats end in "Answer:", so answers begin with a space that is no part of them.
            let piece = if text.trim().is_empty() {
                delta.text.trim_start()
            } else {
                delta.text.as_str()
            };
            output.piece(piece)?;
        }
        text.push_str(&delta.text);
    }
    let finished = generation
        .finished()
        .ok_or_else(|| Error::protocol("a generation ended without `finished`"))?;
    if output.json() {
        output.document(&view::answer(&text, finished))?;
    } else if text.trim().is_empty() {
        let reason = view::finish_reason(finished.finish_reason());
        output.line(format!("(no answer: the model ended at once, {reason})"))?;
    } else {
        output.line("")?;
    }
    Ok(())
}
