"""Adapters as files: bit for bit, atomic, verified."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from imprint.adapters.adapter import FORMAT, Adapter
from imprint.adapters.errors import CorruptAdapterError
from imprint.adapters.files import STALE_AFTER_S, partial_suffix
from imprint.adapters.store import AdapterStore
from imprint.models import DeltaNet, LoraDelta


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "deep" / "adapters")


@pytest.fixture
def adapted(tiny_model: DeltaNet, read_adapter: Adapter) -> Adapter:
    delta = LoraDelta.init(tiny_model.lora_targets(), 2, seed=0)
    for i, tensor in enumerate(delta.b.values()):
        tensor.normal_(generator=torch.Generator().manual_seed(i))
    manifest = {"method": "refine", "seed": 2**63, "result": {"alpha": 0.5, "reason": "größer"}}
    return dataclasses.replace(read_adapter, delta=delta, manifest=manifest)


def assert_same(got: Adapter, right: Adapter) -> None:
    assert got.manifest == right.manifest
    assert got.tokens_T.dtype == torch.int64
    mine, theirs = got.to_tensors(), right.to_tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_round_trip_is_bit_for_bit(
    store: AdapterStore, adapted: Adapter, read_adapter: Adapter
) -> None:
    size = store.save("with", adapted)
    store.save("without", read_adapter)
    assert store.path("with").stat().st_size == size
    assert_same(store.load("with"), adapted)
    assert_same(store.load("without"), read_adapter)
    assert store.load("with").adapted
    assert not store.load("without").adapted
    assert store.ids() == ["with", "without"]
    assert store.nbytes() == sum(store.path(i).stat().st_size for i in store.ids())


def test_nbytes_counts_all_tensors(adapted: Adapter, read_adapter: Adapter) -> None:
    assert adapted.delta is not None
    assert adapted.nbytes == read_adapter.nbytes + adapted.delta.nbytes
    assert read_adapter.nbytes == read_adapter.state.nbytes + 200 * 8 + 200 * 4


def test_saving_again_replaces(
    store: AdapterStore, adapted: Adapter, read_adapter: Adapter
) -> None:
    store.save("a", adapted)
    store.save("a", read_adapter)
    assert_same(store.load("a"), read_adapter)


def test_delete(store: AdapterStore, read_adapter: Adapter) -> None:
    store.save("a", read_adapter)
    assert store.delete("a")
    assert not store.delete("a")
    assert store.ids() == []
    with pytest.raises(KeyError, match="a"):
        store.load("a")


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/b", "../a", "a.b", "a b", "a\n", "ä", "a" * 129, "\0"]
)
def test_ids_that_are_no_plain_names_are_refused(
    store: AdapterStore, read_adapter: Adapter, bad: str
) -> None:
    for call in (store.path, store.load, store.delete, lambda i: store.save(i, read_adapter)):
        with pytest.raises(ValueError, match="adapter id"):
            call(bad)


def test_every_flipped_byte_of_the_data_is_noticed(
    store: AdapterStore, read_adapter: Adapter
) -> None:
    store.save("a", read_adapter)
    path = store.path("a")
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    for offset in range(start, len(blob), max(1, (len(blob) - start) // 20)):
        path.write_bytes(blob[:offset] + bytes([blob[offset] ^ 1]) + blob[offset + 1 :])
        with pytest.raises(CorruptAdapterError, match=r"a\.safetensors fails its checksum"):
            store.load("a")


def test_changed_manifest_is_noticed(store: AdapterStore, adapted: Adapter) -> None:
    store.save("a", adapted)
    path = store.path("a")
    blob = path.read_bytes()
    assert blob.count(b"refine") == 1
    path.write_bytes(blob.replace(b"refine", b"refind"))
    with pytest.raises(CorruptAdapterError, match="fails its checksum"):
        store.load("a")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_torn_file_is_named(store: AdapterStore, read_adapter: Adapter, keep: int) -> None:
    store.save("a", read_adapter)
    path = store.path("a")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptAdapterError, match=r"a\.safetensors is not a whole"):
        store.load("a")


def test_foreign_files_are_named(store: AdapterStore, read_adapter: Adapter) -> None:
    save_file({"x": torch.ones(2)}, store.path("foreign"))
    with pytest.raises(CorruptAdapterError, match=f"is no file of this version's format {FORMAT}"):
        store.load("foreign")
    save_file(read_adapter.to_tensors(), store.path("bare"), metadata={"format": FORMAT})
    with pytest.raises(CorruptAdapterError, match="fails its checksum"):
        store.load("bare")


def test_file_names_its_format(store: AdapterStore, adapted: Adapter) -> None:
    store.save("a", adapted)
    with safe_open(store.path("a"), framework="pt") as file:
        assert file.metadata()["format"] == FORMAT


def test_failed_write_leaves_the_old_file_and_nothing_else(
    store: AdapterStore, adapted: Adapter, read_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save("a", read_adapter)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            store.save("a", adapted)
    assert_same(store.load("a"), read_adapter)
    assert [path.name for path in store.root.iterdir()] == ["a.safetensors"]


def test_kill_between_write_and_rename_leaves_the_old_file(
    store: AdapterStore, read_adapter: Adapter
) -> None:
    store.save("a", read_adapter)
    code = (
        "import dataclasses, os, signal, sys\n"
        "from imprint.adapters.store import AdapterStore\n"
        "store = AdapterStore(sys.argv[1])\n"
        "changed = dataclasses.replace(store.load('a'), manifest={'new': True})\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.save('a', changed)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(store.root)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(store.root.glob("*.partial"))) == 1
    reopened = AdapterStore(store.root)
    assert_same(reopened.load("a"), read_adapter)
    assert [path.name for path in store.root.iterdir()] == ["a.safetensors"]


def test_opening_leaves_another_workers_write_alone(tmp_path: Path) -> None:
    mine = tmp_path / f"a{partial_suffix()}"
    theirs = tmp_path / f"b{partial_suffix(process=os.getppid())}"
    for path in (mine, theirs, tmp_path / "odd.partial"):
        path.write_bytes(b"half")
    AdapterStore(tmp_path)
    assert list(tmp_path.iterdir()) == [theirs]


def test_what_another_machine_writes_is_torn_when_it_is_old(tmp_path: Path) -> None:
    new, old = (tmp_path / f"{id}{partial_suffix('other.example', 12)}" for id in ("new", "old"))
    for path in (new, old):
        path.write_bytes(b"half")
    before = time.time() - STALE_AFTER_S - 1
    os.utime(old, (before, before))
    store = AdapterStore(tmp_path)
    assert list(tmp_path.iterdir()) == [new]
    assert not store.delete("new")  # its writer is told to delete it, too
    assert list(tmp_path.iterdir()) == []
