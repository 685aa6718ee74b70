"""The index of a checkpoint is a pickle: none of the code that one could put into it runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import emptied, example, save
from tiny_world import same
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mixgrpo.checkpoint import CheckpointError, Shards
from mixgrpo.checkpoint.index import read_index

METADATA = "torch.distributed.checkpoint.metadata"


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that every attack would create."""
    return tmp_path / "ran"


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def whole(*operations: bytes) -> bytes:
    return pickle.PROTO + b"\4" + b"".join(operations) + pickle.STOP


def shell(mark: Path) -> bytes:
    return text(f"touch {mark}")


# Each makes the contents of an index that, to a pickle's reader, means to create the mark.
ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "a dotted name of the module": lambda mark: whole(
        called(named(METADATA, "os.system"), shell(mark))
    ),
    "a dotted name of another module": lambda mark: whole(
        called(named("torch.distributed.checkpoint.filesystem", "os.system"), shell(mark))
    ),
    "a dotted name of an allowed class": lambda mark: whole(
        called(named(METADATA, "Metadata.__init__.__globals__.__getitem__"), text("__builtins__"))
    ),
    "a module as an attribute": lambda mark: whole(called(named(METADATA, "os"), shell(mark))),
    "a name with a newline": lambda mark: whole(called(named("os\n", "system"), shell(mark))),
    "system": lambda mark: whole(called(named("os", "system"), shell(mark))),
    "posix": lambda mark: whole(called(named("posix", "system"), shell(mark))),
    "eval": lambda mark: whole(
        called(named("builtins", "eval"), text(f"open({str(mark)!r}, 'w')"))
    ),
    "exec by protocol 0": lambda mark: f"cbuiltins\nexec\n(Vopen({str(mark)!r}, 'w')\ntR.".encode(),
    "an instance by protocol 0": lambda mark: f"(Vtouch {mark}\nios\nsystem\n.".encode(),
    "an instance by OBJ": lambda mark: b"(cos\nsystem\n" + shell(mark) + b"o.",
    "getattr": lambda mark: whole(
        called(
            called(named("builtins", "getattr"), named(METADATA, "os"), text("system")),
            shell(mark),
        )
    ),
    "a torch function": lambda mark: whole(
        called(named("torch", "save"), text("x"), text(str(mark)))
    ),
    "a dotted torch function": lambda mark: whole(called(named("torch", "os.system"), shell(mark))),
    "a dtype that is called": lambda mark: whole(called(named("torch", "float32"), shell(mark))),
    "REDUCE of an allowed class": lambda mark: whole(
        called(named(METADATA, "StorageMeta"), shell(mark))
    ),
    "the layouts' function with another table": lambda mark: whole(
        named("torch.serialization", "_get_layout"),
        pickle.NONE + pickle.EMPTY_DICT + text("cache") + pickle.EMPTY_DICT,
        pickle.SETITEM + pickle.TUPLE2 + pickle.BUILD,
    ),
    "BUILD of a class": lambda mark: whole(
        named(METADATA, "Metadata"),
        pickle.NONE + pickle.EMPTY_DICT + text("version") + text("mine"),
        pickle.SETITEM + pickle.TUPLE2 + pickle.BUILD,
    ),
    "BUILD that replaces __setstate__": lambda mark: whole(
        named(METADATA, "TensorProperties") + pickle.EMPTY_TUPLE + pickle.NEWOBJ,
        pickle.EMPTY_DICT + text("__setstate__") + named("os", "system") + pickle.SETITEM,
        pickle.BUILD + shell(mark) + pickle.BUILD,
    ),
    "BUILD of a dtype": lambda mark: whole(
        named("torch", "float32"),
        pickle.NONE + pickle.EMPTY_DICT + text("itemsize") + text("x"),
        pickle.SETITEM + pickle.TUPLE2 + pickle.BUILD,
    ),
    "NEWOBJ of text": lambda mark: whole(text("x") + pickle.EMPTY_TUPLE + pickle.NEWOBJ),
    "an extension": lambda mark: whole(pickle.EXT1 + b"\1"),
    "a persistent id": lambda mark: whole(text("x") + pickle.BINPERSID),
    "an out-of-band buffer": lambda mark: whole(pickle.NEXT_BUFFER),
    "a memo of many gigabytes": lambda mark: whole(
        pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff"
    ),
    "bytes of many gigabytes": lambda mark: whole(
        pickle.BINBYTES8 + struct.pack("<Q", 2**45) + b"x"
    ),
    "text of many gigabytes": lambda mark: whole(pickle.BINUNICODE + b"\xff\xff\xff\xff" + b"x"),
    "a number of many digits": lambda mark: whole(pickle.LONG4 + struct.pack("<i", 2**31 - 1)),
    "a frame of many gigabytes": lambda mark: whole(pickle.FRAME + struct.pack("<Q", 2**62)),
    "lists in lists": lambda mark: whole(pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999),
    "no end": lambda mark: pickle.PROTO + b"\4" + pickle.NONE,
    "nothing": lambda mark: b"",
    "zeros": lambda mark: b"\0" * 1000,
    "a stack that is empty": lambda mark: whole(pickle.REDUCE),
    "None": lambda mark: whole(pickle.NONE),
    "a dict": lambda mark: pickle.dumps({"model": 1}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_an_index_does_not_run(tmp_path, mark, attack):
    path = save(tmp_path, 1)
    version, cache = Metadata.version, dict(torch.serialization._get_layout.cache)
    (path / ".metadata").write_bytes(ATTACKS[attack](mark))
    for read in (
        lambda: Shards(path).shapes("model"),
        lambda: Shards(path).read(emptied(example(1))),
    ):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert not mark.exists()
    assert (Metadata.version, torch.serialization._get_layout.cache) == (version, cache)


@pytest.mark.parametrize("attack", ["a dotted name of the module", "eval", "exec by protocol 0"])
def test_the_attacks_are_attacks(mark, attack):
    """An ordinary reader falls for them."""
    pickle.loads(ATTACKS[attack](mark))
    assert mark.exists()


# ---- descriptions that lead elsewhere, or to more than there is


def index(path: Path, change: Callable[[Metadata], Any]) -> None:
    """Rewrites a checkpoint's index."""
    found = pickle.loads((path / ".metadata").read_bytes())
    change(found)
    (path / ".metadata").write_bytes(pickle.dumps(found, protocol=4))


def first_place(found: Metadata) -> _StorageInfo:
    return next(iter(found.storage_data.values()))


def relocated(name: Any) -> Callable[[Metadata], None]:
    return lambda found: setattr(first_place(found), "relative_path", name)


def described(found: Metadata) -> TensorStorageMetadata:
    entry = found.state_dict_metadata["model.a.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def many_chunks(found: Metadata) -> None:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))
    described(found).chunks = [chunk] * 100


def enormous(found: Metadata) -> None:
    found.state_dict_metadata["model.a.weight"] = TensorStorageMetadata(
        TensorProperties(torch.float32), torch.Size([2**40]), []
    )


class Size(tuple):
    """Pickled as another class."""


CHANGES = {
    "a file above": relocated("../secret.distcp"),
    "an absolute path": relocated("/etc/passwd"),
    "a file in a folder": relocated("a/b"),
    "no name": relocated(""),
    "the folder": relocated("."),
    "a zero in a name": relocated("model\0.distcp"),
    "a name that is bytes": relocated(b"model"),
    "a place below zero": lambda found: setattr(first_place(found), "offset", -1),
    "a place that is true": lambda found: setattr(first_place(found), "offset", True),
    "a length that is text": lambda found: setattr(first_place(found), "length", "5"),
    "an endless length": lambda found: setattr(first_place(found), "length", 2**70),
    "no places": lambda found: setattr(found, "storage_data", None),
    "places by text": lambda found: setattr(found, "storage_data", {"a": first_place(found)}),
    "a size below zero": lambda found: setattr(described(found), "size", Size([-3])),
    "a size of text": lambda found: setattr(described(found), "size", "30000"),
    "another dtype": lambda found: setattr(described(found).properties, "dtype", "float32"),
    "chunks as a tuple": lambda found: setattr(described(found), "chunks", ()),
    "more chunks than places": many_chunks,
    "more than there is": enormous,
    "names that are numbers": lambda found: found.state_dict_metadata.update({3: described(found)}),
    "keys without a name": lambda found: object.__setattr__(
        next(iter(found.storage_data)), "fqn", None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_describes_what_no_run_writes_is_an_error(tmp_path, change):
    path = save(tmp_path, 1)
    index(path, CHANGES[change])
    with pytest.raises(CheckpointError) as caught:
        Shards(path).whole("model")
    assert "\n" not in str(caught.value)


def test_an_index_written_anew_is_read(tmp_path):
    """Or else the test before this one proves nothing; with what older torch left out."""
    path = save(tmp_path, 1)
    index(path, lambda found: setattr(found, "storage_meta", None))
    assert same(Shards(path).whole("model"), example(1)["model"])


def test_what_is_read_is_what_torch_wrote(tmp_path):
    path = save(tmp_path, 1)
    theirs, ours = pickle.loads((path / ".metadata").read_bytes()), read_index(path)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert [key.index for key in ours.storage_data] == [key.index for key in theirs.storage_data]
    assert MetadataIndex("model.a.weight", [0]) in ours.storage_data


def test_an_index_larger_than_the_tensors_is_not_read(tmp_path):
    path = save(tmp_path, 1)
    os.truncate(path / ".metadata", 2**40)
    with pytest.raises(CheckpointError, match="is larger than"):
        Shards(path).shapes("model")


def test_a_tensor_that_names_code_does_not_run_it(tmp_path, mark):
    """Tensors are pickles in an archive, which torch reads with weights_only."""

    class Code:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {mark}",))

    path = save(tmp_path, 1)
    content = io.BytesIO()
    torch.save(Code(), content)
    place = read_index(path).storage_data[MetadataIndex("model.b.weight", [0, 0])]
    file = path / place.relative_path
    file.write_bytes(file.read_bytes() + content.getvalue())

    def moved(found: Metadata) -> None:
        info = found.storage_data[MetadataIndex("model.b.weight", [0, 0])]
        info.length = content.getbuffer().nbytes
        info.offset = file.stat().st_size - info.length

    index(path, moved)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Shards(path).whole("model")
    assert not mark.exists()


def test_keys_that_take_for_ever_to_hash_are_refused(tmp_path):
    """A tuple that holds another one twice, on 60 levels: its hash takes 2^60 steps."""
    levels = [pickle.MEMOIZE + pickle.BINGET + bytes([i]) + pickle.TUPLE2 for i in range(60)]
    key = pickle.EMPTY_TUPLE + b"".join(levels)
    text = b"\x80\x04" + pickle.EMPTY_DICT + key + pickle.NONE + pickle.SETITEM + pickle.STOP
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(ValueError, match="a key that is neither"):
        read_index(tmp_path)
