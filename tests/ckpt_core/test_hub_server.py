import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from hub_child import child_environment_for, run_child

from ckpt_core.errors import ArgumentError
from ckpt_core.testing.hub_repos import Repos
from ckpt_core.testing.hub_server import hub_server

REPO = "team/model"
API = f"/api/models/{REPO}"


def lines(*operations, parent=None):
    """Return the body of a commit request."""
    header = {"summary": "a title", "description": "a text", **({"parentCommit": parent} if parent else {})}
    return b"".join(json.dumps(line).encode() + b"\n" for line in [{"key": "header", "value": header}, *operations])


def file_line(path, content):
    """Return the operation that adds a small file."""
    return {"key": "file", "value": {"path": path, "content": b64encode(content).decode(), "encoding": "base64"}}


@pytest.fixture
def server(tmp_path):
    """Run a server without tokens."""
    with hub_server(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def http(server):
    """Give a plain HTTP client of the server, which has one repository."""
    with httpx2.Client(base_url=server.endpoint, trust_env=False) as client:
        client.post("/api/repos/create", json={"name": "model", "organization": "team"}).raise_for_status()
        yield client


def commit(http, *operations, parent=None, branch="main"):
    """Commit the operations and return the commit's id."""
    answer = http.post(f"{API}/commit/{branch}", content=lines(*operations, parent=parent))
    answer.raise_for_status()
    return answer.json()["commitOid"]


def test_the_client_manages_repositories(server, tmp_path):
    """The real client creates, describes, hides, checks and deletes a repository."""
    found = run_child(
        """
        import json
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
        api = HfApi(token="any")
        out = {"name": api.whoami()["name"], "id": api.create_repo("team/model").repo_id}
        out["again"] = api.create_repo("team/model", exist_ok=True).repo_id
        out["own"] = api.create_repo("mine").repo_id
        try:
            api.create_repo("team/model")
        except HfHubHTTPError as error:
            out["conflict"] = error.response.status_code
        api.update_repo_settings("team/model", private=True)
        info = api.model_info("team/model")
        out["private"], out["head"] = info.private, info.sha
        out["first"] = [commit.title for commit in api.list_repo_commits("team/model")]
        api.auth_check("team/model", write=True)
        api.delete_repo("team/model")
        api.delete_repo("team/model", missing_ok=True)
        try:
            api.model_info("team/model")
        except RepositoryNotFoundError as error:
            out["gone"] = error.response.status_code
        print(json.dumps(out))
        """,
        child_environment_for(server.endpoint, tmp_path / "home"),
    )
    assert found.pop("head")
    assert found == {
        "name": "local",
        "id": REPO,
        "again": REPO,
        "own": "local/mine",
        "conflict": 409,
        "private": True,
        "first": ["initial commit"],
        "gone": 404,
    }


def test_the_client_commits_lists_and_downloads(tmp_path):
    """The real client uploads small, LFS and multipart files, copies, deletes, and downloads the same bytes again."""
    with hub_server(tmp_path / "hub", part_size=1000, page_size=2) as server:
        found = run_child(
            """
            import json, pathlib, sys
            from huggingface_hub import (
                CommitOperationAdd as Add, CommitOperationCopy as Copy, CommitOperationDelete as Delete,
                HfApi, hf_hub_download, snapshot_download)
            from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
            api, repo = HfApi(token="any"), "team/model"
            api.create_repo(repo)
            big, card = bytes(range(256)) * 10, b"---\\nlicense: mit\\ntags: [a]\\n---\\n# Card"
            first = api.create_commit(repo, [
                Add("README.md", card), Add("config.json", b"{}"), Add("small.safetensors", b"1234"),
                Add("model.safetensors", big), Add("old/a.txt", b"a"), Add("old/b.txt", b"b"), Add("empty.txt", b"")],
                commit_message="first").oid
            second = api.create_commit(repo, [
                Copy("model.safetensors", "copy.safetensors"), Copy("config.json", "deep/er/config.json"),
                Delete("old/"), Delete("small.safetensors")], commit_message="second", parent_commit=first).oid
            api.create_branch(repo, branch="try/this", revision=first)
            api.create_tag(repo, tag="v1", revision=first)
            refs, info = api.list_repo_refs(repo), api.model_info(repo, revision="v1", files_metadata=True)
            last = {item.path: item.last_commit.oid for item in api.list_repo_tree(repo, recursive=True, expand=True)}
            path = pathlib.Path(snapshot_download(repo, revision="v1"))
            kept = hf_hub_download(repo, "deep/er/config.json")
            missing = []
            for arguments in ({"filename": "none"}, {"filename": "config.json", "revision": "none"}):
                try:
                    hf_hub_download(repo, **arguments)
                except (EntryNotFoundError, RevisionNotFoundError) as error:
                    missing.append(type(error).__name__)
            print(json.dumps({
                "main": sorted(api.list_repo_files(repo)), "v1": sorted(p.relative_to(path).as_posix()
                    for p in path.rglob("*") if p.is_file()),
                "same": (path / "model.safetensors").read_bytes() == big, "kept": pathlib.Path(kept).read_text(),
                "on branch": api.file_exists(repo, "old/a.txt", revision="try/this"),
                "branches": {ref.name: ref.target_commit for ref in refs.branches}
                    == {"main": second, "try/this": first},
                "tags": {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}, "info": info.sha == first,
                "license": info.card_data.license, "lfs": [s.rfilename for s in info.siblings if s.lfs],
                "kind": [type(i).__name__ for i in api.get_paths_info(repo, ["deep", "deep/er/config.json", "none"])],
                "last": last["config.json"] == first and last["deep"] == second and len(last) == 9,
                "commits": [c.title for c in api.list_repo_commits(repo)], "missing": missing}))
            """,
            child_environment_for(server.endpoint, tmp_path / "home"),
        )
    kept = {".gitattributes", "README.md", "config.json", "empty.txt", "model.safetensors"}
    assert found == {
        "main": sorted({*kept, "copy.safetensors", "deep/er/config.json"}),
        "v1": sorted({*kept, "old/a.txt", "old/b.txt", "small.safetensors"}),
        "same": True,
        "kept": "{}",
        "on branch": True,
        "branches": True,
        "tags": True,
        "info": True,
        "license": "mit",
        "lfs": ["model.safetensors", "small.safetensors"],
        "kind": ["RepoFolder", "RepoFile"],
        "last": True,
        "commits": ["second", "first", "initial commit"],
        "missing": ["RemoteEntryNotFoundError", "RevisionNotFoundError"],
    }


def test_a_file_is_served_with_ranges_and_the_headers_that_the_client_reads(http):
    """HEAD and GET of a file name its commit, its id and its size, and a range is answered with 206."""
    content = b"0123456789"
    head = commit(http, file_line("a/b.txt", content))
    whole = http.get(f"/{REPO}/resolve/main/a/b.txt")
    asked = http.head(f"/{REPO}/resolve/{head}/a/b.txt")
    part = http.get(f"/{REPO}/resolve/main/a/b.txt", headers={"Range": "bytes=3-5"})
    beyond = http.get(f"/{REPO}/resolve/main/a/b.txt", headers={"Range": "bytes=99-"})
    git_id = hashlib.sha1(b"blob 10\0" + content).hexdigest()
    assert (whole.content, asked.content, part.content) == (content, b"", b"345")
    assert (asked.status_code, part.status_code, beyond.status_code) == (200, 206, 416)
    assert asked.headers["content-length"] == "10"
    assert part.headers["content-range"] == "bytes 3-5/10"
    for answer in (whole, asked, part):
        assert answer.headers["etag"] == f'"{git_id}"'
        assert answer.headers["x-repo-commit"] == head


def upload_address(http, oid, size):
    """Ask where to send an object; None where the server has it."""
    request = {"operation": "upload", "objects": [{"oid": oid, "size": size}]}
    objects = http.post(f"/{REPO}.git/info/lfs/objects/batch", json=request).raise_for_status().json()["objects"]
    return objects[0].get("actions", {}).get("upload", {}).get("href")


def test_bytes_that_are_not_the_named_object_are_not_stored(http, server):
    """An LFS upload whose sha256 is not its id, or whose address was not issued, is refused and leaves nothing."""
    oid = hashlib.sha256(b"right").hexdigest()
    address = upload_address(http, oid, 5)
    objects = server.directory / REPO / "objects"
    before = sorted(objects.iterdir())
    assert http.put(address, content=b"wrong").status_code == 422
    assert http.put(address.partition("?")[0], content=b"right").status_code == 403
    assert sorted(objects.iterdir()) == before
    assert http.put(address, content=b"right").status_code == 200
    assert upload_address(http, oid, 5) is None
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 5}}
    head = commit(http, line)
    answer = http.head(f"/{REPO}/resolve/main/x.bin")
    assert answer.headers["x-linked-etag"] == answer.headers["etag"] == f'"{oid}"'
    assert (answer.headers["x-linked-size"], answer.headers["x-repo-commit"]) == ("5", head)


def test_a_commit_that_names_an_object_which_was_not_uploaded_is_refused(http):
    """A commit cannot point to bytes that the server does not hold."""
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 5}}
    assert http.post(f"{API}/commit/main", content=lines(line)).status_code == 400


def test_a_large_file_that_no_pattern_names_is_added_to_gitattributes(http):
    """As on the Hub, committing an LFS file that `.gitattributes` does not cover adds it there."""
    oid = hashlib.sha256(b"big json").hexdigest()
    http.put(upload_address(http, oid, 8), content=b"big json").raise_for_status()
    commit(http, {"key": "lfsFile", "value": {"path": "my tokenizer.json", "algo": "sha256", "oid": oid, "size": 8}})
    attributes = http.get(f"/{REPO}/resolve/main/.gitattributes").text
    assert attributes.splitlines()[-1] == "my?tokenizer.json filter=lfs diff=lfs merge=lfs -text"
    commit(http, file_line("other.txt", b"x"))
    assert http.get(f"/{REPO}/resolve/main/.gitattributes").text == attributes


def test_object_ids_are_those_of_git(http, server, tmp_path):
    """Files and folders of a commit have the ids that git itself computes."""
    files = {"a.txt": b"one", "a/b.txt": b"two", "a/c/d.txt": b"three", "a-b/e.txt": b"four", "z.txt": b""}
    files.pop("a.txt")
    commit(
        http, {"key": "deletedFile", "value": {"path": ".gitattributes"}}, *(file_line(*item) for item in files.items())
    )
    tree = http.get(f"{API}/tree/main", params={"recursive": "true"}).json()
    work = tmp_path / "git"
    for path, content in files.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(content)

    def git(*arguments):
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        return subprocess.run(["git", *arguments], cwd=work, env=environment, check=True, capture_output=True).stdout

    git("init", "-q")
    git("add", "-A")
    listed = git("ls-tree", "-r", "-t", git("write-tree").decode().strip()).decode().splitlines()
    expected = {line.split("\t")[1]: line.split()[2] for line in listed}
    assert {item["path"]: item["oid"] for item in tree} == expected


def test_of_concurrent_commits_on_one_parent_one_wins(http, server):
    """Of commits with one parent, sent at once to two servers of one directory, one lands and the others get 412."""
    parent = commit(http, file_line("start.txt", b"x"))

    def attempt(number, endpoint):
        content = lines(file_line(f"{number}.txt", b"y"), parent=parent)
        return httpx2.post(f"{endpoint}{API}/commit/main", content=content, trust_env=False).status_code

    with hub_server(server.directory) as other, ThreadPoolExecutor(8) as pool:
        endpoints = [server.endpoint, other.endpoint] * 8
        statuses = list(pool.map(attempt, range(16), endpoints))
    assert sorted(statuses) == [200] + [412] * 15
    assert [item["title"] for item in http.get(f"{API}/commits/main").json()] == [
        "a title",
        "a title",
        "initial commit",
    ]


def test_concurrent_commits_without_a_parent_all_land(http):
    """Commits that name no parent are put one after the other, and none is lost."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: commit(http, file_line(f"{number}.txt", b"y")), range(16)))
    files = {item["path"] for item in http.get(f"{API}/tree/main").json()}
    assert files == {".gitattributes", *(f"{number}.txt" for number in range(16))}


@pytest.mark.parametrize(
    ("operation", "status"),
    [
        (file_line("../x", b""), 400),
        (file_line("/x", b""), 400),
        (file_line("a//x", b""), 400),
        (file_line("a\0", b""), 400),
        (file_line(".git/config", b""), 400),
        (file_line("start.txt/x", b""), 400),
        ({"key": "file", "value": {"path": "x", "content": "%%%", "encoding": "base64"}}, 400),
        ({"key": "deletedFile", "value": {"path": "none"}}, 404),
        ({"key": "deletedFolder", "value": {"path": "none/"}}, 404),
        ({"key": "copyFile", "value": {"path": "x", "srcPath": "none"}}, 404),
        ({"key": "unknown", "value": {"path": "x"}}, 400),
        ({"key": "file", "value": []}, 400),
    ],
)
def test_a_bad_operation_refuses_the_whole_commit(http, operation, status):
    """A commit with one operation that cannot be done changes nothing."""
    head = commit(http, file_line("start.txt", b"x"))
    answer = http.post(f"{API}/commit/main", content=lines(file_line("good.txt", b"y"), operation))
    assert answer.status_code == status
    assert http.get(API).json()["sha"] == head


def test_a_repository_has_a_plain_name(http, server):
    """A repository's name that is not two plain words is refused, and nothing is created anywhere."""
    names = [{"name": name} for name in ("..", "a/b", "", "x" * 97, ".locks", "a--b", "x.git", "x\n", 7)]
    names += [{"name": "..", "organization": ".."}, {"name": "x", "organization": "api"}]
    before = sorted(server.directory.parent.rglob("*"))
    assert [http.post("/api/repos/create", json=name).status_code for name in names] == [400] * len(names)
    assert sorted(server.directory.parent.rglob("*")) == before


def test_no_address_leads_out_of_a_repository(http):
    """An address that climbs is answered with 400 or 404."""
    paths = [
        f"/{REPO}/resolve/main/..%2f..%2frepo.json",
        f"/{REPO}/resolve/..%2f..%2frefs/x",
        f"/{REPO}/resolve/main/%00",
        "/..%2f/x/resolve/main/y",
        f"{API}/tree/..%2f",
        f"{API}/tree/main/..%2f..",
        "/api/models/..%2f..%2f/etc",
    ]
    assert {http.get(path).status_code for path in paths} <= {400, 404}


def test_a_tag_that_git_would_refuse_is_refused(http):
    """A tag's name that git could not hold, or that looks like a commit, is refused with 400."""
    tags = ["", "a b", "../x", "a..b", "x/", "x.lock", "-x", "f" * 40]
    assert [http.post(f"{API}/tag/main", json={"tag": tag}).status_code for tag in tags] == [400] * len(tags)


def test_refs_are_created_once_and_deleted(http):
    """A tag and a branch appear, a second one of the same name is refused with 409, and deletion removes them."""
    for kind, address in (("tags", f"{API}/tag"), ("branches", f"{API}/branch")):
        send = [f"{address}/main", {"tag": "a/b"}] if kind == "tags" else [f"{address}/a%2Fb", {}]
        assert [http.post(send[0], json=send[1]).status_code for _ in range(2)] == [200, 409]
        assert "a/b" in {ref["name"] for ref in http.get(f"{API}/refs").json()[kind]}
        assert [http.delete(f"{address}/a%2Fb").status_code for _ in range(2)] == [200, 404]
    assert http.delete(f"{API}/branch/main").status_code == 403


def test_an_id_without_a_namespace_is_not_found(http):
    """No repository here has such an id: whatever is asked of one, the client learns that there is none."""
    for path in ("", "/revision/main", "/tree/main", "/refs", "/commits/main", "/auth-check"):
        answer = http.get(f"/api/models/gpt2{path}")
        assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RepoNotFound")
    assert http.head("/gpt2/resolve/main/config.json").headers["X-Error-Code"] == "RepoNotFound"
    assert http.post("/api/models/gpt2/preupload/main", json={}).headers["X-Error-Code"] == "RepoNotFound"
    for path in ("/api/datasets/team/model", "/api/spaces/team/model", "/datasets/team/model/resolve/main/a"):
        assert http.get(path).headers["X-Error-Code"] == "RepoNotFound"


def test_what_is_not_offered_is_refused_by_name(http):
    """An address of the Hub's that this server does not have is no missing repository where that is there."""
    answer = http.get(f"{API}/likers")
    assert (answer.status_code, answer.json()["error"]) == (404, f"This server does not offer GET {API}/likers")
    assert "X-Error-Code" not in answer.headers
    assert http.put(f"{API}/refs").status_code == 405
    said = "This server has no pull requests and no discussions: commit to a branch"
    for answer in (
        http.post(f"{API}/commit/main?create_pr=1", content=lines(file_line("a.txt", b"a"))),
        http.post(f"{API}/preupload/main?create_pr=1", json={"files": []}),
        http.post(f"{API}/discussions", json={"title": "a", "pullRequest": True}),
        http.get(f"{API}/discussions"),
        http.post(f"{API}/discussions/1/merge"),
    ):
        assert (answer.status_code, answer.json()["error"].startswith(said)) == (400, True)
    assert len(http.get(f"{API}/commits/main").json()) == 1
    assert http.post(f"{API}/branch/refs%2Fpr%2F1", json={}).status_code == 400


def test_an_id_in_another_case_is_the_same_repository(http, server):
    """A repository is found in any case, answers with its own name, and keeps others of that name out."""
    http.post("/api/repos/create", json={"name": "CaSe", "organization": "Team"}).raise_for_status()
    again = http.post("/api/repos/create", json={"name": "case", "organization": "TEAM"})
    assert (again.status_code, again.json()["id"]) == (409, "Team/CaSe")
    assert http.get("/api/models/team/case").json()["id"] == "Team/CaSe"
    done = http.post("/api/models/team/CASE/commit/main", content=lines(file_line("a.txt", b"a")))
    assert done.json()["commitUrl"].startswith(f"{server.endpoint}/Team/CaSe/commit/")
    assert http.get("/TEAM/case/resolve/main/a.txt").content == b"a"
    assert http.get(API).json()["id"] == REPO
    http.request("DELETE", "/api/repos/delete", json={"name": "case", "organization": "team"}).raise_for_status()
    assert http.get("/api/models/Team/CaSe").status_code == 404


def test_the_first_digits_of_a_commit_are_enough(http):
    """Five or more digits name a commit wherever a revision is read; too few or wrong ones are no revision."""
    first = commit(http, file_line("a.txt", b"a"))
    second = commit(http, file_line("b.txt", b"b"), parent=first[:7])
    assert http.get(f"{API}/revision/{first[:5]}").json()["sha"] == first
    assert http.get(f"/{REPO}/resolve/{second[:7]}/b.txt").headers["X-Repo-Commit"] == second
    http.post(f"{API}/tag/{first[:7]}", json={"tag": "v1"}).raise_for_status()
    assert http.get(f"{API}/refs").json()["tags"][0]["targetCommit"] == first
    for wrong in (first[:4], "00000", first[:7].upper()):
        assert http.get(f"{API}/revision/{wrong}").headers["X-Error-Code"] == "RevisionNotFound"
    with pytest.raises(httpx2.HTTPStatusError, match="412"):
        commit(http, file_line("c.txt", b"c"), parent=first[:7])


@pytest.mark.parametrize(
    ("operation", "left"),
    [
        ({"key": "deletedFile", "value": {"path": "d"}}, ["a.txt"]),
        ({"key": "deletedFile", "value": {"path": "d/"}}, ["a.txt"]),
        ({"key": "deletedFolder", "value": {"path": "d/"}}, ["a.txt"]),
        ({"key": "deletedFile", "value": {"path": "d/e"}}, ["a.txt", "d/b.txt"]),
    ],
)
def test_a_folder_is_deleted_as_a_file_is(http, operation, left):
    """What is deleted may be a folder, with or without a slash at its end; all below it goes."""
    commit(http, *(file_line(path, b"1") for path in ("a.txt", "d/b.txt", "d/e/c.txt")))
    commit(http, operation)
    files = [item["path"] for item in http.get(f"{API}/tree/main?recursive=1").json() if item["type"] == "file"]
    assert files == [".gitattributes", *left]


def test_a_deleted_gitattributes_stays_away(http, server):
    """It comes back with the next large file, and not before."""
    content = b"\0" * 10
    Repos(server.directory).get(REPO).object_file(hashlib.sha256(content).hexdigest()).write_bytes(content)
    large = {"algo": "sha256", "oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    commit(http, {"key": "lfsFile", "value": {"path": "large", **large}})
    commit(http, {"key": "deletedFile", "value": {"path": ".gitattributes"}})
    assert [item["path"] for item in http.get(f"{API}/tree/main").json()] == ["large"]
    commit(http, file_line("a.txt", b"a"))
    assert [item["path"] for item in http.get(f"{API}/tree/main").json()] == ["a.txt", "large"]
    commit(http, {"key": "lfsFile", "value": {"path": "again", **large}})
    assert http.get(f"/{REPO}/resolve/main/.gitattributes").text.startswith("again filter=lfs")


def test_commits_can_be_listed_as_html(http):
    """Where the client asks for it, titles and texts come as HTML too, escaped."""
    header = {"key": "header", "value": {"summary": "<b> & more", "description": "1 < 2"}}
    body = b"".join(json.dumps(line).encode() + b"\n" for line in (header, file_line("a.txt", b"a")))
    http.post(f"{API}/commit/main", content=body).raise_for_status()
    newest = http.get(f"{API}/commits/main", params={"expand[]": "formatted"}).json()[0]
    assert newest["formatted"] == {"title": "&lt;b&gt; &amp; more", "message": "1 &lt; 2"}
    assert newest["title"] == "<b> & more"
    assert "formatted" not in http.get(f"{API}/commits/main").json()[0]


def test_each_answer_has_the_id_of_its_request(http):
    """The client shows it in its errors: the id that it sent, or one that the server makes."""
    for path in (API, f"{API}/revision/none", "/nothing"):
        assert http.get(path, headers={"X-Amzn-Trace-Id": "mine"}).headers["X-Request-Id"] == "mine"
    ids = {http.get(API).headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2


def test_a_card_that_the_hub_would_not_take_is_refused(http):
    """Both when it is asked, which the client does first, and when it is committed, which then does nothing."""
    card = b"---\nlicense: asdf\nmodel-index: foo\n---\ntext"
    asked = http.post("/api/validate-yaml", json={"content": card.decode()})
    problems = [each["message"] for each in asked.json()["errors"]]
    assert asked.status_code == 400
    assert problems[0].startswith('"license" must be one of [')
    assert problems[1:] == ['"model-index" must be an array']
    answer = http.post(f"{API}/commit/main", content=lines(file_line("README.md", card)))
    assert answer.status_code == 400
    assert answer.json()["error"].startswith('Invalid metadata in README.md.\n- "license" must be one of')
    assert len(http.get(f"{API}/commits/main").json()) == 1
    commit(http, file_line("docs/README.md", card))  # only the card at the top is one


def test_broken_yaml_in_a_card_is_refused(http):
    """The YAML at the top of a card is checked before anything is uploaded."""
    good = http.post("/api/validate-yaml", json={"content": "---\na: 1\n---\n", "repoType": "model"})
    bad = http.post("/api/validate-yaml", json={"content": "---\na: [1\n---\n", "repoType": "model"})
    assert (good.status_code, bad.status_code) == (200, 400)
    assert "YAML" in bad.json()["errors"][0]["message"]


def test_tokens_decide_who_may_write_and_see(tmp_path):
    """Writing needs the token, a read-only one gets 403, an unknown one 401, and a private repository is hidden."""
    with (
        hub_server(tmp_path, token="right", read_only_token="reader") as server,
        httpx2.Client(base_url=server.endpoint, trust_env=False) as http,
    ):

        def statuses(method, path, **options):
            senders = [{}, *({"Authorization": f"Bearer {token}"} for token in ("wrong", "reader", "right"))]
            return [http.request(method, path, headers=sender, **options).status_code for sender in senders]

        body = {"name": "model", "organization": "team", "visibility": "private"}
        assert statuses("POST", "/api/repos/create", json=body) == [401, 401, 403, 200]
        assert statuses("GET", API) == [401, 401, 200, 200]
        assert statuses("GET", f"{API}/auth-check/write") == [401, 401, 403, 200]
        assert statuses("GET", f"/{REPO}/resolve/main/.gitattributes") == [401, 401, 200, 200]
        assert statuses("GET", "/api/whoami-v2") == [401, 401, 200, 200]
        assert statuses("POST", f"{API}/tag/main", json={"tag": "v1"}) == [401, 401, 403, 200]
        assert statuses("PUT", f"{API}/settings", json={"visibility": "public"}) == [401, 401, 403, 200]
        assert statuses("GET", API) == [200, 401, 200, 200]


def test_a_request_under_another_host_name_is_refused(http):
    """A name that merely resolves to loopback does not reach the server."""
    assert http.get(API, headers={"Host": "evil.example.org"}).status_code == 400


def test_repositories_survive_a_restart(tmp_path):
    """A server started again over the same directory serves the same commits, tags and bytes."""
    with hub_server(tmp_path) as server, httpx2.Client(base_url=server.endpoint, trust_env=False) as http:
        http.post("/api/repos/create", json={"name": "model", "organization": "team"})
        head = commit(http, file_line("a.txt", b"kept"))
        http.post(f"{API}/tag/main", json={"tag": "v1"}).raise_for_status()
    with hub_server(tmp_path) as server, httpx2.Client(base_url=server.endpoint, trust_env=False) as http:
        assert http.get(f"/{REPO}/resolve/v1/a.txt").text == "kept"
        assert http.get(API).json()["sha"] == head


def test_stopping_leaves_no_thread_and_no_port(tmp_path):
    """When the block ends the server's threads are gone and nothing listens, though a client kept its connection."""
    before = set(threading.enumerate())
    with httpx2.Client(trust_env=False) as http:
        with hub_server(tmp_path) as server:
            assert http.get(f"{server.endpoint}{API}").status_code == 404
        address = server.endpoint.removeprefix("http://").split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address[0], int(address[1])), timeout=5)
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert set(threading.enumerate()) == before


def test_a_port_that_is_taken_is_named(tmp_path):
    """A port in use is an ArgumentError that names it."""
    with hub_server(tmp_path) as server:
        port = int(server.endpoint.rpartition(":")[2])
        with pytest.raises(ArgumentError, match=f"port {port} on 127.0.0.1 is in use"), hub_server(tmp_path, port=port):
            pass


SERVE = """
import sys
from ckpt_core.testing.hub_server import serve
serve(sys.argv[1], ready=lambda server: print(server.endpoint, flush=True))
print("stopped", flush=True)
"""


def serving(directory):
    """Start `serve` in a child process; return it and its endpoint."""
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_returns_on_a_signal(tmp_path, number):
    """SIGTERM and SIGINT end `serve` by returning, and the process exits with 0."""
    process, endpoint = serving(tmp_path)
    assert httpx2.get(f"{endpoint}{API}", trust_env=False).status_code == 404
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "stopped\n"
    assert process.returncode == 0


def test_a_killed_server_leaves_only_whole_commits(tmp_path):
    """Killed with -9 at any moment between and within commits, what main names is there, each file with its digest."""
    repo = Repos(tmp_path).create(REPO, private=False)
    draw = random.Random()
    acknowledged = 1
    for _ in range(4):
        process, endpoint = serving(tmp_path)
        killer = threading.Timer(draw.uniform(0.02, 0.4), process.kill)
        killer.start()
        try:
            with httpx2.Client(base_url=endpoint, trust_env=False) as http:
                for number in range(10**6):
                    commit(http, file_line(f"{number}.bin", draw.randbytes(100_000)))
                    acknowledged += 1
        except httpx2.TransportError:
            pass
        finally:
            killer.join()
            process.communicate(timeout=20)
        history = list(repo.history("main"))
        assert len(history) in (acknowledged, acknowledged + 1)
        acknowledged = len(history)
        for entry in history[0].files.values():
            assert hashlib.sha256(repo.content(entry)).hexdigest() == entry.sha256
