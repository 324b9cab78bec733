from __future__ import annotations

import pytest

from lightning_rejuv.anchor.links import lies_within

HASH = "ab" * 32


@pytest.fixture
def cache(tmp_path):
    """The layout of the Hugging Face Hub's cache, with a secret beside it."""
    for name in ("hub/models--o--n/snapshots/rev/deep", "hub/models--o--n/blobs", "hub/models--o--m/blobs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "ab").mkdir(parents=True)
    for name in (
        "secret",
        "hub/models--o--n/blobs/1",
        "hub/models--o--m/blobs/2",
        f"hub/blobs/ab/{HASH}",
        "hub/blobs/x",
    ):
        (tmp_path / name).write_text(name)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("target", "within"),
    [
        ("../../blobs/1", True),
        ("other.json", True),
        ("deep/other.json", True),
        (f"../../../blobs/ab/{HASH}", True),
        ("../../../blobs/x", False),
        ("../../../models--o--m/blobs/2", False),
        ("../../../../secret", False),
        ("../../refs", False),
        ("nowhere", False),
        ("link.json", False),  # itself
    ],
)
def test_a_link_in_the_hubs_cache(cache, target, within):
    revision = cache / "models--o--n" / "snapshots" / "rev"
    for name in ("other.json", "deep/other.json"):
        (revision / name).write_text("{}")
    (revision / "link.json").symlink_to(target)
    assert lies_within(revision, "link.json") is within
    assert lies_within(revision, "other.json")
    (revision / "deep" / "blob").symlink_to("../../../blobs/1")
    assert lies_within(revision / "deep", "blob")


def test_a_blob_in_the_shared_store_through_the_repositorys(cache):
    repository = cache / "models--o--n"
    (repository / "blobs" / "etag").symlink_to(f"../../blobs/ab/{HASH}")
    (repository / "blobs" / "planted").symlink_to("../../../secret")
    for name, within in (("etag", True), ("planted", False)):
        (repository / "snapshots" / "rev" / name).symlink_to(f"../../blobs/{name}")
        assert lies_within(repository / "snapshots" / "rev", name) is within


def test_blobs_that_are_a_link_themselves_lead_out(cache):
    repository = cache / "models--o--n"
    (repository / "blobs" / "1").unlink()
    (repository / "blobs").rmdir()
    (repository / "blobs").symlink_to(cache.parent)
    (repository / "snapshots" / "rev" / "link").symlink_to("../../blobs/secret")
    assert not lies_within(repository / "snapshots" / "rev", "link")


def test_the_same_layout_under_another_name_is_no_cache(tmp_path):
    for name in ("x/snapshots/rev", "x/blobs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "x" / "blobs" / "1").write_text("secret")
    (tmp_path / "x" / "snapshots" / "rev" / "link").symlink_to("../../blobs/1")
    assert not lies_within(tmp_path / "x" / "snapshots" / "rev", "link")


def test_a_directory_that_is_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert lies_within(tmp_path / "link", "file")
    assert not lies_within(tmp_path / "link", "../link2")
    assert not lies_within(tmp_path / "nowhere", "file")
    assert not lies_within(tmp_path / "real", "a\0b")
