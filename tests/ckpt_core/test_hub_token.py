"""The token goes to its own Hub and to no other address, even where that Hub names one; and never into an error."""

import json
import pickle
import socket
import threading
import traceback
from contextlib import contextmanager

import pytest
import uvicorn
from hub_child import child_environment_for, run_child
from hub_client import files_below, sharded_files, write_export

from ckpt_core import hub
from ckpt_core.errors import HubAuthError, HubError
from ckpt_core.testing.hub_app import create_app

TOKEN = "hf_" + "kept0at1home2" * 3
RELEASE = """
import json, os
from ckpt_core import hub
where = {"endpoint": os.environ["HF_ENDPOINT"]}
for export in json.loads(os.environ["EXPORTS"]):
    release = hub.publish(export, "team/model", read_back=True, **where)
hub.roll_back("team/model", "v1", **where)
hub.download("team/model", "v1", directory=os.environ["COPY"], **where)
print(json.dumps(hub.served("team/model", **where).tag))
"""


@contextmanager
def serving(app):
    """Serve an application on a free port of this machine; yield its address."""
    # With its protocol named, asyncio sends small answers at once.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Guiding:
    """A Hub whose every address in an answer, and whose files, are at another address."""

    def __init__(self, app):
        self._app = app
        self.home = self.away = ""

    async def __call__(self, scope, receive, send):
        """Answer one request, elsewhere if it is for a file's bytes."""

        async def send_away(message):
            if message["type"] == "http.response.start":
                headers = [(name, self._moved(value)) for name, value in message["headers"]]
                message = {**message, "headers": headers}
            else:
                message = {**message, "body": self._moved(message.get("body", b""))}
            await send(message)

        if scope["method"] == "GET" and "/resolve/" in scope["path"]:
            target = self.away.encode() + scope["raw_path"]
            await send({"type": "http.response.start", "status": 307, "headers": [(b"location", target)]})
            await send({"type": "http.response.body"})
        else:
            await self._app(scope, receive, send_away)

    def _moved(self, data):
        assert len(self.home) == len(self.away)  # or a content-length would be wrong
        return data.replace(self.home.encode(), self.away.encode())


class Stranger:
    """The other address: it notes what it is sent, and does what the Hub would do for who has the token."""

    def __init__(self, app):
        self._app = app
        self.requests = []

    async def __call__(self, scope, receive, send):
        """Answer one request."""
        self.requests.append((f"{scope['method']} {scope['path']}", f"{scope['query_string']} {scope['headers']}"))
        if b"authorization" not in dict(scope["headers"]):
            scope = {**scope, "headers": [*scope["headers"], (b"authorization", f"Bearer {TOKEN}".encode())]}
        await self._app(scope, receive, send)


@pytest.mark.parametrize(
    ("no_xet", "asked"),
    [
        ("1", ["PUT /api/lfs/", "POST /team/model.git/info/lfs/objects/verify", "GET /team/model/resolve/"]),
        ("0", ["POST /api/xet/v1/xorbs/", "POST /api/xet/v1/shards", "GET /api/xet/v1/reconstructions/"]),
    ],
    ids=["lfs", "xet"],
)
def test_another_address_gets_no_token(tmp_path, no_xet, asked):
    """Uploads, downloads, confirmations, pages of lists and Xet's storage at another address come without it."""
    exports = [str(write_export(tmp_path / str(n), sharded_files([n, n + 1], 20_000))) for n in range(2)]
    app = create_app(tmp_path / "hub", token=TOKEN, page_size=2)
    guiding, stranger = Guiding(app), Stranger(app)
    with serving(guiding) as home, serving(stranger) as away:
        guiding.home, guiding.away = home, away
        environment = {
            **child_environment_for(home, tmp_path / "home", TOKEN),
            "HF_HUB_DISABLE_XET": no_xet,
            "EXPORTS": json.dumps(exports),
            "COPY": str(tmp_path / "copy"),
        }
        assert run_child(RELEASE, environment) == "v1"
    assert files_below(tmp_path / "copy").items() >= files_below(tmp_path / "0").items()
    for part in [*asked, "GET /api/models/team/model/tree/"]:
        assert any(part in request for request, _ in stranger.requests), part
    assert [request for request, sent in stranger.requests if TOKEN in sent] == []


class Echo:
    """A Hub that refuses every request, and repeats its token after `before` other characters."""

    def __init__(self, status, before):
        self._status = status
        self._before = before

    async def __call__(self, scope, receive, send):
        """Answer one request."""
        said = "x" * self._before + dict(scope["headers"])[b"authorization"].decode()
        await send(
            {
                "type": "http.response.start",
                "status": self._status,
                "headers": [(b"content-type", b"application/json"), (b"x-error-message", said.encode())],
            }
        )
        await send({"type": "http.response.body", "body": json.dumps({"error": said}).encode()})


def test_a_proxy_gets_no_token_for_this_machine(tmp_path, monkeypatch):
    """With a proxy in the environment, a token for this machine is not sent before NO_PROXY leaves this machine out."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving(create_app(tmp_path, token=TOKEN)) as endpoint:
        monkeypatch.setenv("HTTP_PROXY", "http://user:password@proxy.example:3128")
        with pytest.raises(HubAuthError, match=r"proxy proxy\.example is in the way.* to NO_PROXY"):
            hub.served("team/model", endpoint=endpoint, token=TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        assert hub.served("team/model", endpoint=endpoint, token=TOKEN) is None


@pytest.mark.parametrize("status", [400, 401, 403, 409])
@pytest.mark.parametrize("before", [0, 480])
def test_a_hub_that_repeats_the_token(status, before):
    """What a Hub or a proxy says with the token in it comes without, also where the message is cut in its middle."""
    with serving(Echo(status, before)) as endpoint, pytest.raises(HubError) as caught:
        hub.served("team/model", endpoint=endpoint, token=TOKEN)
    told = "".join(traceback.format_exception(caught.value)) + repr(pickle.dumps(caught.value))
    assert TOKEN[:9] not in told
