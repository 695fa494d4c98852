import hashlib
import json
import random
import struct
import subprocess
import sys
import textwrap
import time

import hf_xet
import httpx2
import pytest
from hub_child import child_environment_for, run_child

from ckpt_core.testing.hub_faults import Fault, Faults
from ckpt_core.testing.hub_server import hub_server
from ckpt_core.testing.hub_xorbs import Xorb

REPO = "team/model"
API = f"/api/models/{REPO}"
CAS = "/api/xet/v1"

UPLOAD = """
    import json, os
    from huggingface_hub import CommitOperationAdd as Add, HfApi
    from huggingface_hub.utils._runtime import is_xet_available
    api, repo = HfApi(token="any"), os.environ["REPO"]
    api.create_repo(repo, exist_ok=True)
    files = os.environ["FILES"]
    operations = [Add(name, os.path.join(files, name)) for name in sorted(os.listdir(files))]
    try:
        commit = api.create_commit(repo, operations, commit_message="files").oid
    except Exception as error:
        commit = None
        print(error)
    print(json.dumps({"commit": commit, "xet": is_xet_available()}))
"""

DOWNLOAD = """
    import hashlib, json, os, pathlib
    from huggingface_hub import snapshot_download
    path = pathlib.Path(snapshot_download(os.environ["REPO"], token=False))
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    print(json.dumps(files))
"""


def environment(server, home, repo=REPO, files="", *, xet=True):
    """Return the environment of a client with a home of its own, with or without Xet."""
    variables = {**child_environment_for(server.endpoint, home), "REPO": repo, "FILES": str(files)}
    if xet:
        del variables["HF_HUB_DISABLE_XET"]
    return variables


def contents():
    """Return files that Xet packs in each of its ways: grouped, plain LZ4 and not at all; and some that are small."""
    draw = random.Random(0)
    floats = struct.pack("<500000f", *(draw.gauss(0, 0.02) for _ in range(500_000)))
    words = b" ".join(draw.choice([b"train", b"save", b"publish", b"verify"]) for _ in range(200_000))
    return {
        "floats.safetensors": floats,
        "words.bin": words,
        "noise.bin": draw.randbytes(1_500_001),
        "tiny.bin": b"\0\1\2",
        "config.json": b"{}",
    }


def write(directory, files):
    """Write files and return their directory."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def digests(files):
    """Return the sha256 of each content."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def asked(server, method, part):
    """Return the logged requests of a method whose path holds a part."""
    return [request for request in server.requests if request.method == method and part in request.path]


class Uploaded:
    """A server to which a client has uploaded `files` through Xet."""

    def __init__(self, directory, server):
        self.directory = directory
        self.server = server
        self.files = contents()
        self.folder = write(directory / "files", self.files)
        self.answer = run_child(UPLOAD, environment(server, directory / "home", files=self.folder))
        self.log = list(server.requests)


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """Upload files through Xet, once for all tests that only read them."""
    directory = tmp_path_factory.mktemp("xet")
    with hub_server(directory / "hub") as server:
        yield Uploaded(directory, server)


@pytest.fixture
def http(uploaded):
    """Give a plain HTTP client of the server with the uploaded files."""
    with httpx2.Client(base_url=uploaded.server.endpoint, trust_env=False) as client:
        yield client


@pytest.fixture
def reader(http):
    """Return the headers of who may read from the storage."""
    answer = http.get(f"{API}/xet-read-token/main").raise_for_status()
    assert answer.headers["x-xet-access-token"] == answer.json()["accessToken"]
    return {"Authorization": f"Bearer {answer.json()['accessToken']}"}


def test_the_client_uploads_through_xet_of_itself(uploaded):
    """Without any setting the real client uploads large files as xorbs and shards, and none by LFS."""
    assert uploaded.answer["xet"]
    assert uploaded.answer["commit"]
    done = {(request.method, request.path.split("/xet/")[-1].split("/")[1]) for request in uploaded.log}
    assert {("POST", "xorbs"), ("POST", "shards")} <= {(method, part) for method, part in done}
    assert not [request for request in uploaded.log if request.method == "PUT" or "info/lfs" in request.path]


def test_the_client_downloads_through_xet_what_it_uploaded(uploaded, tmp_path):
    """Another client, with a cache of its own, gets every file bit for bit, the large ones as ranges of xorbs."""
    uploaded.server.requests.clear()
    found = run_child(DOWNLOAD, environment(uploaded.server, tmp_path))
    found.pop(".gitattributes")
    assert found == digests(uploaded.files)
    assert len(asked(uploaded.server, "GET", "/v1/reconstructions/")) == 4
    assert asked(uploaded.server, "GET", "/api/xet/xorbs/")


def test_a_client_without_xet_downloads_what_was_uploaded_through_it(uploaded, tmp_path):
    """A client whose Xet is off gets the same bytes by plain requests."""
    uploaded.server.requests.clear()
    found = run_child(DOWNLOAD, environment(uploaded.server, tmp_path, xet=False))
    found.pop(".gitattributes")
    assert found == digests(uploaded.files)
    assert not asked(uploaded.server, "GET", "xet")


def test_a_file_uploaded_through_xet_has_all_headers_and_ranges(uploaded, http):
    """A plain request for it finds sha256, size and Xet hash in the headers, and gets ranges of its bytes."""
    content = uploaded.files["noise.bin"]
    answer = http.get(f"/{REPO}/resolve/main/noise.bin", headers={"Range": "bytes=1000000-1000999"})
    assert (answer.status_code, answer.content) == (206, content[1_000_000:1_001_000])
    sha256 = hashlib.sha256(content).hexdigest()
    assert answer.headers["etag"] == answer.headers["x-linked-etag"] == f'"{sha256}"'
    assert answer.headers["x-linked-size"] == "1500001"
    assert answer.headers["x-repo-commit"] == uploaded.answer["commit"]
    file = hf_xet.hash_files([str(uploaded.folder / "noise.bin")])[0].hash
    assert answer.headers["x-xet-hash"] == file
    assert answer.headers["x-xet-refresh-route"].endswith(f"{API}/xet-read-token/main")
    listed = {item["path"]: item for item in http.get(f"{API}/tree/main").json()}
    assert (listed["noise.bin"]["xetHash"], listed["noise.bin"]["lfs"]["oid"]) == (file, sha256)
    described = http.post(f"{API}/paths-info/main", data={"paths": ["noise.bin", "config.json"]}).json()
    assert [item.get("xetHash") for item in described] == [file, None]


def fetched(http, plan):
    """Return the bytes that a plan describes, fetched and unpacked as a client does it."""
    content = b""
    for term in plan["terms"]:
        info = next(info for info in plan["fetch_info"][term["hash"]] if info["range"] == term["range"])
        ends = info["url_range"]
        answer = http.get(info["url"], headers={"Range": f"bytes={ends['start']}-{ends['end']}"})
        assert answer.status_code == 206
        xorb = Xorb(answer.content)
        part = b"".join(map(xorb.unpack, xorb.chunks))
        assert len(part) == term["unpacked_length"]
        content += part
    return content[plan["offset_into_first_range"] :]


def test_any_range_of_a_file_can_be_reconstructed(uploaded, http, reader):
    """A plan for a range holds it, and at most a chunk more at either end; one beyond the end is refused with 416."""
    content = uploaded.files["floats.safetensors"]
    file = hf_xet.hash_files([str(uploaded.folder / "floats.safetensors")])[0].hash
    address = f"{CAS}/reconstructions/{file}"
    draw = random.Random(1)
    edges = [(0, 0), (0, 10**12), (len(content) - 1, len(content) - 1)]
    for first, last in [*edges, *(sorted(draw.choices(range(len(content)), k=2)) for _ in range(20))]:
        plan = http.get(address, headers={**reader, "Range": f"bytes={first}-{last}"}).raise_for_status().json()
        found = fetched(http, plan)
        wanted = content[first : last + 1]
        assert found[: len(wanted)] == wanted
        assert plan["offset_into_first_range"] < 2**17
        assert len(found) - len(wanted) < 2**17
    assert fetched(http, http.get(address, headers=reader).json()) == content
    beyond = http.get(address, headers={**reader, "Range": f"bytes={len(content)}-"})
    assert beyond.status_code == 416


def test_the_storage_is_closed_to_who_has_no_token(uploaded, http, reader):
    """Without a token it answers 401, to one that may only read 403 on an upload, and a forged address 403."""
    file = hf_xet.hash_files([str(uploaded.folder / "noise.bin")])[0].hash
    address = f"{CAS}/reconstructions/{file}"
    plan = http.get(address, headers=reader).json()
    xorb = plan["fetch_info"][plan["terms"][0]["hash"]][0]["url"]
    assert http.get(address).status_code == 401
    assert http.get(address, headers={"Authorization": f"Bearer read-{10**12}-{'0' * 64}"}).status_code == 401
    assert http.post(f"{CAS}/shards", content=b"x", headers=reader).status_code == 403
    assert http.get(xorb.partition("?")[0]).status_code == 403
    assert http.get(xorb).status_code == 200


def test_the_hub_gives_tokens_to_who_may_read_or_write(tmp_path):
    """Of a private repository, tokens to read go to who may read it and tokens to write to who may write to it."""
    body = {"name": "model", "organization": "team", "visibility": "private"}
    with (
        hub_server(tmp_path, token="right", read_only_token="reader") as server,
        httpx2.Client(base_url=server.endpoint, trust_env=False) as http,
    ):
        senders = [{}, *({"Authorization": f"Bearer {token}"} for token in ("wrong", "reader", "right"))]
        http.post("/api/repos/create", json=body, headers=senders[-1]).raise_for_status()
        read = [http.get(f"{API}/xet-read-token/main", headers=sender).status_code for sender in senders]
        write = [http.get(f"{API}/xet-write-token/main", headers=sender).status_code for sender in senders]
    assert (read, write) == ([401, 401, 200, 200], [401, 401, 403, 200])


def writer(http):
    """Return the headers of who may upload to the storage."""
    return {"Authorization": f"Bearer {http.get(f'{API}/xet-write-token/main').json()['accessToken']}"}


@pytest.mark.parametrize("body", [b"", b"x" * 500, bytes([0, 255, 0, 0, 0, 255, 0, 0]), bytes([1] * 64)])
def test_a_xorb_or_a_shard_that_is_none_is_refused(http, body):
    """Bytes that are no xorb and no shard are answered with 400, and a xorb's name that is no hash too."""
    headers = writer(http)
    assert http.post(f"{CAS}/xorbs/default/{'0' * 64}", content=body, headers=headers).status_code == 400
    assert http.post(f"{CAS}/shards", content=body, headers=headers).status_code == 400
    assert http.post(f"{CAS}/xorbs/default/..%2fx", content=body, headers=headers).status_code == 400


def test_what_the_storage_has_is_not_sent_again(uploaded, tmp_path):
    """A client that knows nothing uploads the same files to another repository, and sends no xorb."""
    uploaded.server.requests.clear()
    large = {name: uploaded.files[name] for name in ("floats.safetensors", "noise.bin")}
    folder = write(tmp_path / "files", large)
    assert run_child(UPLOAD, environment(uploaded.server, tmp_path / "home", "team/copy", folder))["commit"]
    assert not asked(uploaded.server, "POST", "xorb")
    found = run_child(DOWNLOAD, environment(uploaded.server, tmp_path / "other", "team/copy"))
    found.pop(".gitattributes")
    assert found == digests(large)


def test_a_client_with_xet_downloads_what_was_uploaded_by_lfs(tmp_path):
    """A file that came by LFS has no Xet hash, and a client whose Xet is on gets it by a plain request."""
    files = {"model.bin": random.Random(2).randbytes(100_000)}
    folder = write(tmp_path / "files", files)
    with hub_server(tmp_path / "hub") as server:
        assert run_child(UPLOAD, environment(server, tmp_path / "one", files=folder, xet=False))["commit"]
        assert asked(server, "PUT", "/api/lfs/")
        found = run_child(DOWNLOAD, environment(server, tmp_path / "two"))
        assert not asked(server, "GET", "/api/xet/")
    assert found["model.bin"] == digests(files)["model.bin"]


def test_a_server_without_xet_offers_none(tmp_path):
    """With `xet=False` there are no tokens, no storage and no Xet hashes, also for what was uploaded through Xet."""
    files = {"model.bin": random.Random(3).randbytes(100_000)}
    folder = write(tmp_path / "files", files)
    with hub_server(tmp_path / "hub") as server:
        assert run_child(UPLOAD, environment(server, tmp_path / "one", files=folder))["commit"]
    with hub_server(tmp_path / "hub", xet=False) as server, httpx2.Client(base_url=server.endpoint) as http:
        assert http.get(f"{API}/xet-read-token/main").status_code == 404
        assert http.get(f"{CAS}/reconstructions/{'0' * 64}").status_code == 404
        answer = http.get(f"/{REPO}/resolve/main/model.bin")
        assert answer.content == files["model.bin"]
        assert "x-xet-hash" not in answer.headers
        assert "xetHash" not in http.get(f"{API}/tree/main").text
        assert run_child(UPLOAD, environment(server, tmp_path / "two", "team/other", folder))["commit"] is None


def test_a_byte_flipped_on_its_way_is_not_committed(tmp_path):
    """A xorb that was damaged on its way is refused with its file, main stays, and the next attempt succeeds."""
    faults = Faults(Fault(kind="flip", body="request", at=50_000, on=lambda _, path: "/v1/xorbs/" in path))
    files = {"model.bin": random.Random(4).randbytes(200_000)}
    variables = {"files": write(tmp_path / "files", files)}
    with hub_server(tmp_path / "hub", faults=faults) as server, httpx2.Client(base_url=server.endpoint) as http:
        assert run_child(UPLOAD, environment(server, tmp_path / "home", **variables))["commit"] is None
        assert len(faults.struck) == 1
        assert len(http.get(f"{API}/commits/main").json()) == 1
        assert not list((tmp_path / "hub/.xet/contents").iterdir())
        assert run_child(UPLOAD, environment(server, tmp_path / "home", **variables))["commit"]
        assert http.get(f"/{REPO}/resolve/main/model.bin").content == files["model.bin"]


def test_a_client_whose_cache_is_of_another_server_is_told(tmp_path):
    """A shard made of xorbs that are not here is refused, and the message names the cache."""
    rows = b"\1" * 32 + struct.pack("<4I", 1 << 30, 1, 0, 0) + b"\2" * 32 + struct.pack("<4I", 0, 10, 0, 1)
    end = b"\xff" * 32 + bytes(16)
    tag = b"HFRepoMetaData\0" + bytes([85, 105, 103, 69, 106, 123, 129, 87, 131, 165, 189, 217, 92, 205, 209, 74, 169])
    shard = tag + struct.pack("<2Q", 2, 0) + rows + bytes(48) + end + end
    with hub_server(tmp_path / "hub") as server, httpx2.Client(base_url=server.endpoint, trust_env=False) as http:
        http.post("/api/repos/create", json={"name": "model", "organization": "team"}).raise_for_status()
        answer = http.post(f"{CAS}/shards", content=shard, headers=writer(http))
    assert answer.status_code == 400
    assert "HF_XET_CACHE" in json.loads(answer.content)["error"]


def test_a_killed_upload_is_completed_by_a_rerun(tmp_path):
    """A client killed between its xorbs and its shard has committed nothing, and with its cache commits when rerun."""
    faults = Faults(Fault(kind="delay", seconds=60, on=lambda _, path: path.endswith("/v1/shards")))
    files = {"model.bin": random.Random(6).randbytes(200_000)}
    with hub_server(tmp_path / "hub", faults=faults) as server, httpx2.Client(base_url=server.endpoint) as http:
        variables = environment(server, tmp_path / "home", files=write(tmp_path / "files", files))
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(UPLOAD)], env=variables)
        while not faults.struck:
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert len(http.get(f"{API}/commits/main").json()) == 1
        assert run_child(UPLOAD, variables)["commit"]
        assert http.get(f"/{REPO}/resolve/main/model.bin").content == files["model.bin"]
