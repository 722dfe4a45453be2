//! An answer, read while it is written.
//!
//! Deltas until the server says that it is finished; a stream that ends without saying so is an
//! error, never a short answer. Dropping it cancels the generation. Start at [`Generation::next`].

use tonic::Streaming;

use crate::{
    Error,
    v1::{GenerateDelta, GenerateFinished, GenerateResponse, generate_response::Message},
};

/// A running generation.
#[derive(Debug)]
pub struct Generation {
    responses: Streaming<GenerateResponse>,
    finished: Option<GenerateFinished>,
}

impl Generation {
    pub(crate) fn new(responses: Streaming<GenerateResponse>) -> Self {
        Self {
            responses,
            finished: None,
        }
    }

    /// The next piece of the answer; `None` when it is complete.
    ///
    /// # Errors
    /// [`Error::Refused`] when the server ends the generation, [`Error::Protocol`] when the stream
    /// ends without `finished` or goes on after it.
    pub async fn next(&mut self) -> Result<Option<GenerateDelta>, Error> {
        if self.finished.is_some() {
            return Ok(None);
        }
        let response = self.responses.message().await?;
        match response.map(|response| response.message) {
            Some(Some(Message::Delta(delta))) => Ok(Some(delta)),
            Some(Some(Message::Finished(finished))) => {
                self.finished = Some(finished);
                // Reads the trailers, so that the call ends as complete and not as cancelled.
                match self.responses.message().await? {
                    None => Ok(None),
                    Some(_) => Err(Error::protocol("a generation went on after `finished`")),
                }
            }
            Some(None) => Err(Error::protocol(
                "a generation sent a message without content",
            )),
            None => Err(Error::protocol("a generation ended without `finished`")),
        }
    }

    /// How it ended: reason, usage, adapter version, timings. `None` until [`Self::next`] said `None`.
    #[must_use]
    pub fn finished(&self) -> Option<&GenerateFinished> {
        self.finished.as_ref()
    }

    /// Reads to the end and returns the whole text with how it ended.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn text(mut self) -> Result<(String, GenerateFinished), Error> {
        let mut text = String::new();
        while let Some(delta) = self.next().await? {
            text.push_str(&delta.text);
        }
        match self.finished {
            Some(finished) => Ok((text, finished)),
            None => Err(Error::protocol("a generation ended without `finished`")),
        }
    }
}
