"""The asyncio client against the real server."""

from __future__ import annotations

import asyncio

import pytest

from imprint import AsyncClient, FailedPrecondition, NotFound, StreamClosed


def test_many_sessions_ingest_and_answer_side_by_side(endpoint: str) -> None:
    async def one(client: AsyncClient, keeper: str) -> None:
        session = await client.sessions.create(labels={"keeper": keeper})
        async with client.ingest(session.session_id) as stream:
            await stream.send("The mill at Elvdal ", document_id="mill")
            await stream.send(f"is kept by {keeper}. ", end_of_document=True)
            flushed = await stream.flush(timeout_s=120)
            assert flushed is not None
        assert stream.applied == flushed
        generation = client.generate("The mill at Elvdal is kept by", session_id=session.session_id, max_tokens=6)
        text = "".join([piece.text async for piece in generation])
        assert text == generation.text
        assert generation.finished is not None
        assert generation.finished.adapter_version == flushed.adapter_version
        score = await client.score("The mill at Elvdal is kept by", [f" {keeper}"], session_id=session.session_id)
        bare = await client.score("The mill at Elvdal is kept by", [f" {keeper}"])
        assert score.scores[0].logprob > bare.scores[0].logprob
        await client.sessions.delete(session.session_id)

    async def all_of_them() -> None:
        async with AsyncClient(endpoint, timeout_s=120) as client:
            await asyncio.gather(*(one(client, keeper) for keeper in ("Aud", "Birger", "Sigrid")))

    asyncio.run(all_of_them())


def test_errors_are_the_blocking_client_s(endpoint: str) -> None:
    async def run() -> None:
        async with AsyncClient(endpoint, timeout_s=60) as client:
            with pytest.raises(NotFound):
                await client.sessions.get("s_00000000000000000000000000")
            with pytest.raises(NotFound):
                async with client.ingest("s_00000000000000000000000000"):
                    pass
            with pytest.raises(NotFound):
                await client.generate("x", session_id="s_00000000000000000000000000").answer()
            session = await client.sessions.create()
            with pytest.raises(FailedPrecondition) as gap:
                async with client.ingest(session.session_id, next_seq=3) as stream:
                    await stream.send("too far", end_of_document=True)
                    await stream.flush(timeout_s=60)
            assert gap.value.metadata["expected_seq"] == "1"
            async with client.ingest(session.session_id) as stream:
                await stream.send("Short. ", end_of_document=True)
            with pytest.raises(StreamClosed):
                await stream.send("more")
            assert session.session_id in [s.session_id async for s in client.sessions.list(page_size=1)]
            assert len(await client.sessions.documents(session.session_id)) == 1
            await client.sessions.delete(session.session_id)

    asyncio.run(run())
