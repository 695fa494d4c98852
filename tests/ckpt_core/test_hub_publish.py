"""Publishing to a local Hub: what is sent, what is refused, and what an error says."""

import hashlib
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hub_child import child_environment_for, run_child
from hub_client import REPO, Client, line_for, sharded_files, weights, write_export

from ckpt_core.errors import ArgumentError, DamagedError, HubAuthError, HubConflictError, HubContentError, HubError
from ckpt_core.hub import child_environment
from ckpt_core.hub.contents import read_contents
from ckpt_core.testing.hub_repo import Put
from ckpt_core.testing.hub_repos import Repos

FILES = {"model.safetensors": weights(), "config.json": b"{}", "extra/notes.txt": b"n", "empty.txt": b""}


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory):
    """Run one server without tokens, and one process that calls it, for all tests of a module."""
    with Client(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture
def client(shared_client):
    """Give the server and its caller, without a repository."""
    yield shared_client
    shared_client.forget()


@pytest.fixture
def export(tmp_path):
    """Write a small export: weights, a config, a file in a folder and an empty one."""
    return write_export(tmp_path / "export", FILES)


def test_importing_the_client_loads_no_heavy_library(tmp_path):
    """`import ckpt_core.hub` loads neither torch nor transformers nor huggingface_hub."""
    code = "import sys, json, ckpt_core.hub; print(json.dumps([name for name in sys.modules]))"
    loaded = set(run_child(code, child_environment_for("http://127.0.0.1:1", tmp_path)))
    assert not {"torch", "transformers", "huggingface_hub"} & loaded


def test_the_life_of_a_repository(client, export, tmp_path):
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
        "replaced": [],
    }
    assert client.repo.refs().branches.keys() == {"main"}
    assert client.titles() == ["Publish v1", "initial commit"]

    write_export(export, {"model.safetensors": weights(), "config.json": b"[]", "empty.txt": b"", "new.txt": b"1"})
    client.requests.clear()
    second = client.publish(export)
    assert (second["tag"], second["created"]) == ("v2", True)
    assert client.titles() == ["Publish v2", "Publish v1", "initial commit"]
    assert not [path for method, path, _ in client.requests if method == "PUT" or path.endswith("/objects/batch")]
    here = {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()}
    assert client.repo.commit("v2").files.keys() == {*here, "README.md", ".gitattributes"}
    assert client.repo.commit("v1").files.keys() >= {"extra/notes.txt"}

    assert client.call("served", REPO) == {**second, "created": False}
    place = client.call("download", REPO, "v1", directory=str(tmp_path / "copy"))
    assert place == str(tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == weights()
    assert (tmp_path / "copy/config.json").read_bytes() == b"{}"


def test_an_unchanged_release_sends_and_reads_nothing(client, tmp_path):
    """Publishing again asks four times for metadata, and opens export.json and small files only."""
    export = write_export(tmp_path / "export", sharded_files([1, 2], 300_000))
    first = client.publish(export)
    client.requests.clear()
    client.log.clear()
    assert client.publish(export) == {**first, "created": False}
    refs, tree = f"/api/models/{REPO}/refs", f"/api/models/{REPO}/tree/{first['commit']}"
    assert client.requests == [("GET", refs, 200), ("GET", tree, 200)] * 2
    assert sum(request.received for request in client.log) == 0
    opened = {path.rsplit("/", 1)[-1] for path in client.opened if path.startswith(str(export))}
    assert opened <= {"export.json", "config.json", "model.safetensors.index.json"}


def test_a_changed_shard_is_the_only_one_sent(client, tmp_path):
    """A release in which one shard of four changed sends that one, and reads them all."""
    files = sharded_files([1, 2, 3, 4], 300_000)
    client.publish(write_export(tmp_path / "first", files))
    changed = sharded_files([1, 2, 9, 4], 300_000)
    client.log.clear()
    client.publish(write_export(tmp_path / "second", changed))
    size = len(changed["model-00003-of-00004.safetensors"])
    assert [request.received for request in client.log if request.method == "PUT"] == [size]
    assert sum(request.received for request in client.log) < size + 20_000
    opened = {path.rsplit("/", 1)[-1] for path in client.opened if path.endswith(".safetensors")}
    assert opened == {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}


def test_nothing_is_served_before_the_first_release(client):
    """A missing repository, and one whose main holds no export, serve no release, whatever their tags."""
    assert client.call("served", REPO) is None
    repo = Repos(client.directory).create(REPO, private=False)
    for tag in ("v0", "v1", "xv3"):
        repo.add_ref("tags", tag, "main")
    assert client.call("served", REPO) is None


def test_versions_count_by_number(client, export):
    """The next version follows the highest number among the tags, of which only vN count."""
    repo = Repos(client.directory).create(REPO, private=False)
    for tag in ("v2", "v9", "v10", "v11rc1"):
        repo.add_ref("tags", tag, "main")
    assert client.publish(export)["tag"] == "v11"


def test_a_tag_that_is_missing_is_added_to_the_commit_that_is_there(client, export):
    """After a stop between commit and tag, what is served has no tag; a rerun sets it, and commits nothing again."""
    first = client.publish(export)
    client.repo.remove_ref("tags", "v1")
    assert client.call("served", REPO)["tag"] is None
    assert client.publish(export) == first
    assert client.titles() == ["Publish v1", "initial commit"]


@pytest.mark.parametrize(
    ("method", "part", "number"),
    [
        ("POST", "/repos/create", 1),
        ("PUT", "/api/lfs/", 2),
        ("POST", "/commit/candidate", 1),
        ("POST", "/commit/main", 1),
        ("POST", "/tag/", 1),
        ("DELETE", "/branch/", 1),
    ],
)
def test_killed_at_any_moment_a_rerun_completes_the_release(client, tmp_path, method, part, number):
    """A publisher that dies with -9 as the Hub answers leaves main whole; the rerun ends in one commit, tagged once."""
    export = write_export(tmp_path / "export", sharded_files([1, 2], 300_000))
    publisher = client.start_worker()
    seen = 0

    def kill(asked, path, _):
        nonlocal seen
        seen += (asked, part in path) == (method, True)
        if seen == number and publisher.poll() is None:
            os.kill(publisher.pid, signal.SIGKILL)

    client.on_request = kill
    publisher.communicate(line_for("publish", export, REPO), timeout=60)
    assert publisher.returncode == -signal.SIGKILL
    client.on_request = lambda *_: None
    assert client.titles() in (["initial commit"], ["Publish v1", "initial commit"])
    sent = [path for asked, path, status in client.requests if asked == "PUT" and status == 200]
    client.requests.clear()
    release = client.publish(export)
    again = [path for asked, path, _ in client.requests if asked == "PUT"]
    assert len({path.split("?")[0] for path in sent + again}) == len(sent + again) == 2
    assert (release["tag"], release["commit"]) == ("v1", client.repo.resolve("main"))
    assert client.titles() == ["Publish v1", "initial commit"]
    refs = client.repo.refs()
    assert (refs.tags, refs.branches) == ({"v1": release["commit"]}, {"main": release["commit"]})


def test_killed_after_main_came_back_to_an_old_content_the_new_commit_gets_a_tag(client, export, tmp_path):
    """When a release with the content of an old one ends before its tag, the rerun sets that on its own commit."""
    client.publish(export)
    client.publish(write_export(tmp_path / "other", {**FILES, "config.json": b"[]"}))
    publisher = client.start_worker()
    client.on_request = lambda _, path, __: os.kill(publisher.pid, signal.SIGKILL) if "/commit/main" in path else None
    publisher.communicate(line_for("publish", export, REPO), timeout=60)
    client.on_request = lambda *_: None
    release = client.publish(export)
    assert (release["tag"], client.repo.refs().tags["v3"]) == ("v3", client.repo.resolve("main"))
    assert client.titles()[:2] == ["Publish v3", "Publish v2"]


def test_a_commit_that_came_first_is_a_conflict(client, export):
    """When somebody commits while an export is sent, nothing is overwritten, and the error says who and what."""
    said = r"moved main from \w+ to \w+ \('theirs' by local\).*run it again to go on"

    def intrude(_, path, __):
        if "/preupload/" in path:
            entry = client.repo.store(b"theirs")
            client.repo.apply("main", [Put("theirs.txt", entry)], "theirs", "", None)

    client.on_request = intrude
    with pytest.raises(HubConflictError, match=said):
        client.publish(export)
    assert client.titles()[0] == "theirs"
    assert client.repo.refs().tags == {}
    client.on_request = lambda *_: None
    assert client.publish(export)["tag"] == "v1"
    assert client.repo.refs().branches.keys() == {"main"}


def test_a_byte_flipped_on_the_hub_is_found_when_it_is_read_back(client, export, tmp_path):
    """A published file whose bytes changed on the server stops a release that reads back, with its name."""
    client.publish(export)
    right = hashlib.sha256(weights()).hexdigest()
    blob = client.repo.object_file(right)
    damaged = bytearray(blob.read_bytes())
    damaged[1000] ^= 1
    blob.write_bytes(damaged)
    write_export(export, {**FILES, "config.json": b"[1]"})
    found = hashlib.sha256(damaged).hexdigest()
    for _ in range(2):
        with pytest.raises(HubContentError, match=f"model.safetensors at .* sha256 {found}, expected .*{right}"):
            client.publish(export, read_back=True)
    assert client.repo.refs().tags.keys() == {"v1"}
    assert client.titles() == ["Publish v1", "initial commit"]
    with pytest.raises(HubContentError, match=rf"sha256 {found}, expected .*{right}; main was not moved"):
        client.call("roll_back", REPO, "v1", read_back=True)
    with pytest.raises(HubContentError, match=r"model\.safetensors of v1 arrived damaged"):
        client.call("download", REPO, "v1", directory=str(tmp_path / "copy"))


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
        write_export(export, {"config.json": b"[]", "model.safetensors": weights(), "extra/notes.txt": b""})
        with pytest.raises(HubAuthError, match=r"HTTP 403.*lacks write permission"):
            client.publish(export, token="hf_reader")
        assert client.call("served", REPO) is None
        assert client.call("served", REPO, token="hf_reader")["tag"] == "v1"
        with pytest.raises(HubAuthError, match="HTTP 401"):
            client.call("served", REPO, token="hf_wrong")
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


def test_a_child_is_told_of_its_hub():
    """A child's environment names the endpoint, without a slash at its end; what is no address is refused."""
    assert child_environment("http://127.0.0.1:8000/") == {"HF_ENDPOINT": "http://127.0.0.1:8000"}
    assert child_environment("https://huggingface.co") == {"HF_ENDPOINT": "https://huggingface.co"}
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
        from ckpt_core.hub import connection, retries, served
        with socket.create_server(("127.0.0.1", 0)) as listener:
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            connection.IDLE_SECONDS, retries.FIRST_WAIT_S = 0.3, 0.01
            start, seen = time.monotonic(), []
            try:
                served("team/model", endpoint=endpoint)
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


class BusyHub(BaseHTTPRequestHandler):
    """A Hub that has no repositories, and is busy with making another one."""

    def do_GET(self):
        """Answer that there is nothing."""
        self.answer(404, "Repository not found", "RepoNotFound")

    def do_POST(self):
        """Answer that a repository is being made."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(409, "Cannot create repo: another conflicting operation is in progress")

    def answer(self, status, message, code=""):
        """Answer with an error, and count it."""
        self.server.answered.append(status)
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


def test_a_hub_that_stays_busy_is_not_asked_for_ever(client, export):
    """Where the client would ask for a new repository for as long as another is being made, a few tries are made."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BusyHub) as server:
        server.answered = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(HubError, match="busy with another repository of this account"):
                client.publish(export, endpoint=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert server.answered == [404] + [409] * 5


def test_what_a_hand_changed_is_named_when_it_is_replaced(client, export):
    """A release that replaces files that no release has says which; one after a release, or a roll back, none."""
    first = client.publish(export)
    entry = client.repo.store(b"theirs")
    client.repo.apply("main", [Put("README.md", entry), Put("theirs.txt", entry)], "theirs", "", None)
    second = client.publish(write_export(export, FILES | {"config.json": b"{ }"}))
    assert (first["replaced"], second["replaced"]) == ([], ["README.md", "theirs.txt"])
    client.publish(write_export(export, FILES | {"config.json": b"[]"}))
    client.call("roll_back", REPO, "v1", endpoint=client.endpoint)
    assert client.publish(export)["replaced"] == []


def test_a_hub_that_is_not_there_is_named(client, export):
    """An address where nothing listens is an error that names it."""
    with pytest.raises(
        HubError, match=r"http://127\.0\.0\.1:9/team/model: the Hub cannot be reached, or broke off \([^:]*\);"
    ):
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
    elif how == "pipe":
        (export / "empty.txt").unlink()
        os.mkfifo(export / "empty.txt")
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
            "deep": "[" * 100_000,
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
        ("pipe", "empty.txt is no file, export.json says 0 bytes"),
        ("size", "config.json has 3 bytes, export.json says 2 bytes"),
        ("content", "config.json: was changed after export.json was written"),
        ("no manifest", "export.json is missing"),
        ("no json", "export.json is damaged"),
        ("list", "export.json is damaged"),
        ("deep", "export.json is damaged"),
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
        read_contents(export, "")


def test_large_weights_that_changed_after_the_export_are_read(tmp_path):
    """A large file that is newer than export.json is read: another content is refused by name, the same is fine."""
    export = write_export(tmp_path / "export", {"model.safetensors": weights(1, 400_000)})
    content = (export / "model.safetensors").read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content):
        (export / "model.safetensors").write_bytes(changed)
        later = (export / "export.json").stat().st_mtime_ns + 1
        os.utime(export / "model.safetensors", ns=(later, later))
        if changed == content:
            assert "model.safetensors" in read_contents(export, "")
        else:
            with pytest.raises(DamagedError, match=r"model\.safetensors: was changed after export\.json was written"):
                read_contents(export, "")


def test_a_damaged_export_reaches_no_server(client, export):
    """Publishing a damaged export ends before the first request."""
    damage(export, "size")
    with pytest.raises(DamagedError, match=r"config\.json has 3 bytes"):
        client.publish(export)
    assert client.requests == []


def test_a_text_file_that_git_holds_is_the_one_that_was_converted(client, tmp_path):
    """A long text file, of which the Hub says no sha256, is read for its own: another content is never served."""
    text = b"a vocabulary\n" * 100_000
    export = write_export(tmp_path / "export", {**FILES, "vocabulary.txt": text})
    (export / "vocabulary.txt").write_bytes(text[:-1] + b"!")
    os.utime(export / "vocabulary.txt", (0, 0))
    with pytest.raises(DamagedError, match=r"vocabulary\.txt: was changed after export\.json was written"):
        client.publish(export)
    assert client.titles() == ["initial commit"]


def test_an_export_brings_one_card(tmp_path, export):
    """A card comes from the export, from the caller, or is made of export.json; two of them are refused."""

    def default(record):
        return f"default of {record['source']['digest']}"

    assert read_contents(export, default)["README.md"].source == b"default of sha256:1"
    assert read_contents(export, "mine")["README.md"].source == b"mine"
    own = write_export(tmp_path / "own", {"README.md": b"own"})
    assert read_contents(own, default)["README.md"].sha256 == hashlib.sha256(b"own").hexdigest()
    with pytest.raises(ArgumentError, match=r"README.md of its own"):
        read_contents(own, "mine")
    with pytest.raises(ArgumentError, match="not a directory"):
        read_contents(tmp_path / "none", default)


def test_an_export_in_a_bucket_is_to_be_copied_first(client):
    """The URL of an export is an ArgumentError that names it and says what to do, before any request."""
    with pytest.raises(ArgumentError, match=r"^s3://bucket/exports/one is a URL, .* copy it to a directory"):
        client.publish("s3://bucket/exports/one")
    assert client.requests == []


def test_the_default_card_says_what_was_not_evaluated(client, export):
    """A release without a card of its own gets one that says it was not evaluated, and names the checkpoint."""
    client.publish(export)
    text = client.repo.content(client.repo.entry("v1", "README.md")[1]).decode()
    assert "not evaluated" in text.lower()
    assert "sha256:1" in text


def test_a_card_that_the_hub_does_not_take_is_named(client, export):
    """Metadata that the Hub refuses ends a publication with its reasons, before main moves."""
    with pytest.raises(HubError, match=r'does not accept the metadata of the card.*: - "license" must be one'):
        client.publish(export, card="---\nlicense: mine\n---\n# Card\n")
    assert client.titles() == ["initial commit"]
    assert client.publish(export, card="---\nlicense: mit\n---\n# Card\n")["tag"] == "v1"


def test_pictures_lie_beside_the_card(tmp_path, export):
    """They are files of the release; a name that is taken, hidden or a path is refused."""
    contents = read_contents(export, "card", {"loss.png": b"png"})
    assert contents["loss.png"].sha256 == hashlib.sha256(b"png").hexdigest()
    for name in ("config.json", "README.md", "a/b.png", ".gitattributes", ""):
        with pytest.raises(ArgumentError, match="a picture cannot be named"):
            read_contents(export, "card", {name: b""})


def test_weights_that_are_no_safetensors_are_not_sent(client, tmp_path):
    """An export whose weights and digests agree but which no library could load ends before anything is sent."""
    files = sharded_files([1, 2], 1000)
    del files["model-00002-of-00002.safetensors"]
    with pytest.raises(DamagedError):
        client.publish(write_export(tmp_path / "export", files))
    with pytest.raises(DamagedError, match="not a sound safetensors file"):
        client.publish(write_export(tmp_path / "export", {"model.safetensors": b"0" * 100}))
    assert not [path for method, path, _ in client.requests if method == "PUT" or "/preupload/" in path]


def test_wrong_names_are_refused(client, export):
    """A repository without a namespace, or a tag that git cannot hold, is an ArgumentError and sends nothing."""
    for name, options in (
        ("model", {}),
        ("a/b/c", {}),
        ("a/..", {}),
        (REPO, {"tag": "a b"}),
        (REPO, {"tag": "x.lock"}),
        (REPO, {"tag": "0" * 40}),
    ):
        with pytest.raises(ArgumentError):
            client.call("publish", export, name, **options)
    assert client.requests == []
