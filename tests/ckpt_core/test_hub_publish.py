import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from base64 import b64decode

import pytest
from hub_child import child_environment_for, run_child

from ckpt_core.errors import ArgumentError, DamagedError, HubAuthError, HubConflictError, HubContentError, HubError
from ckpt_core.hub import child_environment
from ckpt_core.hub.contents import read_contents
from ckpt_core.testing.hub_repo import Put
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_server import hub_server

REPO = "team/model"
WEIGHTS = bytes(range(256)) * 40
WORKER = """
import base64, dataclasses, json, pickle, sys, traceback
from ckpt_core import hub
from ckpt_core.errors import CkptError
for line in sys.stdin:
    name, arguments, options = json.loads(line)
    try:
        result = getattr(hub, name)(*arguments, **options)
        answer = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result
    except CkptError as error:
        assert error.__cause__ is None and error.__context__ is None
        text = "".join(traceback.format_exception(error))
        answer = {"error": base64.b64encode(pickle.dumps(error)).decode(), "text": text}
    print(json.dumps(answer, default=str), flush=True)
"""


class Client:
    """Calls `ckpt_core.hub` in a child process, and remembers what the server was asked."""

    def __init__(self, tmp_path, **options):
        self.tmp_path = tmp_path
        self.requests = []
        self.directory = tmp_path / "hub"
        self.on_request = lambda *_: None
        self.endpoint = ""
        self._server = hub_server(self.directory, on_request=self._observe, **options)
        self._worker = None

    def __enter__(self):
        self.endpoint = self._server.__enter__().endpoint
        return self

    def __exit__(self, *details):
        if self._worker:
            self._worker.communicate(timeout=60)
        self._server.__exit__(*details)

    def _observe(self, method, path, status):
        if path != "/api/agent-harnesses":  # the client asks this once where it finds itself run by some tools
            self.requests.append((method, path, status))
            self.on_request(method, path, status)

    def start_worker(self, **environment):
        """Start a process that calls what it is told to, line by line."""
        env = {**child_environment_for(self.endpoint, self.tmp_path / "home"), **environment}
        command = [sys.executable, "-c", WORKER]
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, name, *arguments, **options):
        """Return what the function returned as JSON, or raise the error that it raised there."""
        self._worker = self._worker or self.start_worker()
        self._worker.stdin.write(line_for(name, *arguments, **options))
        self._worker.stdin.flush()
        return self.result(self._worker.stdout.readline(), options.get("token"))

    def call_alone(self, environment, name, *arguments, **options):
        """Call a function in a process of its own, with more in its environment."""
        worker = self.start_worker(**environment)
        output = worker.communicate(line_for(name, *arguments, **options), timeout=60)[0]
        return self.result(output, environment.get("HF_TOKEN"))

    def result(self, line, token):
        """Read a worker's answer; an error in it must not hold the token."""
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            pickled = b64decode(answer["error"])
            if token:
                assert token not in answer["text"]
                assert token.encode() not in pickled
            raise pickle.loads(pickled)
        return answer

    def publish(self, export, **options):
        """Publish an export to the one repository of these tests."""
        return self.call("publish", export, REPO, **options)

    @property
    def repo(self):
        """The repository as it is on the server's disk."""
        return Repos(self.directory).get(REPO)

    def titles(self):
        """Return the titles of main's commits, newest first."""
        return [commit.title for commit in self.repo.history("main")]


def line_for(name, *arguments, **options):
    """Return the line that tells a worker to call a function."""
    return json.dumps([name, [str(argument) for argument in arguments], options]) + "\n"


@pytest.fixture
def client(tmp_path):
    """Run a server without tokens and give its client."""
    with Client(tmp_path) as running:
        yield running


def write_export(directory, files):
    """Write the files and the `export.json` that describes them."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {"format_version": 1, "source": {}, "files": entries, "rules": [], "libraries": {}}
    (directory / "export.json").write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def export(tmp_path):
    """Write a small export: weights, a config, a file in a folder and an empty one."""
    files = {"model.safetensors": WEIGHTS, "config.json": b"{}", "extra/notes.txt": b"n", "empty.txt": b""}
    return write_export(tmp_path / "export", files)


def test_importing_the_client_loads_no_heavy_library(tmp_path):
    """`import ckpt_core.hub` loads neither torch nor transformers nor huggingface_hub."""
    code = "import sys, json, ckpt_core.hub; print(json.dumps([name for name in sys.modules]))"
    loaded = set(run_child(code, child_environment_for("http://127.0.0.1:1", tmp_path)))
    assert not {"torch", "transformers", "huggingface_hub"} & loaded


def test_the_life_of_a_repository(client, export):
    """Publish; again, unchanged: v1 and nothing sent; changed: v2 in one commit, with what is stale gone."""
    first = client.publish(export)
    head = client.repo.resolve("main")
    size = sum(path.stat().st_size for path in export.rglob("*") if path.is_file())
    card = len(client.repo.content(client.repo.entry("v1", "README.md")[1]))
    assert first == {
        "repo_id": REPO,
        "endpoint": client.endpoint,
        "tag": "v1",
        "commit": head,
        "url": f"{client.endpoint}/{REPO}/tree/v1",
        "files": 6,
        "bytes": size + card,
        "created": True,
    }
    client.requests.clear()
    assert client.publish(export) == {**first, "created": False}
    assert client.titles() == ["Publish v1", "initial commit"]
    tree = f"/api/models/{REPO}/tree/{head}"
    asked = [("POST", "/api/repos/create", 409), ("GET", f"/api/models/{REPO}/refs", 200), ("GET", tree, 200)]
    assert client.requests == asked

    (export / "extra/notes.txt").unlink()
    write_export(export, {"model.safetensors": WEIGHTS, "config.json": b"[]", "empty.txt": b"", "new.txt": b"1"})
    client.requests.clear()
    second = client.publish(export)
    assert (second["tag"], second["created"]) == ("v2", True)
    assert client.titles() == ["Publish v2", "Publish v1", "initial commit"]
    assert not [path for method, path, _ in client.requests if method == "PUT" or path.endswith("/objects/batch")]
    here = {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()}
    assert client.repo.commit("v2").files.keys() == {*here, "README.md", ".gitattributes"}
    assert client.repo.commit("v1").files.keys() >= {"extra/notes.txt"}

    assert client.call("latest_release", REPO) == {**second, "created": False}
    place = client.call("download", REPO, "v1", directory=str(client.tmp_path / "copy"))
    assert place == str(client.tmp_path / "copy")
    assert (client.tmp_path / "copy/model.safetensors").read_bytes() == WEIGHTS
    assert (client.tmp_path / "copy/config.json").read_bytes() == b"{}"


def test_there_is_no_release_before_the_first(client):
    """A missing repository, and one without a version tag, have no latest release."""
    assert client.call("latest_release", REPO) is None
    repo = Repos(client.directory).create(REPO, private=False)
    for tag in ("v0", "v1.0", "v01", "xv3", "v2-rc"):
        repo.add_ref("tags", tag, "main")
    assert client.call("latest_release", REPO) is None


def test_versions_count_by_number(client, export):
    """The next version follows the highest number among the tags, of which only vN count."""
    repo = Repos(client.directory).create(REPO, private=False)
    for tag in ("v2", "v9", "v10", "v11rc1"):
        repo.add_ref("tags", tag, "main")
    assert client.publish(export)["tag"] == "v11"


def test_a_tag_that_is_missing_is_added_to_the_commit_that_is_there(client, export):
    """After a stop between commit and tag, a rerun verifies that commit and tags it; nothing is committed again."""
    first = client.publish(export)
    client.repo.remove_ref("tags", "v1")
    assert client.publish(export) == first
    assert client.titles() == ["Publish v1", "initial commit"]


def test_killed_the_moment_its_commit_landed_a_rerun_completes_the_release(client, export):
    """A publisher that dies with -9 as the Hub answers its commit leaves no tag; the rerun tags that same commit."""
    publisher = client.start_worker()
    client.on_request = lambda _, path, __: os.kill(publisher.pid, signal.SIGKILL) if "/commit/" in path else None
    publisher.communicate(line_for("publish", export, REPO), timeout=60)
    assert publisher.returncode == -signal.SIGKILL
    client.on_request = lambda *_: None
    assert client.repo.refs().tags == {}
    landed = client.repo.resolve("main")
    release = client.publish(export)
    assert (release["tag"], release["commit"], release["created"]) == ("v1", landed, True)
    assert client.titles() == ["Publish v1", "initial commit"]


def test_an_explicit_tag_is_used_once(client, export):
    """A tag of one's own is set, found again for the same release, and refused for another, before anything is sent."""
    assert client.publish(export, tag="2026.1")["tag"] == "2026.1"
    assert client.publish(export, tag="2026.1")["created"] is False
    assert client.publish(export)["tag"] == "v1"
    write_export(
        export, {"config.json": b"[1]", "model.safetensors": WEIGHTS, "empty.txt": b"", "extra/notes.txt": b""}
    )
    with pytest.raises(HubConflictError, match=r"the tag 2026\.1 is on commit"):
        client.publish(export, tag="2026.1")
    assert client.titles() == ["Publish 2026.1", "initial commit"]


def test_a_commit_that_came_first_is_a_conflict(client, export):
    """When somebody commits between reading main and committing, nothing is overwritten and the error says so."""

    def intrude(_, path, __):
        if "/preupload/" in path:
            entry = client.repo.store(b"theirs")
            client.repo.apply("main", [Put("theirs.txt", entry)], "theirs", "", None)

    client.on_request = intrude
    with pytest.raises(HubConflictError, match=r"HTTP 412.*somebody else changed the repository"):
        client.publish(export)
    assert client.titles() == ["theirs", "initial commit"]
    assert client.repo.refs().tags == {}


def test_a_byte_flipped_on_the_hub_is_found_before_a_tag_is_set(client, export):
    """A published file whose bytes changed on the server stops the next release, again and again, with its name."""
    client.publish(export)
    right = hashlib.sha256(WEIGHTS).hexdigest()
    blob = client.repo.object_file(right)
    damaged = bytearray(blob.read_bytes())
    damaged[1000] ^= 1
    blob.write_bytes(damaged)
    files = {"model.safetensors": WEIGHTS, "config.json": b"[1]", "empty.txt": b"", "extra/notes.txt": b"n"}
    write_export(export, files)
    found = hashlib.sha256(damaged).hexdigest()
    for _ in range(2):
        with pytest.raises(HubContentError, match=f"model.safetensors at .* sha256 {found}, expected .*{right}"):
            client.publish(export)
    assert client.repo.refs().tags.keys() == {"v1"}


def test_weights_that_changed_after_the_export_are_not_published(client, export):
    """Weights whose bytes are not those of `export.json`, at the same size, never reach a commit."""
    weights = bytes(2 * 2**20)
    write_export(export, {"model.safetensors": weights})
    for name in ("config.json", "empty.txt", "extra/notes.txt"):
        (export / name).unlink()
    (export / "model.safetensors").write_bytes(b"\1" + weights[1:])
    with pytest.raises(HubError, match=r"HTTP 422 \(The bytes sent have sha256"):
        client.publish(export)
    assert client.titles() == ["initial commit"]


def test_a_missing_or_wrong_token_is_named(tmp_path, export):
    """Without a token, with a wrong one, or with one that may only read, publishing says so and nothing changes."""
    with Client(tmp_path, token="hf_right", read_only_token="hf_reader") as client:
        with pytest.raises(HubAuthError, match=r"HTTP 401.*no token was sent; set HF_TOKEN"):
            client.publish(export)
        with pytest.raises(HubAuthError, match=r"HTTP 401.*did not accept the token; set HF_TOKEN"):
            client.publish(export, token="hf_wrong")
        with pytest.raises(HubAuthError, match=r"HTTP 403.*lacks write permission"):
            client.publish(export, token="hf_reader")
        assert client.call_alone({"HF_TOKEN": "hf_right"}, "publish", export, REPO, private=True)["tag"] == "v1"
        assert client.repo.settings["private"]
        (export / "empty.txt").unlink()
        write_export(export, {"config.json": b"[]", "model.safetensors": WEIGHTS, "extra/notes.txt": b""})
        with pytest.raises(HubAuthError, match=r"HTTP 403.*lacks write permission"):
            client.publish(export, token="hf_reader")
        assert client.call("latest_release", REPO) is None
        assert client.call("latest_release", REPO, token="hf_reader")["tag"] == "v1"
        with pytest.raises(HubAuthError, match="HTTP 401"):
            client.call("latest_release", REPO, token="hf_wrong")
        assert client.titles() == ["Publish v1", "initial commit"]


def test_a_public_repository_is_not_used_for_a_private_release(client, export):
    """A private release is refused where the repository exists and is public, before a file is sent."""
    Repos(client.directory).create(REPO, private=False)
    with pytest.raises(HubConflictError, match="exists and is public, and private was asked for"):
        client.publish(export, private=True)
    assert client.titles() == ["initial commit"]


@pytest.mark.parametrize("endpoint", ["http://hub.example.org", "http://10.0.0.1:8080"])
def test_a_token_does_not_travel_in_the_clear(client, export, endpoint):
    """A token is refused for a plain http address of another machine, before a connection is made."""
    with pytest.raises(HubAuthError, match="over https or to this machine only"):
        client.publish(export, endpoint=endpoint, token="hf_secret")


def test_another_machine_needs_a_token(client, export):
    """Publishing elsewhere without a token ends before a connection is made, and says what to set."""
    with pytest.raises(HubAuthError, match="no token found; set HF_TOKEN"):
        client.publish(export, endpoint="https://hub.example.org")


def test_xet_is_refused_for_a_server_on_this_machine(client, export):
    """With Xet on, a loopback server is refused with what to set, as it takes LFS uploads alone."""
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1 before Python starts"):
        client.call_alone({"HF_HUB_DISABLE_XET": "0"}, "publish", export, REPO)
    assert client.requests == []


def test_only_a_server_on_this_machine_switches_xet_off():
    """A child's environment names the endpoint, and turns Xet off for loopback alone."""
    local = "http://127.0.0.1:8000"
    assert child_environment(local + "/") == {"HF_ENDPOINT": local, "HF_HUB_DISABLE_XET": "1"}
    assert child_environment("http://[::1]:1") == {"HF_ENDPOINT": "http://[::1]:1", "HF_HUB_DISABLE_XET": "1"}
    for remote in ("https://huggingface.co", "http://127.0.0.1.example.org"):
        assert child_environment(remote) == {"HF_ENDPOINT": remote}
    for wrong in ("huggingface.co", "ftp://x", "http://", "http://user:pass@host", "http://h?x=1", "http://h:99999"):
        with pytest.raises(ArgumentError):
            child_environment(wrong)


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path):
    """A server that takes a connection and says nothing ends in an error, also where the client sets no timeout."""
    code = """
        import json, socket, time
        from huggingface_hub import HfApi
        from huggingface_hub.utils import httpx
        from ckpt_core.errors import HubError
        from ckpt_core.hub import connection, latest_release
        with socket.create_server(("127.0.0.1", 0)) as listener:
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            connection.IDLE_SECONDS = 0.3
            start, seen = time.monotonic(), []
            try:
                latest_release("team/model", endpoint=endpoint)
            except HubError as error:
                seen.append(str(error))
            try:
                HfApi(endpoint=endpoint, token=False).model_info("team/model", timeout=None)
            except httpx.TimeoutException:
                seen.append("timeout")
            print(json.dumps([seen, time.monotonic() - start]))
        """
    seen, seconds = run_child(code, child_environment_for("http://127.0.0.1:1", tmp_path))
    assert "no answer within" in seen[0]
    assert seen[1:] == ["timeout"]
    assert seconds < 5


def test_a_hub_that_is_not_there_is_named(client, export):
    """An address where nothing listens is an error that names it."""
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9/team/model: the Hub cannot be reached"):
        client.publish(export, endpoint="http://127.0.0.1:9")


def test_what_is_private_in_the_client_is_as_expected(client, export):
    """The client takes a file's sha256 as given, without hashing it again, and its factory can be read."""
    code = f"""
        import json
        import huggingface_hub.lfs, huggingface_hub.utils._http as internals
        from huggingface_hub.utils import httpx
        from ckpt_core.hub import publish
        hashed = []
        huggingface_hub.lfs.sha_fileobj = lambda file: hashed.append(file.name)
        made = []
        def mine():
            made.append(True)
            return httpx.Client()
        internals.set_client_factory(mine)
        release = publish({str(export)!r}, "team/model")
        publish({str(export)!r}, "team/model")
        print(json.dumps([release.tag, hashed, len(made)]))
        """
    home = client.tmp_path / "home"
    assert run_child(code, child_environment_for(client.endpoint, home)) == ["v1", [], 1]


def test_a_release_loads_by_name_in_a_fresh_process(client, tmp_path):
    """A tiny Llama, published, is loaded by name and revision in a fresh process with equal weights, and generates."""
    source = tmp_path / "llama"
    digests = run_child(
        f"""
        import hashlib, json, pathlib, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
        model.save_pretrained({str(source)!r}, max_shard_size="20KB")
        print(json.dumps({{name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
                          for name, value in model.state_dict().items()}}))
        """,
        child_environment_for(client.endpoint, tmp_path / "home"),
    )
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    release = client.publish(write_export(tmp_path / "export", files))
    client.publish(write_export(tmp_path / "export", {**files, "note.txt": b"later"}))
    loaded = run_child(
        f"""
        import hashlib, json, torch
        from transformers import AutoModelForCausalLM
        model, report = AutoModelForCausalLM.from_pretrained(
            {REPO!r}, revision={release["tag"]!r}, output_loading_info=True)
        text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        print(json.dumps({{"keys": [sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys")],
            "length": text.shape[1], "weights": {{name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
                                                 for name, value in model.state_dict().items()}}}}))
        """,
        {**child_environment_for(client.endpoint, tmp_path / "fresh")},
    )
    assert loaded == {"keys": [[], []], "length": 7, "weights": digests}


def damage(export, how):
    """Make an export disagree with its `export.json`."""
    manifest = export / "export.json"
    text = manifest.read_text()
    if how == "missing":
        (export / "config.json").unlink()
    elif how == "extra":
        (export / "pytorch_model.bin").write_bytes(b"")
    elif how == "size":
        (export / "config.json").write_bytes(b"{} ")
    elif how == "content":
        (export / "config.json").write_bytes(b"[]")
    elif how == "no manifest":
        manifest.unlink()
    else:
        changes = {
            "no json": text[:-1],
            "list": "[]",
            "version": text.replace('"format_version": 1', '"format_version": 2'),
            "digest": text.replace(hashlib.sha256(b"{}").hexdigest(), "0"),
            "climbs": text.replace('"config.json"', '"../config.json"'),
            "absolute": text.replace('"config.json"', '"/etc/passwd"'),
            "itself": text.replace('"config.json"', '"export.json"'),
        }
        manifest.write_text(changes[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "config.json is in export.json but not there"),
        ("extra", "pytorch_model.bin is there but not in export.json"),
        ("size", "config.json has 3 bytes, export.json says 2"),
        ("content", "config.json was changed after export.json was written"),
        ("no manifest", "export.json is missing"),
        ("no json", "export.json is damaged"),
        ("list", "export.json is damaged"),
        ("version", "format_version is 2, expected 1"),
        ("digest", "config.json has no size or sha256"),
        ("climbs", "'../config.json' is not the name of a file in the export"),
        ("absolute", "'/etc/passwd' is not the name of a file"),
        ("itself", "'export.json' is not the name of a file"),
    ],
)
def test_a_damaged_export_is_refused(export, how, message):
    """An export that is not what its `export.json` says is a DamagedError that names the file."""
    damage(export, how)
    with pytest.raises(DamagedError, match=message):
        read_contents(export, None, "")


def test_a_damaged_export_reaches_no_server(client, export):
    """Publishing a damaged export ends before the first request."""
    damage(export, "size")
    with pytest.raises(DamagedError, match=r"config\.json has 3 bytes"):
        client.publish(export)
    assert client.requests == []


def test_an_export_brings_one_card(tmp_path, export):
    """A card comes from the export, from the caller, or by default; two of them are refused."""
    assert read_contents(export, None, "default")["README.md"].source == b"default"
    assert read_contents(export, "mine", "default")["README.md"].source == b"mine"
    own = write_export(tmp_path / "own", {"README.md": b"own"})
    assert read_contents(own, None, "default")["README.md"].sha256 == hashlib.sha256(b"own").hexdigest()
    with pytest.raises(ArgumentError, match=r"README.md of its own"):
        read_contents(own, "mine", "default")
    with pytest.raises(ArgumentError, match="not a directory"):
        read_contents(tmp_path / "none", None, "")


def test_wrong_names_are_refused(client, export):
    """A repository without a namespace, or a tag that git cannot hold, is an ArgumentError and sends nothing."""
    for name, options in (
        ("model", {}),
        ("a/b/c", {}),
        ("../x", {}),
        (REPO, {"tag": "a b"}),
        (REPO, {"tag": "x.lock"}),
    ):
        with pytest.raises(ArgumentError):
            client.call("publish", export, name, **options)
    assert client.requests == []
