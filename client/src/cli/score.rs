//! `imprint score`: how likely continuations are, under a session's imprint or bare.
//!
//! Start at [`run`].

use serde_json::json;

use super::{Align, Failure, Output, ScoreArgs, adapter, table};
use crate::{
    Client, prompt,
    v1::{Continuation, ScoreRequest, continuation::Form},
};

pub(super) async fn run(
    client: &Client,
    args: ScoreArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    let prompt = match (args.question, args.prompt) {
        (Some(question), None) => prompt::question(question),
        (None, Some(text)) => prompt::text(text),
        (None, None) | (Some(_), Some(_)) => {
            return Err(Failure::Usage(
                "give one of --question and --prompt".to_owned(),
            ));
        }
    };
    let request = ScoreRequest {
        adapter: Some(adapter(args.session.as_deref(), args.scale)),
        prompt: Some(prompt),
        continuations: args
            .continuations
            .iter()
            .map(|text| Continuation {
                form: Some(Form::Text(text.clone())),
            })
            .collect(),
        ..ScoreRequest::default()
    };
    let response = client.score(request).await?;
    let scored = args.continuations.iter().zip(&response.scores);
    if output.json() {
        let scores: Vec<_> = scored
            .map(|(text, score)| {
                let tokens = score.tokens.iter().map(
                    |token| json!({"token_id": token.token_id, "text": token.text, "logprob": token.logprob}),
                );
                json!({
                    "continuation": text,
                    "logprob": score.logprob,
                    "greedy": score.greedy,
                    "tokens": tokens.collect::<Vec<_>>(),
                })
            })
            .collect();
        output.document(&json!({
            "scores": scores,
            "adapter_version": response.adapter_version,
            "prompt_tokens": response.prompt_tokens,
        }))?;
        return Ok(());
    }
    let rows: Vec<[String; 4]> = scored
        .map(|(text, score)| {
            [
                format!("{:.3}", score.logprob),
                score.tokens.len().to_string(),
                if score.greedy { "yes" } else { "no" }.to_owned(),
                format!("{text:?}"),
            ]
        })
        .collect();
    let columns = [
        ("NATS", Align::Right),
        ("TOKENS", Align::Right),
        ("GREEDY", Align::Left),
        ("CONTINUATION", Align::Left),
    ];
    output.line(table(columns, &rows))?;
    Ok(())
}
