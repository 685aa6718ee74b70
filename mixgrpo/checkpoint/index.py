"""Reads a checkpoint's index ``.metadata``, a pickle, without running any code that it names.

The pickle is read by an interpreter that knows only the operations that torch writes, and every
class that it names becomes a passive stand-in. The index is then built anew from what these hold.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mixgrpo.files.pointer import is_plain_name
from mixgrpo.files.regular import MIB, read_regular

INDEX = ".metadata"
_DIMENSIONS = 64  # at most, in torch
_OPERATIONS = (
    pickle.PROTO,
    pickle.FRAME,
    pickle.STOP,
    pickle.MARK,
    pickle.MEMOIZE,
    pickle.BINGET,
    pickle.LONG_BINGET,
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
    pickle.LONG1,
    pickle.SHORT_BINUNICODE,
    pickle.BINUNICODE,
    pickle.EMPTY_TUPLE,
    pickle.TUPLE,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
    pickle.EMPTY_LIST,
    pickle.APPEND,
    pickle.APPENDS,
    pickle.EMPTY_DICT,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.STACK_GLOBAL,
    pickle.NEWOBJ,
    pickle.REDUCE,
    pickle.BUILD,
)


class _StandIn:
    """What an object was made from, instead of the object."""

    given: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"{type(self).__name__} lacks {name}")
        return self.state[name]


_DESCRIBES = "torch.distributed.checkpoint.metadata"
_STAND_INS = {
    (module, name): type(name, (_StandIn,), {})
    for module, name in (
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        (_DESCRIBES, "BytesStorageMetadata"),
        (_DESCRIBES, "ChunkStorageMetadata"),
        (_DESCRIBES, "Metadata"),
        (_DESCRIBES, "MetadataIndex"),
        (_DESCRIBES, "StorageMeta"),
        (_DESCRIBES, "TensorProperties"),
        (_DESCRIBES, "TensorStorageMetadata"),
        (_DESCRIBES, "_MEM_FORMAT_ENCODING"),
    )
}
_KIND_OF = {name: kind for (_, name), kind in _STAND_INS.items()}


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPERATIONS
    }

    def load_setitem(self) -> None:
        self._check_keys([self.stack[-2]])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])  # type: ignore[attr-defined]
        super().load_setitems()  # type: ignore[misc]

    dispatch[pickle.SETITEMS[0]] = load_setitems

    @staticmethod
    def _check_keys(keys: list[Any]) -> None:
        """The time to hash nested tuples doubles with each level that holds the last one twice."""
        if not all(isinstance(key, (str, _StandIn)) for key in keys):
            raise ValueError("a dictionary has a key that is neither text nor an index")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise ValueError(f"{f'{module}.{name}'[:100]!r} is not allowed in it")


def read_index(folder: Path) -> Metadata:
    """The index of the checkpoint in this folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, is larger than the tensors that it describes, or
            holds anything but descriptions of tensors in files of the folder.
    """
    content = read_regular(folder / INDEX, MIB + bytes_of(folder, ""))
    try:
        return _rebuilt(_Unpickler(io.BytesIO(content)).load())
    except ValueError:
        raise
    except Exception as error:  # what a damaged pickle can raise is not documented
        raise ValueError(f"{INDEX} is not an index ({type(error).__name__})") from error


def bytes_of(folder: Path, part: str) -> int:
    """Size of the files that hold a part of the state, or all parts."""
    return sum(file.stat().st_size for file in folder.glob(f"{part}*.distcp"))


def _rebuilt(found: Any) -> Metadata:
    root = _of(found, "Metadata")
    described = _dict(root.field("state_dict_metadata"))
    places = _dict(root.field("storage_data"))
    # Every chunk has a place. Otherwise a small file could describe any number of chunks.
    if sum(_number_of_chunks(entry) for entry in described.values()) > len(places):
        raise ValueError(f"{INDEX} describes more chunks than it has places for")
    return Metadata(
        state_dict_metadata={_text(name): _entry(entry) for name, entry in described.items()},
        planner_data={},
        storage_data={_key(key): _place(info) for key, info in places.items()},
    )


def _number_of_chunks(entry: Any) -> int:
    return len(_list(entry.field("chunks"))) if _is(entry, "TensorStorageMetadata") else 0


def _entry(entry: Any) -> BytesStorageMetadata | TensorStorageMetadata:
    if _is(entry, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    tensor = _of(entry, "TensorStorageMetadata")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_dtype(tensor.field("properties"))),
        size=_size(tensor.field("size")),
        chunks=list(map(_chunk, _list(tensor.field("chunks")))),
    )


def _dtype(properties: Any) -> torch.dtype:
    state = _of(properties, "TensorProperties").state
    if isinstance(state, tuple) and state and isinstance(state[0], torch.dtype):
        return state[0]
    raise ValueError("a tensor's dtype is missing")


def _chunk(chunk: Any) -> ChunkStorageMetadata:
    found = _of(chunk, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(found.field("offsets")), _size(found.field("sizes")))


def _key(key: Any) -> MetadataIndex:
    found = _of(key, "MetadataIndex")
    # torch leaves out what is None.
    offset, index = (_dict(found.state).get(name) for name in ("offset", "index"))
    return MetadataIndex(
        _text(found.field("fqn")),
        None if offset is None else _size(offset),
        None if index is None else _count(index),
    )


def _place(info: Any) -> _StorageInfo:
    found = _of(info, "_StorageInfo")
    name = found.field("relative_path")
    if not is_plain_name(name):
        raise ValueError(f"{INDEX} names a file outside its folder")
    return _StorageInfo(name, _count(found.field("offset")), _count(found.field("length")))


def _size(size: Any) -> torch.Size:
    given = _of(size, "Size").given
    lengths = given[0] if len(given) == 1 else None
    if not isinstance(lengths, tuple) or len(lengths) > _DIMENSIONS:
        raise ValueError("a size is not valid")
    return torch.Size(map(_count, lengths))


def _is(found: Any, kind: str) -> bool:
    return type(found) is _KIND_OF[kind]


def _of(found: Any, kind: str) -> _StandIn:
    if not _is(found, kind):
        raise ValueError(f"{INDEX} holds a {type(found).__name__} instead of {kind}")
    stand_in: _StandIn = found
    return stand_in


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError(f"{INDEX} holds an impossible number")
    return number


def _text(text: Any) -> str:
    return str(_typed(text, str))


def _list(found: Any) -> list[Any]:
    return list(_typed(found, list))


def _dict(found: Any) -> dict[Any, Any]:
    return dict(_typed(found, dict))


def _typed(found: Any, kind: type) -> Any:
    if type(found) is not kind:
        raise ValueError(f"{INDEX} holds a {type(found).__name__} instead of a {kind.__name__}")
    return found
