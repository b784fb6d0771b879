"""Against a real server that speaks S3, one that fails, and none."""

from __future__ import annotations

import http.client
import pickle
import socket
import time

import pytest

from qtrain.data import object_store, optional_libraries
from qtrain.data.object_store import ObjectMissing, ObjectStore, StoreUnreachable, check_address, is_address
from qtrain.data.optional_libraries import LibraryMissing


@pytest.fixture
def store(bucket) -> ObjectStore:
    return ObjectStore(f"{bucket}/some/folder/")


def test_objects_are_written_and_read(store, tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    assert not store.has("x/a")
    store.write_file(tmp_path / "a", "x/a")
    store.write_file(tmp_path / "a", "x/deeper/b")
    assert store.has("x/a")
    assert store.read("x/a") == b"0123456789"
    assert store.read_range("x/a", 2, 5) == b"234"
    assert store.read_range("x/a", 8, 20) == b"89"
    assert store.size("x/a") == 10
    assert store.names("x") == ["a"]
    assert store.names("y") == []
    assert store.below("x").read("a") == b"0123456789"
    assert store.at("x/a") == f"{store.address}/x/a"
    assert pickle.loads(pickle.dumps(store)).read("x/a") == b"0123456789"
    # What another process writes later is seen
    (tmp_path / "a").write_bytes(b"new")
    ObjectStore(store.address).write_file(tmp_path / "a", "x/a")
    assert store.size("x/a") == 3


def test_files_of_this_machine_and_of_memory_have_addresses_too(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    for address in (f"file://{tmp_path}/out/deep", "memory://out/deep"):
        store = ObjectStore(address)
        with pytest.raises(ObjectMissing, match=r"there is no object .*out/deep/b"):
            store.read("b")
        store.write_file(tmp_path / "a", "b")
        assert store.read("b") == b"abc"
        assert store.names("") == ["b"] or store.below("").names("") == ["b"]


def test_what_is_missing_is_said_at_once(store, monkeypatch):
    monkeypatch.setattr(object_store, "BACKOFF", (60.0,))
    with pytest.raises(ObjectMissing, match=f"there is no object {store.address}/x"):
        store.read("x")
    with pytest.raises(ObjectMissing):
        ObjectStore("s3://no-such-bucket/x").size("y")


def test_a_bucket_is_never_made_by_a_misspelling(bucket, tmp_path):
    import s3fs

    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(ObjectMissing):
        ObjectStore("s3://mispelt-bucket/x").write_file(tmp_path / "a", "b")
    assert "mispelt-bucket" not in s3fs.S3FileSystem(use_listings_cache=False).ls("")


@pytest.mark.parametrize("mode", ["503", "drop"])
def test_a_server_that_fails_every_second_request_is_read(store, flaky, tmp_path, mode):
    (tmp_path / "a").write_bytes(bytes(range(250)) * 40)
    handler = flaky(mode)
    store = ObjectStore(store.address)
    store.write_file(tmp_path / "a", "a")
    assert (
        b"".join(store.read_range("a", i, i + 1000) for i in range(0, 10000, 1000)) == bytes(range(250)) * 40
    )
    assert handler.seen.total() >= 20


def test_a_server_that_always_fails_is_named(store, flaky, monkeypatch, capsys):
    monkeypatch.setattr(object_store, "BACKOFF", (0.0,))
    flaky("never")
    with pytest.raises(
        StoreUnreachable, match=rf"{store.address}/a cannot be reached, 2 attempts in a row: .*resume=auto"
    ):
        ObjectStore(store.address).read("a")
    assert "again in 0 s" in capsys.readouterr().err


def test_an_endpoint_where_nobody_listens_is_named(store, monkeypatch):
    import s3fs

    monkeypatch.setattr(object_store, "BACKOFF", (0.0,))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = "http://{}:{}".format(*probe.getsockname())
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreUnreachable, match=f"cannot be reached, 2 attempts.*{endpoint}"):
        ObjectStore(store.address).read("a")


def test_wrong_credentials_are_said_at_once(store, moto_endpoint, tmp_path, monkeypatch):
    """moto checks credentials from here on, until told not to."""

    def checking(requests_without: float) -> None:
        connection = http.client.HTTPConnection(moto_endpoint.removeprefix("http://"))
        connection.request("POST", "/moto-api/reset-auth", str(requests_without))
        assert connection.getresponse().status == 200

    monkeypatch.setattr(object_store, "BACKOFF", (60.0,))
    checking(0)
    try:
        begun = time.monotonic()
        with pytest.raises(StoreUnreachable, match=r"the store refuses \(.*see to the credentials"):
            store.read("a")
        assert time.monotonic() - begun < 30
    finally:
        checking(float("inf"))


def test_no_credentials_are_said_at_once(store, tmp_path, monkeypatch):
    import s3fs

    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    for name in ("SHARED_CREDENTIALS_FILE", "CONFIG_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(object_store, "BACKOFF", (60.0,))
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(StoreUnreachable, match="the store refuses"):
        ObjectStore(store.address).write_file(tmp_path / "a", "a")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("bucket/path", "no address; write it as s3://bucket/path"),
        ("s3://", "no address"),
        ("s3://key:secret@bucket/path", r"the address s3://\.\.\. holds more than a place"),
        ("s3://bucket/path?endpoint=http://x", "leave credentials and endpoints to the environment"),
    ],
)
def test_what_is_no_address_is_refused_without_its_secrets(address, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_address(address)
    assert "secret" not in str(refused.value)


def test_addresses_are_told_from_paths():
    assert [is_address(p) for p in ("s3://b/p", "gs://b", "hf://datasets/a@main/b", "/a/b", "a:b", "", None)] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip
    assert check_address("hf://datasets/a@main/b/") == "hf://datasets/a@main/b"


def test_missing_libraries_are_named_with_their_command(monkeypatch):
    with pytest.raises(LibraryMissing, match=r"gs://bucket/x needs .*: pip install gcsfs"):
        ObjectStore("gs://bucket/x").read("y")
    with pytest.raises(ValueError, match=r"nowhere://x/y: .*nowhere"):
        ObjectStore("nowhere://x/y").read("z")

    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(optional_libraries.importlib, "import_module", missing)
    with pytest.raises(LibraryMissing, match="pip install fsspec"):
        ObjectStore("s3://bucket/x").read("y")
