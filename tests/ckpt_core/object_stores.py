"""S3 on loopback for tests: moto's server, with a log of what it was asked."""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import fsspec
import pytest
from moto.server import ThreadedMotoServer

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
CONDITION = "HTTP_IF_NONE_MATCH"


@dataclass(frozen=True)
class Request:
    """What the server was asked."""

    method: str
    path: str
    condition: str | None
    """The header `If-None-Match`."""

    range: str | None
    """The header `Range`."""


@dataclass(frozen=True)
class Fault:
    """What is answered in place of the real answer."""

    status: int
    code: str
    carried_out: bool = False
    content: bytes | None = None

    @property
    def body(self) -> bytes:
        """The answer's body."""
        default = f"<Error><Code>{self.code}</Code><Message>injected</Message></Error>".encode()
        return default if self.content is None else self.content


def once(method: str, ending: str, fault: Fault):
    """A rule: the next request of this method whose path, with its query, ends so."""
    return lambda environ: (
        fault
        if environ["REQUEST_METHOD"] == method
        and f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}".rstrip("?").endswith(ending)
        else None
    )


@dataclass
class S3Server:
    """A running server, seen by whoever reads the environment."""

    requests: list[Request] = field(default_factory=list)
    failures: list[tuple[int, bool]] = field(default_factory=list)
    """How the next writes of a manifest fail: the status of the answer, and whether it is written nonetheless."""

    faults: list[Callable[[dict[str, str]], Fault | None]] = field(default_factory=list)
    """Each is asked about every request, and is gone when it has named a fault."""

    heeds_conditions: bool = True
    """Whether `If-None-Match` means anything."""

    def new_bucket(self) -> str:
        """Make a bucket; return its URL."""
        name = f"bucket-{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(name)
        return f"s3://{name}"

    def around(self, application):
        """Wrap the server's WSGI application with the log and the failures."""

        def answer(environ, start_response):
            if not self.heeds_conditions:
                environ.pop(CONDITION, None)
            condition = environ.get(CONDITION)
            path = environ["PATH_INFO"]
            self.requests.append(Request(environ["REQUEST_METHOD"], path, condition, environ.get("HTTP_RANGE")))
            for rule in list(self.faults):
                if (fault := rule(environ)) is not None:
                    self.faults.remove(rule)
                    if fault.carried_out:
                        list(application(environ, lambda *_: None))
                    start_response(
                        f"{fault.status} Injected",
                        [("Content-Type", "application/xml"), ("Content-Length", str(len(fault.body)))],
                    )
                    return [fault.body]
            if condition is None or not path.endswith("manifest.json") or not self.failures:
                return application(environ, start_response)
            status, written = self.failures.pop(0)
            if written:
                list(application(environ, lambda *_: None))
            body = f"<Error><Code>Injected</Code><Message>injected {status}</Message></Error>".encode()
            start_response(
                f"{status} Injected", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            )
            return [body]

        return answer


@pytest.fixture(scope="module")
def s3_server():
    """S3 on a free port of loopback, and an environment that leads there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    seen = S3Server()
    server._server.app = seen.around(server._server.app)
    s3 = fsspec.get_filesystem_class("s3")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        s3.clear_instance_cache()
        yield seen
        s3.clear_instance_cache()
    server.stop()
