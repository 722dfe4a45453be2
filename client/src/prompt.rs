//! Short ways to write a prompt and to name an adapter.
//!
//! They fill messages of the contract and check nothing: the server does. Start at [`question`].

use crate::v1::{AdapterSelection, ChatMessage, ChatMessages, Prompt, TokenIds, prompt::Form};

/// A question, put by the server into the format that the generator's config names.
#[must_use]
pub fn question(question: impl Into<String>) -> Prompt {
    Prompt {
        form: Some(Form::Question(question.into())),
    }
}

/// Plain text, continued as it stands.
#[must_use]
pub fn text(text: impl Into<String>) -> Prompt {
    Prompt {
        form: Some(Form::Text(text.into())),
    }
}

/// Ids of the model's vocabulary, used as they are.
#[must_use]
pub fn token_ids(ids: Vec<u32>) -> Prompt {
    Prompt {
        form: Some(Form::TokenIds(TokenIds { ids })),
    }
}

/// A conversation for the model's chat template, oldest message first.
#[must_use]
pub fn chat(messages: Vec<ChatMessage>) -> Prompt {
    Prompt {
        form: Some(Form::Chat(ChatMessages { messages })),
    }
}

/// The newest adapter of a session, at full strength. An empty name is the bare model.
#[must_use]
pub fn adapter(session_id: impl Into<String>) -> AdapterSelection {
    AdapterSelection {
        session_id: session_id.into(),
        ..AdapterSelection::default()
    }
}
