import hashlib
import random
from pathlib import Path

import pytest
from hub_child import child_environment_for, run_child
from hub_client import REPO, Client, files_below, sharded_files, write_export

from ckpt_core.testing.hub_server import hub_server

OLDEST = "1.31.0"
CLIENTS = Path(__file__).parents[2] / ".clients"  # `make install` puts other versions of the client there

RELEASE = """
    import hashlib, json, os, pathlib
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd as Add, CommitOperationCopy as Copy, HfApi, snapshot_download
    from huggingface_hub.utils._runtime import is_xet_available
    api, repo, folder = HfApi(token="any"), "team/model", os.environ["FILES"]
    api.create_repo(repo)
    head = api.model_info(repo).sha
    api.create_branch(repo, branch="candidate/1")
    names = sorted(os.listdir(folder))
    operations = [Add(name, os.path.join(folder, name)) for name in names]
    api.preupload_lfs_files(repo, operations, revision="candidate/1")
    api.create_commit(repo, operations, commit_message="stage", revision="candidate/1")
    copies = [Copy(name, name, src_revision="candidate/1") for name in names]
    release = api.create_commit(repo, copies, commit_message="release", parent_commit=head).oid
    api.create_tag(repo, tag="v1", revision=release)
    api.delete_branch(repo, branch="candidate/1")
    path = pathlib.Path(snapshot_download(repo, revision="v1"))
    listed = {item.path: item.lfs.sha256 for item in api.list_repo_tree(repo, revision="v1") if item.lfs}
    print(json.dumps({
        "version": huggingface_hub.__version__, "xet": is_xet_available(),
        "commits": [commit.title for commit in api.list_repo_commits(repo)],
        "branches": [branch.name for branch in api.list_repo_refs(repo).branches], "listed": listed,
        "files": {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}}))
"""


def installed_in(version):
    """Return the directory that holds a version of the client, or skip where `make install` did not make it."""
    directory = CLIENTS / version
    if not (directory / "huggingface_hub").is_dir():
        pytest.skip(f"no {directory}: make install puts huggingface_hub {version} there")
    return directory


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
@pytest.mark.parametrize("version", [OLDEST, None], ids=["oldest", "installed"])
def test_a_release_works_with_each_client_in_each_mode(tmp_path, version, xet):
    """Staged on a branch, promoted by copies, tagged and downloaded: the same bytes, by the oldest client and ours."""
    draw = random.Random(5)
    files = {"model.safetensors": draw.randbytes(300_000), "tokenizer.json": b"{}", "tiny.bin": b"\0" * 9}
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    with hub_server(tmp_path / "hub") as server:
        environment = {**child_environment_for(server.endpoint, tmp_path / "home"), "FILES": str(tmp_path / "files")}
        if version is not None:
            environment["PYTHONPATH"] = str(installed_in(version))
        if xet:
            del environment["HF_HUB_DISABLE_XET"]
        found = run_child(RELEASE, environment)
        paths = [request.path for request in server.requests]
    assert found.pop("version") == version or version is None
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert found == {
        "xet": xet,
        "commits": ["release", "initial commit"],
        "branches": ["main"],
        "listed": {name: digests[name] for name in ("model.safetensors", "tiny.bin")},
        "files": digests,
    }
    assert any("/xet/v1/shards" in path for path in paths) is xet
    assert any("/xet/v1/reconstructions" in path for path in paths) is xet
    assert any("/info/lfs/" in path for path in paths) is not xet


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
@pytest.mark.parametrize("version", [OLDEST, None], ids=["oldest", "installed"])
def test_releases_are_made_and_taken_back_with_each_client(tmp_path, version, xet):
    """Publishing, nothing new, a new shard, rolling back and downloading work by the oldest client and ours."""
    environment = {"HF_HUB_DISABLE_XET": "01"[not xet]}
    if version is not None:
        environment["PYTHONPATH"] = str(installed_in(version))
    one = write_export(tmp_path / "one", sharded_files([1, 2], 5000))
    with Client(tmp_path, environment) as client:
        assert client.publish(one)["tag"] == "v1"
        assert not client.publish(one)["created"]
        assert client.publish(write_export(tmp_path / "two", sharded_files([1, 3], 5000)))["tag"] == "v2"
        assert client.call("roll_back", REPO, "v1")["created"]
        client.call("download", REPO, "main", directory=str(tmp_path / "copy"))
        assert any("/xet/v1/shards" in path for _, path, _ in client.requests) is xet
    found = files_below(tmp_path / "copy")
    assert {name: data for name, data in found.items() if name != "README.md"} == files_below(one)
