"""A client that knows nothing of imprint: it asks the server by reflection what there is, and uses it.

    python client/python/examples/reflection.py 127.0.0.1:7461 > docs/transcripts/reflection.md

Needs grpcio-reflection, and not this package: services, methods and messages come from the server's own
descriptors. Start at `Generic`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TEXT = "The lighthouse at Skarvholm is kept by Aud Vik. Its lamp burns rape oil and shows a green light. "


class Generic:
    """Calls any method of any service with messages given as JSON-like values."""

    def __init__(self, channel: grpc.Channel, key: str | None) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> list[str]:
        """The names of all services."""
        return sorted(self._database.get_services())

    def methods(self, service: str) -> list[MethodDescriptor]:
        """The methods of a service."""
        return list(self._pool.FindServiceByName(service).methods)

    def call(self, service: str, method: str, *requests: dict[str, object]) -> Iterator[dict[str, object]]:
        """Calls a method, streaming or not, and yields its answers."""
        descriptor = self._pool.FindServiceByName(service).FindMethodByName(method)
        request_type = GetMessageClass(descriptor.input_type)
        response_type = GetMessageClass(descriptor.output_type)
        messages: list[Message] = [json_format.ParseDict(request, request_type()) for request in requests]
        path = f"/{service}/{method}"
        shape = (descriptor.client_streaming, descriptor.server_streaming)
        answers: Iterable[Message]
        if shape == (True, True):
            bidirectional = self._channel.stream_stream(path, request_type.SerializeToString, response_type.FromString)
            answers = bidirectional(iter(messages), metadata=self._metadata)
        elif shape == (False, True):
            serving = self._channel.unary_stream(path, request_type.SerializeToString, response_type.FromString)
            answers = serving(messages[0], metadata=self._metadata)
        elif shape == (False, False):
            unary = self._channel.unary_unary(path, request_type.SerializeToString, response_type.FromString)
            answers = [unary(messages[0], metadata=self._metadata)]
        else:
            raise NotImplementedError("no method of this contract streams only requests")
        for answer in answers:
            yield json_format.MessageToDict(answer, preserving_proto_field_name=True)


def main() -> None:
    """Discovers the server and runs an exchange."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", help="host:port of a running server")
    parser.add_argument("--key", help="the bearer key, if the server wants one")
    options = parser.parse_args()

    print("# A generic client, by reflection\n\nRecorded by `client/python/examples/reflection.py`.\n\n```")
    with grpc.insecure_channel(options.endpoint) as channel:
        generic = Generic(channel, options.key)
        for service in generic.services():
            print(service)
            for method in generic.methods(service):
                takes = "stream " * method.client_streaming + method.input_type.name
                gives = "stream " * method.server_streaming + method.output_type.name
                print(f"  {method.name}({takes}) returns ({gives})")
        print("```\n")

        def exchange(service: str, method: str, *requests: dict[str, object]) -> list[dict[str, object]]:
            print(f"```\n{service}/{method}")
            for request in requests:
                print(f"> {request}")
            answers = []
            for answer in generic.call(f"imprint.v1.{service}", method, *requests):
                print(f"< {answer}", flush=True)
                answers.append(answer)
            print("```\n")
            return answers

        (created,) = exchange("SessionService", "CreateSession", {"labels": {"by": "reflection"}})
        session = created["session"]
        assert isinstance(session, dict)
        name = session["session_id"]
        exchange(
            "ContextService",
            "Ingest",
            {"open": {"session_id": name}},
            {"chunk": {"seq": 1, "text": TEXT, "document_id": "light", "end_of_document": True}},
            {"flush": {}},
        )
        exchange(
            "GenerationService",
            "Generate",
            {
                "adapter": {"session_id": name, "min_applied_seq": 1},
                "prompt": {"question": "Who keeps the lighthouse at Skarvholm?"},
                "max_tokens": 8,
                "stop": ["\n"],
            },
        )
        exchange("SessionService", "GetSession", {"session_id": name})
        exchange("SessionService", "DeleteSession", {"session_id": name})


if __name__ == "__main__":
    main()
