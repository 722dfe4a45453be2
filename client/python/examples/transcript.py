"""Prints a whole exchange with a server as Markdown: what is called, and what comes back.

    python client/python/examples/transcript.py 127.0.0.1:7461 > docs/transcripts/python.md

Everything printed is what the server answered at that moment.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from imprint import Client, NotFound

TEXT = (
    "The lighthouse at Skarvholm is kept by Aud Vik, who came to the island in 1887. "
    "Its lamp burns rape oil and shows a green light. The nearest village is called Tangen. "
)
QUESTIONS = (
    ("Who keeps the lighthouse at Skarvholm?", " Aud Vik"),
    ("What colour is the light of Skarvholm?", " Green"),
    ("What is the nearest village called?", " Tangen"),
)


def show(call: str, answer: object) -> None:
    """Prints one call and its answer."""
    print(f"```python\n>>> {call}\n{answer}\n```\n", flush=True)


def main() -> None:
    """Runs the exchange."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", help="host:port of a running server")
    parser.add_argument("--key", help="the bearer key, if the server wants one")
    options = parser.parse_args()

    print("# The Python client against a running server\n\nRecorded by `client/python/examples/transcript.py`.\n")
    with Client(options.endpoint, key=options.key, timeout_s=300) as client:
        show("client.models.get()", client.models.get())
        session = client.sessions.create(labels={"for": "a transcript"})
        show('session = client.sessions.create(labels={"for": "a transcript"})', session)
        name = session.session_id

        with client.ingest(name) as stream:
            half = len(TEXT) // 2
            show(f'stream.send({TEXT[:half]!r}, document_id="light")', stream.send(TEXT[:half], document_id="light"))
            show("stream.flush()", stream.flush())
            show(f"stream.send({TEXT[half:]!r})", stream.send(TEXT[half:]))
            show("stream.send(end_of_document=True)", stream.send(end_of_document=True))
        show("stream.applied  # after the stream was closed", stream.applied)
        show("client.sessions.get(name)", client.sessions.get(name))
        show("client.sessions.documents(name)", client.sessions.documents(name))

        for question, true_answer in QUESTIONS:
            for session_id, who in ((name, "session_id=name"), ("", "session_id=''")):
                show(f"client.ask({question!r}, {who}).text", repr(client.ask(question, session_id=session_id).text))
                score = client.score(f"Question: {question}\nAnswer:", [true_answer], session_id=session_id)
                show(
                    f"client.score('Question: {question}\\nAnswer:', [{true_answer!r}], {who}).scores[0].logprob",
                    round(score.scores[0].logprob, 3),
                )
        show(f"client.ask({QUESTIONS[0][0]!r}, session_id=name)", client.ask(QUESTIONS[0][0], session_id=name))

        with tempfile.TemporaryDirectory() as folder:
            export = client.export_adapter(name, folder)
            sizes = [(path.name, path.stat().st_size) for path in sorted(Path(folder).iterdir())]
            show("client.export_adapter(name, folder)", f"rank {export.rank}, version {export.adapter_version}, {sizes}")
        show('client.sessions.forget(name, "light")', client.sessions.forget(name, "light"))
        client.sessions.delete(name)
        try:
            client.sessions.get(name)
        except NotFound as error:
            show("client.sessions.delete(name); client.sessions.get(name)", error)


if __name__ == "__main__":
    main()
