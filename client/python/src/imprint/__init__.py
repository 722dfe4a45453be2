"""Client of imprint: sessions that carry the imprint of what they were told.

    from imprint import Client

    with Client("127.0.0.1:7461") as client:
        session = client.sessions.create()
        with client.ingest(session.session_id) as stream:
            stream.send(text="The harbour light is kept by Aud Vik.", end_of_document=True)
        print(client.ask("Who keeps the harbour light?", session_id=session.session_id).text)

`Client` blocks, `AsyncClient` is the same for asyncio. What they return are the frozen dataclasses of
`imprint.types`; what they raise are the classes of `imprint.errors`. The contract's own messages are in
`imprint.v1`. The meaning of every field stands in `proto/imprint/v1/*.proto`.
"""

from imprint.aio import AsyncClient, AsyncGeneration, AsyncIngestStream
from imprint.client import Client, Generation, IngestStream
from imprint.errors import (
    AlreadyExists,
    Cancelled,
    DamagedExport,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    ImprintError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    StatusError,
    StreamClosed,
    Unauthenticated,
    Unavailable,
)
from imprint.types import (
    Answer,
    Applied,
    ContinuationScore,
    Delta,
    Document,
    Export,
    Finished,
    FinishReason,
    Forgotten,
    Generator,
    Message,
    Model,
    Question,
    Sampling,
    Score,
    Session,
    Site,
    Strategy,
    Timings,
    TokenLogprob,
    Usage,
)

__all__ = [
    "AlreadyExists",
    "Answer",
    "Applied",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncIngestStream",
    "Cancelled",
    "Client",
    "ContinuationScore",
    "DamagedExport",
    "DeadlineExceeded",
    "Delta",
    "Document",
    "Export",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "Forgotten",
    "Generation",
    "Generator",
    "ImprintError",
    "IngestStream",
    "InvalidArgument",
    "Message",
    "Model",
    "NotFound",
    "Question",
    "ResourceExhausted",
    "Sampling",
    "Score",
    "Session",
    "Site",
    "StatusError",
    "Strategy",
    "StreamClosed",
    "Timings",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
