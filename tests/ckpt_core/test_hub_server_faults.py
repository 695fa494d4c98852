import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from ckpt_core.errors import ArgumentError
from ckpt_core.testing.hub_faults import Fault, Faults
from ckpt_core.testing.hub_server import hub_server

REPO = "/api/models/team/model"
FILE = "/team/model/resolve/main/.gitattributes"


@pytest.fixture
def faults():
    """Give a plan without faults."""
    return Faults()


@pytest.fixture
def server(tmp_path, faults):
    """Run a server whose faults the plan gives, with one repository."""
    with hub_server(tmp_path / "hub", faults=faults) as running:
        body = {"name": "model", "organization": "team"}
        httpx2.post(f"{running.endpoint}/api/repos/create", json=body, trust_env=False).raise_for_status()
        running.requests.clear()
        yield running


@pytest.fixture
def http(server):
    """Give a plain HTTP client of the server."""
    with httpx2.Client(base_url=server.endpoint, trust_env=False, timeout=20) as client:
        yield client


def tags(http):
    """Return the names of the repository's tags."""
    return [tag["name"] for tag in http.get(f"{REPO}/refs").json()["tags"]]


def tag(http, name, **options):
    """Ask for a tag."""
    return http.post(f"{REPO}/tag/main", json={"tag": name}, **options)


def test_a_status_is_answered_and_nothing_is_done(http, faults):
    """The request is refused with the status and Retry-After that were asked for, once, and has no effect."""
    faults.add(Fault(kind="status", status=429, retry_after=3))
    answer = tag(http, "v1")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert tags(http) == []
    assert tag(http, "v1").status_code == 200
    assert [(strike.method, strike.path) for strike in faults.struck] == [("POST", f"{REPO}/tag/main")]


def test_a_status_is_503_unless_it_says_otherwise(http, faults):
    """Without a status and a time to come back, the answer is 503 and has no Retry-After."""
    faults.add(Fault(kind="status"))
    answer = http.get(REPO)
    assert (answer.status_code, "retry-after" in answer.headers) == (503, False)


def test_a_delay_holds_a_request_back(http, faults):
    """The answer is right, and comes no sooner than the delay."""
    faults.add(Fault(kind="delay", seconds=0.3))
    start = time.monotonic()
    assert tag(http, "v1").status_code == 200
    assert time.monotonic() - start >= 0.3
    assert tags(http) == ["v1"]


def test_nothing_is_done_for_a_client_that_did_not_wait(http, faults, server):
    """A client that gives up during the delay has asked for nothing."""
    faults.add(Fault(kind="delay", seconds=60))
    with pytest.raises(httpx2.ReadTimeout):
        tag(http, "v1", timeout=0.2)
    assert tags(http) == []
    assert [request.status for request in server.requests if request.method == "POST"] == [None]


def test_a_cut_ends_the_connection_before_anything_is_done(http, faults, server):
    """The client sees the connection end without an answer, and the request had no effect."""
    faults.add(Fault(kind="cut"))
    with pytest.raises(httpx2.TransportError):
        tag(http, "v1")
    assert tags(http) == []
    assert [request.status for request in server.requests] == [None, 200]


def test_a_cut_in_an_upload_stores_nothing(http, faults, server):
    """Of a body of which a part came nothing is kept."""
    oid = hashlib.sha256(b"x" * 10**6).hexdigest()
    request = {"operation": "upload", "objects": [{"oid": oid, "size": 10**6}]}
    objects = http.post("/team/model.git/info/lfs/objects/batch", json=request).json()["objects"]
    kept = sorted((server.directory / "team/model/objects").iterdir())
    faults.add(Fault(kind="cut", body="request", at=1000))
    with pytest.raises(httpx2.TransportError):
        http.put(objects[0]["actions"]["upload"]["href"], content=iter([b"x" * 1000, b"x" * 999_000]))
    assert sorted((server.directory / "team/model/objects").iterdir()) == kept
    assert next(r.received for r in server.requests if r.method == "PUT") >= 1000


def test_a_cut_in_a_download_leaves_a_part(http, faults, server):
    """The client gets the asked number of bytes of a file and then the end of the connection, and the log says so."""
    whole = http.get(FILE).content
    faults.add(Fault(kind="cut", body="response", at=100))
    got: list[bytes] = []
    with http.stream("GET", FILE) as answer, pytest.raises(httpx2.RemoteProtocolError):
        got.extend(answer.iter_raw())
    assert b"".join(got) == whole[:100]
    assert [(r.status, r.sent) for r in server.requests] == [(200, len(whole)), (200, 100)]


def test_a_lost_answer_is_to_a_request_that_was_carried_out(http, faults):
    """The connection ends without an answer, or 504 is answered, and what was asked for is done."""
    faults.add(Fault(kind="lost"))
    with pytest.raises(httpx2.TransportError):
        tag(http, "v1")
    assert tags(http) == ["v1"]
    faults.add(Fault(kind="lost", status=504))
    assert tag(http, "v2").status_code == 504
    assert tags(http) == ["v1", "v2"]


def test_a_flipped_byte_of_an_upload_reaches_the_server(http, faults):
    """The server gets another byte than was sent, and refuses an object that is not what its digest says."""
    oid = hashlib.sha256(b"0123456789").hexdigest()
    request = {"operation": "upload", "objects": [{"oid": oid, "size": 10}]}
    objects = http.post("/team/model.git/info/lfs/objects/batch", json=request).json()["objects"]
    address = objects[0]["actions"]["upload"]["href"]
    faults.add(Fault(kind="flip", body="request", at=4))
    assert http.put(address, content=b"0123456789").status_code == 422
    assert http.put(address, content=b"0123456789").status_code == 200


def test_a_flipped_byte_of_a_download_reaches_the_client(http, faults):
    """Exactly one byte of the answer is another."""
    whole = http.get(FILE).content
    faults.add(Fault(kind="flip", body="response", at=200))
    damaged = http.get(FILE).content
    assert [at for at, (a, b) in enumerate(zip(whole, damaged, strict=True)) if a != b] == [200]
    assert http.get(FILE).content == whole


def test_a_fault_strikes_the_request_that_it_names(http, faults):
    """By number, counted from when it was added, or by method and path; as often as it says, and no more."""
    faults.add(Fault(kind="status", on=2, times=2))
    assert [http.get(REPO).status_code for _ in range(4)] == [200, 503, 503, 200]
    faults.add(Fault(kind="status", status=500, on=lambda method, path: (method, path) == ("GET", f"{REPO}/refs")))
    addresses = [REPO, f"{REPO}/refs", f"{REPO}/refs"]
    assert [http.get(address).status_code for address in addresses] == [200, 500, 200]


def test_a_plan_can_be_emptied_while_the_server_runs(http, faults):
    """Of a fault that was taken back nothing is seen."""
    faults.add(Fault(kind="status", times=1000))
    assert http.get(REPO).status_code == 503
    faults.clear()
    assert http.get(REPO).status_code == 200
    assert faults.struck == []


def test_concurrent_requests_are_struck_as_often_as_planned(http, server, faults):
    """Of requests that come at once exactly as many fail as the fault says, and each is logged once."""
    faults.add(Fault(kind="status", times=7))

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: http.get(REPO).status_code, range(40)))
    assert sorted(statuses) == [200] * 33 + [503] * 7
    assert sorted(request.status for request in server.requests) == sorted(statuses)
    assert len({request.number for request in server.requests}) == 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "status", "on": 0}, "counted from 1"),
        ({"kind": "status", "times": 0}, "at least once"),
        ({"kind": "status", "status": 200}, "no error"),
        ({"kind": "flip"}, "body='request'"),
        ({"kind": "cut", "at": -1}, "negative"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(options, said):
    """A fault whose fields do not fit together is an ArgumentError when it is made."""
    with pytest.raises(ArgumentError, match=said):
        Fault(**options)


def test_the_log_counts_what_went_each_way(http, server):
    """Each request is logged with method, path, status and the bytes of both bodies, in order, until it is cleared."""
    sent = tag(http, "v1").request.content
    got = http.get(f"{REPO}/refs?x=1").content
    http.head(FILE)
    http.get("/nothing/here")
    log = list(server.requests)
    assert [(r.method, r.path, r.status) for r in log] == [
        ("POST", f"{REPO}/tag/main", 200),
        ("GET", f"{REPO}/refs", 200),
        ("HEAD", FILE, 200),
        ("GET", "/nothing/here", 404),
    ]
    assert [(r.received, r.sent) for r in log][:3] == [(len(sent), 2), (0, len(got)), (0, 0)]
    assert [r.number for r in log] == sorted(r.number for r in log)
    server.requests.clear()
    assert len(server.requests) == 0
