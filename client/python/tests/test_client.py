"""The blocking client against the real server."""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path

import pytest

from imprint import (
    AlreadyExists,
    Client,
    FailedPrecondition,
    FinishReason,
    InvalidArgument,
    Message,
    NotFound,
    Question,
    Sampling,
    Session,
    Strategy,
    StreamClosed,
)

TEXT = (
    "The lighthouse at Skarvholm is kept by Aud Vik, who came to the island in 1887. "
    "Its lamp burns rape oil and shows a green light. The nearest village is called Tangen. "
)


def test_a_session_is_created_read_changed_and_deleted(client: Client) -> None:
    created = client.sessions.create(labels={"of": "python"}, ttl=timedelta(hours=1))
    try:
        assert created.adapter_version == 0
        assert created.strategy is not Strategy.DEFAULT
        assert created.window > 0
        assert created.ttl == timedelta(hours=1)
        assert created.expire_time is not None and created.expire_time > created.create_time
        assert client.sessions.get(created.session_id).labels == {"of": "python"}
        changed = client.sessions.update(created.session_id, labels={"to": "be kept"}, keep_forever=True)
        assert changed.labels == {"to": "be kept"}
        assert changed.ttl is None and changed.expire_time is None
    finally:
        client.sessions.delete(created.session_id)
    with pytest.raises(NotFound) as gone:
        client.sessions.get(created.session_id)
    assert gone.value.reason


def test_the_same_request_id_creates_one_session(client: Client) -> None:
    name = uuid.uuid4().hex
    first = client.sessions.create(request_id=name)
    try:
        assert client.sessions.create(request_id=name).session_id == first.session_id
        with pytest.raises(AlreadyExists):
            client.sessions.create(request_id=name, labels={"another": "request"})
    finally:
        client.sessions.delete(first.session_id)


def test_listing_goes_over_all_pages(client: Client) -> None:
    made = [client.sessions.create().session_id for _ in range(5)]
    try:
        listed = [session.session_id for session in client.sessions.list(page_size=2)]
        assert [name for name in listed if name in made] == made
    finally:
        for name in made:
            client.sessions.delete(name)


def test_what_is_ingested_is_applied_and_answers_change(client: Client, session: Session) -> None:
    with client.ingest(session.session_id) as stream:
        for start in range(0, len(TEXT), 37):
            stream.send(TEXT[start : start + 37], document_id="light" if start == 0 else "")
        flushed = stream.flush()
        assert flushed is not None
        assert flushed.seq == stream.next_seq - 1
        assert flushed.adapter_version >= 1
        assert stream.flush() == flushed, "nothing came in between"
        stream.send(end_of_document=True)
    last = stream.applied
    assert last is not None and last.seq == flushed.seq + 1
    assert last.state_digest == flushed.state_digest, "a flush is the fold as if the document ended there"

    now = client.sessions.get(session.session_id)
    assert (now.accepted_seq, now.applied_seq) == (last.seq, last.seq)
    assert now.adapter_version == last.adapter_version
    assert now.context_tokens == last.tokens > 20
    assert now.state_bytes > 0 and now.trace_bytes > 0 and now.core_bytes > 0
    (document,) = client.sessions.documents(session.session_id)
    assert (document.document_id, document.complete, document.tokens) == ("light", True, last.tokens)

    prompt = Question("Who keeps the lighthouse at Skarvholm?")
    told = client.score(prompt, [" Aud Vik", " Tangen"], session_id=session.session_id)
    bare = client.score(prompt, [" Aud Vik", " Tangen"])
    off = client.score(prompt, [" Aud Vik", " Tangen"], session_id=session.session_id, adapter_scale=0.0)
    assert told.adapter_version == last.adapter_version and bare.adapter_version == 0
    assert told.prompt_tokens == bare.prompt_tokens < last.tokens
    assert (told.adapter_scale, bare.adapter_scale, off.adapter_scale) == (1.0, 0.0, 0.0)
    other = client.score(Question("Which oceans surround Antarctica?"), [" Aud"], session_id=session.session_id)
    assert other.adapter_scale == 0.0, "what was told speaks of none of it"
    assert told.scores[0].logprob > bare.scores[0].logprob + 1
    assert [s.logprob for s in off.scores] == [s.logprob for s in bare.scores], "strength 0 is the bare model"
    for score in told.scores:
        assert score.logprob == pytest.approx(sum(token.logprob for token in score.tokens), abs=1e-4)

    answer = client.ask(
        "Who keeps the lighthouse at Skarvholm?", session_id=session.session_id, min_applied_seq=last.seq
    )
    assert answer.finished.adapter_version == last.adapter_version
    assert answer.finished.state_digest != last.state_digest, "it is made of the sentences that the question means"
    whole = client.ask("Who keeps the lighthouse at Skarvholm?", session_id=session.session_id, adapter_scale=1.0)
    assert whole.finished.state_digest == last.state_digest
    assert answer.finished.usage.context_tokens <= last.tokens == whole.finished.usage.context_tokens


def test_tokens_come_one_by_one_with_log_probabilities(client: Client) -> None:
    pieces = []
    with client.generate("The sea is", max_tokens=8, logprobs=True, top_logprobs=3) as generation:
        for piece in generation:
            pieces.append(piece)
        end = generation.finished
    assert end is not None
    ids = [token for piece in pieces for token in piece.token_ids]
    assert len(ids) == end.usage.completion_tokens <= 8
    assert sum(len(piece.token_ids) > 0 for piece in pieces) > 1, "it streams"
    for piece in pieces:
        assert [token.token_id for token in piece.logprobs] == list(piece.token_ids)
        for drawn, top in zip(piece.logprobs, piece.top_logprobs, strict=True):
            assert len(top) == 3 and top[0].logprob == pytest.approx(drawn.logprob), "greedy draws the likeliest"
    # The ids say the same as the text: scoring them finds what greedy decoding would do.
    assert client.score("The sea is", [ids]).scores[0].greedy


def test_a_seed_gives_the_same_text_again(client: Client) -> None:
    def draw(seed: int) -> str:
        sampling = Sampling(temperature=1.5, seed=seed)
        return client.generate("Once upon a time", max_tokens=12, sampling=sampling).answer().text

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_conversation_and_ids_are_prompts_too(client: Client) -> None:
    chat = client.generate([Message("user", "Say hello.")], max_tokens=4).answer()
    assert chat.finished.usage.prompt_tokens > 5 and chat.finished.usage.completion_tokens > 0
    ids = client.generate([504, 2863, 314], max_tokens=1).answer()
    assert ids.finished.usage.prompt_tokens == 3
    assert ids.finished.finish_reason in (FinishReason.LENGTH, FinishReason.EOS)


def test_a_fork_goes_its_own_way_and_forgetting_leaves_the_bare_model(client: Client, session: Session) -> None:
    with client.ingest(session.session_id) as stream:
        stream.send(TEXT, document_id="light", end_of_document=True)
    copy = client.sessions.fork(session.session_id, labels={"is": "a copy"})
    try:
        assert copy.forked_from == session.session_id
        forgotten = client.sessions.forget(copy.session_id, "light")
        assert forgotten.adapter_version > copy.adapter_version
        bare = client.score("The lamp burns", [" rape oil"])
        assert client.score("The lamp burns", [" rape oil"], session_id=copy.session_id).scores == bare.scores
        assert client.score("The lamp burns", [" rape oil"], session_id=session.session_id).scores != bare.scores
        with pytest.raises(NotFound):
            client.sessions.forget(copy.session_id, "never told")
    finally:
        client.sessions.delete(copy.session_id)


def test_a_flush_of_a_session_that_was_told_nothing_waits_for_nothing(client: Client, session: Session) -> None:
    with client.ingest(session.session_id) as stream:
        assert stream.flush(timeout_s=60) is None


def test_a_second_stream_continues_where_the_first_one_ended(client: Client, session: Session) -> None:
    with client.ingest(session.session_id) as stream:
        assert stream.send("One. ", document_id="a", end_of_document=True) == 1
    with client.ingest(session.session_id) as stream:
        assert stream.send("Two. ", document_id="b", end_of_document=True) == 2
    assert stream.applied is not None and stream.applied.seq == 2


def test_a_gap_in_seq_ends_the_stream_with_the_expected_one(client: Client, session: Session) -> None:
    with pytest.raises(FailedPrecondition) as gap, client.ingest(session.session_id, next_seq=5) as stream:
        stream.send("too far", end_of_document=True)
        stream.flush(timeout_s=60)
    assert gap.value.metadata["expected_seq"] == "1"


def test_what_the_server_refuses_names_the_field(client: Client) -> None:
    with pytest.raises(InvalidArgument) as refused:
        client.generate("x", sampling=Sampling(temperature=float("nan"))).answer()
    assert any("temperature" in violation.field for violation in refused.value.violations)
    with pytest.raises(InvalidArgument):
        client.generate("x", sampling=Sampling(top_p=-0.5)).answer()
    with pytest.raises(InvalidArgument):
        client.generate([4_000_000], max_tokens=1).answer()
    with pytest.raises(NotFound):
        client.generate("x", session_id="s_00000000000000000000000000").answer()


def test_a_closed_stream_takes_nothing_more(client: Client, session: Session) -> None:
    with client.ingest(session.session_id) as stream:
        stream.send("Short. ", end_of_document=True)
    with pytest.raises(StreamClosed):
        stream.send("more")
    with pytest.raises(ValueError, match="not both"), client.ingest(session.session_id) as again:
        again.send("text", token_ids=[1])


def test_an_adapter_is_exported_whole_and_checked(client: Client, session: Session, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition):
        client.export_adapter(session.session_id, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with client.ingest(session.session_id) as stream:
        stream.send(TEXT, end_of_document=True)
    export = client.export_adapter(session.session_id, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert export.rank > 0
    assert stream.applied is not None and export.state_digest == stream.applied.state_digest


def test_the_model_tells_what_it_is(client: Client) -> None:
    (model, *_) = client.models.list()
    assert model == client.models.get() == client.models.get(model.name)
    assert model.generator is not None and model.generator.sites
    with pytest.raises(NotFound):
        client.models.get("no such model")
