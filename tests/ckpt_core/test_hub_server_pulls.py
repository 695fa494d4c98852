import json
from base64 import b64encode

import httpx2
import pytest
from hub_child import child_environment_for, run_child

from ckpt_core.testing.hub_server import hub_server

API = "/api/models/team/model"


@pytest.fixture
def server(tmp_path):
    """Run a server."""
    with hub_server(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def http(server):
    """Give a plain HTTP client of the server, which has one repository."""
    with httpx2.Client(base_url=server.endpoint, trust_env=False) as client:
        client.post("/api/repos/create", json={"name": "model", "organization": "team"}).raise_for_status()
        yield client


def commit(http, path, content, *, to="main", **query):
    """Commit one small file and return the answer."""
    value = {"path": path, "content": b64encode(content).decode(), "encoding": "base64"}
    lines = [{"key": "header", "value": {"summary": f"write {path}"}}, {"key": "file", "value": value}]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return http.post(f"{API}/commit/{to}", params=query, content=body).raise_for_status().json()


def main_files(http):
    """Return the names of the files on main."""
    return {item["path"] for item in http.get(f"{API}/tree/main").raise_for_status().json()} - {".gitattributes"}


def test_the_client_opens_describes_and_merges_a_pull_request(server, tmp_path):
    """A commit with create_pr leaves main alone; merged, it is one commit on main with the files of the proposal."""
    found = run_child(
        """
        import json
        from huggingface_hub import CommitOperationAdd as Add, HfApi
        api, repo = HfApi(token="any"), "team/model"
        api.create_repo(repo)
        start = api.create_commit(repo, [Add("a.txt", b"a")], commit_message="start").oid
        info = api.create_commit(repo, [Add("b.txt", b"b"), Add("c.bin", bytes(9))], commit_message="more",
            create_pr=True)
        out = {"ref": info.pr_revision, "number": info.pr_num, "before": sorted(api.list_repo_files(repo))}
        api.create_commit(repo, [Add("d.txt", b"d")], commit_message="yet more", revision=info.pr_revision)
        out["proposed"] = sorted(api.list_repo_files(repo, revision="refs/pr/1"))
        refs = api.list_repo_refs(repo, include_pull_requests=True)
        out["refs"] = [ref.ref for ref in refs.pull_requests]
        details = api.get_discussion_details(repo, 1)
        out["described"] = [details.title, details.status, details.conflicting_files]
        api.merge_pull_request(repo, 1)
        details = api.get_discussion_details(repo, 1)
        out["merged"] = [details.status, details.merge_commit_oid == api.model_info(repo).sha]
        out["after"] = sorted(api.list_repo_files(repo))
        out["commits"] = [commit.title for commit in api.list_repo_commits(repo)]
        second = api.create_pull_request(repo, title="another").num
        api.change_discussion_status(repo, second, "closed")
        out["second"] = [second, api.get_discussion_details(repo, second).status]
        print(json.dumps(out))
        """,
        child_environment_for(server.endpoint, tmp_path / "home"),
    )
    assert found == {
        "ref": "refs/pr/1",
        "number": 1,
        "before": [".gitattributes", "a.txt"],
        "proposed": [".gitattributes", "a.txt", "b.txt", "c.bin", "d.txt"],
        "refs": ["refs/pr/1"],
        "described": ["more", "open", []],
        "merged": ["merged", True],
        "after": [".gitattributes", "a.txt", "b.txt", "c.bin", "d.txt"],
        "commits": ["more (#1)", "start", "initial commit"],
        "second": [2, "closed"],
    }


def test_a_merge_keeps_what_main_did_meanwhile(http):
    """A pull request that touches other files than main did since is merged beside them."""
    commit(http, "a.txt", b"proposed", create_pr=1)
    commit(http, "b.txt", b"meanwhile")
    http.post(f"{API}/discussions/1/merge").raise_for_status()
    assert main_files(http) == {"a.txt", "b.txt"}


def test_a_merge_that_would_overwrite_is_refused(http):
    """Where main changed a file that the pull request changes too, 409 names it and main stays as it is."""
    commit(http, "a.txt", b"proposed", create_pr=1)
    head = commit(http, "a.txt", b"meanwhile")["commitOid"]
    answer = http.post(f"{API}/discussions/1/merge")
    assert (answer.status_code, "a.txt" in answer.json()["error"]) == (409, True)
    assert http.get(API).json()["sha"] == head
    assert http.get(f"{API}/discussions/1").json()["filesWithConflicts"] == ["a.txt"]


def test_a_pull_request_is_merged_once(http):
    """A second merge is refused with 400 and makes no second commit."""
    commit(http, "a.txt", b"proposed", create_pr=1)
    answers = [http.post(f"{API}/discussions/1/merge").status_code for _ in range(2)]
    assert answers == [200, 400]
    assert len(http.get(f"{API}/commits/main").json()) == 2


def test_a_pull_request_that_is_not_there_is_refused(http):
    """Describing or merging an unknown pull request is answered with 404, and discussions do not exist."""
    assert http.get(f"{API}/discussions/7").status_code == 404
    assert http.post(f"{API}/discussions/7/merge").status_code == 404
    assert http.post(f"{API}/discussions", json={"title": "talk", "pullRequest": False}).status_code == 400
