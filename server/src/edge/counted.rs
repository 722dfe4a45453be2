//! An answer whose end is counted: by the code in its trailers, or as cancelled where nobody read that far.
//!
//! Start at [`counted`].

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http_body::Frame;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Body as HttpBody, Bytes, http},
};

use crate::metrics::Call;

/// The response with the call's end at the end of its body.
pub(super) fn counted(response: http::Response<Body>, mut call: Call) -> http::Response<Body> {
    // An answer without messages has its status among its headers.
    if let Some(status) = Status::from_header_map(response.headers()) {
        call.ends(status.code());
        return response;
    }
    response.map(|body| Body::new(Counted { body, call }))
}

struct Counted {
    body: Body,
    call: Call,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { body, call } = self.get_mut();
        let frame = Pin::new(body).poll_frame(context);
        match &frame {
            Poll::Ready(Some(Ok(frame))) => {
                let status = frame.trailers_ref().map(Status::from_header_map);
                if let Some(status) = status {
                    call.ends(status.map_or(Code::Unknown, |status| status.code()));
                }
            }
            Poll::Ready(Some(Err(status))) => call.ends(status.code()),
            Poll::Ready(None) | Poll::Pending => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
