"""S3 on loopback for tests: moto's server, with a log of what it was asked."""

import logging
import uuid
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


@dataclass
class S3Server:
    """A running server, seen by whoever reads the environment."""

    requests: list[Request] = field(default_factory=list)
    failures: list[tuple[int, bool]] = field(default_factory=list)
    """How the next writes of a manifest fail: the status of the answer, and whether it is written nonetheless."""

    def new_bucket(self) -> str:
        """Make a bucket; return its URL."""
        name = f"bucket-{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(name)
        return f"s3://{name}"

    def around(self, application):
        """Wrap the server's WSGI application with the log and the failures."""

        def answer(environ, start_response):
            condition = environ.get(CONDITION)
            path = environ["PATH_INFO"]
            self.requests.append(Request(environ["REQUEST_METHOD"], path, condition, environ.get("HTTP_RANGE")))
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
