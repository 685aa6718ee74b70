"""What a weight file or folder is, in words, recognised by its first bytes or its names."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mixgrpo.files.regular import open_regular

SAFETENSORS = "safetensors"
TORCH = "a PyTorch file"
TORCH_OLD = "a PyTorch file in the format used before PyTorch 1.6"
_HEAD = 512  # bytes of a file by which it is recognised
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_AGAIN = "download it again"
_PLAIN = "give the model's .safetensors file instead"
_UNPACK = "unpack it and give the weight file in it"


@dataclass(frozen=True)
class Form:
    """What something is.

    Attributes:
        words: completes "PATH is ...".
        remedy: what to do about it; empty if it can be read.
    """

    words: str
    remedy: str = ""


_ARCHIVE = "a compressed archive"
# The beginnings of files: where, the bytes, and what they mean.
_MAGIC = (
    (0, b"version https://git-lfs", Form("a git-LFS pointer, not the file itself", "run `git lfs "
     "pull` in its folder")),
    (0, b"/annex/objects/", Form("a git-annex pointer, not the file itself", "run `git annex get` "
     "in its folder")),
    (0, b"GGUF", Form("a GGUF file, whose weights are usually quantised", _PLAIN)),
    (0, b"lmgg", Form("a GGML file", _PLAIN)),
    (0, b"tjgg", Form("a GGML file", _PLAIN)),
    (0, b"\x89HDF\r\n\x1a\n", Form("an HDF5 file", _PLAIN)),
    (0, b"\x93NUMPY", Form("a NumPy array", _PLAIN)),
    (4, b"TFL3", Form("a TensorFlow Lite file", _PLAIN)),
    (0, b"ftrt", Form("a TensorRT engine", _PLAIN)),
    (0, b"ptrt", Form("a TensorRT engine", _PLAIN)),
    (0, b"\x1f\x8b", Form(_ARCHIVE, _UNPACK)),
    (0, b"BZh", Form(_ARCHIVE, _UNPACK)),
    (0, b"\xfd7zXZ", Form(_ARCHIVE, _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Form(_ARCHIVE, _UNPACK)),
    (0, b"7z\xbc\xaf", Form(_ARCHIVE, _UNPACK)),
    (0, b"Rar!", Form(_ARCHIVE, _UNPACK)),
    (257, b"ustar", Form("a tar archive", _UNPACK)),
    (0, b"\x89PNG", Form("an image", _PLAIN)),
    (0, b"\xff\xd8\xff", Form("an image", _PLAIN)),
    (0, b"%PDF", Form("a PDF document", _PLAIN)),
    (0, b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", Form(TORCH_OLD)),
)  # fmt: skip
# Formats without a signature at their beginning.
_SUFFIXES = {
    ".onnx": "an ONNX file",
    ".engine": "a TensorRT engine",
    ".plan": "a TensorRT engine",
    ".trt": "a TensorRT engine",
    ".msgpack": "a Flax file",
    ".tflite": "a TensorFlow Lite file",
}


def readable_form(path: Path) -> str:
    """SAFETENSORS, TORCH or TORCH_OLD.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: it is something else, empty or truncated; the message names it and the remedy.
    """
    _check_link(path)
    with open_regular(path) as file:
        form = _form(path, file, os.fstat(file.fileno()).st_size)
    if form.remedy:
        raise ValueError(f"{path} is {form.words}; {form.remedy}")
    return form.words


def _check_link(path: Path) -> None:
    if path.exists() or not path.is_symlink():
        return
    target = os.readlink(path)
    annex = "annex/objects" in target
    remedy = f"run `git annex get {path.name}` in its folder" if annex else _AGAIN
    raise FileNotFoundError(f"{path} is a link to {target}, which does not exist; {remedy}")


def _form(path: Path, file: BinaryIO, size: int) -> Form:
    head = file.read(_HEAD)
    for place, magic, form in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return form
    if head.startswith(b"PK"):
        return _form_of_zip(file, head)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return _form_of_safetensors(file, size)
    return _form_without_signature(path, head, size)


def _form_without_signature(path: Path, head: bytes, size: int) -> Form:
    if not size:
        return Form("empty", _AGAIN)
    if path.suffix in _SUFFIXES:
        return Form(_SUFFIXES[path.suffix], _PLAIN)
    if re.match(rb"\x80[\x02-\x05]", head):
        return Form("a pickle that torch.save did not write", "save its weights with safetensors")
    return _form_of_text(head) or _form_of_binary(path, head, size)


def _form_of_zip(file: BinaryIO, head: bytes) -> Form:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        kind = TORCH if b"/data.pkl" in head else "a zip archive"
        return Form(f"{kind} that is truncated: the directory at its end is missing", _AGAIN)
    if any(name.endswith("/constants.pkl") for name in names):
        return Form("a TorchScript program", "save its state_dict() with safetensors")
    if any(name.endswith("data.pkl") for name in names):
        return Form(TORCH)
    return Form("a zip archive", _UNPACK)


def _form_of_safetensors(file: BinaryIO, size: int) -> Form:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        header: dict[str, Any] = json.loads(file.read(length)) if size >= 8 + length else {}
        ends = [value["data_offsets"][1] for key, value in header.items() if key[:2] != "__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Form("a safetensors file with a damaged header", _AGAIN)
    if size < wanted:
        return Form(f"truncated: it has {size} bytes instead of {wanted}", _AGAIN)
    if size > wanted:
        return Form(f"damaged: it has {size} bytes instead of {wanted}", _AGAIN)
    return Form(SAFETENSORS)


def _form_of_text(head: bytes) -> Form | None:
    # A character may be cut at the end of the head.
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \r\n\t")
    if len(text.encode()) < 0.9 * len(head.strip()) or "\0" in text:
        return None
    # What it says is not shown, because the file may be another than intended, with a secret in it.
    if text[:1] == "<":
        return Form(
            "a web page, saved in place of the weights",
            f"{_AGAIN}, with a login if the site requires one",
        )
    if text[:1] == "{" or text[:1] == "[":
        return Form("JSON text, not weights", "give a weight file or download it")
    return Form("text, not weights", "give a weight file or download it again")


def _form_of_binary(path: Path, head: bytes, size: int) -> Form:
    if not head.strip(b"\0"):
        return Form("filled with zeros, as an interrupted download leaves it", _AGAIN)
    if path.suffix == ".safetensors":
        if size <= 8:
            return Form(f"truncated: it has {size} bytes", _AGAIN)
        return Form("not in the safetensors format", _AGAIN)
    return Form("in no known format of weights", _PLAIN)


def form_of_folder(folder: Path) -> Form | None:
    """What a folder is that holds weights of another program; None if that is not known."""
    names = {entry.name for entry in folder.iterdir()}
    if ".metadata" in names and _any(names, r".*\.distcp"):
        return Form(
            "a torch.distributed.checkpoint folder",
            "convert it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder} weights.pt` and give weights.pt",
        )
    if _any(names, r".*(zero_pp_rank_|mp_rank_).*\.pt|global_step\d+"):
        return Form(
            "a DeepSpeed checkpoint",
            "convert it with the zero_to_fp32.py that DeepSpeed wrote beside the file `latest` "
            "(python zero_to_fp32.py . OUTPUT) and give OUTPUT",
        )
    if _any(names, r"pytorch_model_fsdp_\d+"):
        return Form(
            "a checkpoint of accelerate with FSDP",
            f"convert it with `accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUTPUT` and "
            "give OUTPUT",
        )
    if _any(names, r".*\.distcp"):
        return Form("a checkpoint without its .metadata or state.json", "give a complete one")
    for suffix, words in {".gguf": "a GGUF file", **_SUFFIXES}.items():
        if _any(names, rf".*\{suffix}"):
            return Form(f"a folder with {words}", _PLAIN)
    return None


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


_UNQUANTISED = "give the weights before quantisation"
# Patterns of names of tensors, the most specific first.
_NAMED = (
    (r"\.(wscales|wtscale|wcscales|smooth_factor|smooth_orig)$", Form(
        "weights quantised by nunchaku", _UNQUANTISED)),
    (r"\.(absmax|quant_map|SCB)$|quant_state\.bitsandbytes", Form(
        "weights quantised by bitsandbytes", _UNQUANTISED)),
    (r"\.(qweight|qzeros|g_idx)$", Form("weights quantised by GPTQ or AWQ", _UNQUANTISED)),
    (r"\.(_data|_scale|qdata|tensor_impl)$|_weight_(qdata|scale)$", Form(
        "weights quantised by torchao or quanto", _UNQUANTISED)),
    (r"(^|\.)(scaled_fp8|scale_weight|weight_scale|weight_scale_inv|comfy_quant)$", Form(
        "weights in fp8 with separate scales", _UNQUANTISED)),
    (r"lora_|\.lora\.|\.lokr_|\.hada_|dora_scale", Form(
        "a LoRA, not full weights", "give full weights")),
    (r"^(vae|first_stage_model|text_encoders|conditioner|cond_stage_model)\.", Form(
        "the weights of a whole pipeline in one file", "give those of the one model")),
    (r"double_blocks\.\d+\.(img|txt)_(attn|mlp)", Form(
        "FLUX weights under the names of Black Forest Labs",
        "convert them with diffusers, FluxTransformer2DModel.from_single_file(FILE)"
        ".save_pretrained(FOLDER), and give FOLDER")),
    (r"exp_avg", Form("the state of an optimizer", "give the model's weights")),
)  # fmt: skip
_OF_OTHERS = (
    (r"^(input|output|down|up)_blocks\.\d+.*(attentions|transformer_blocks)\.", "a UNet"),
    (r"^blip\.", "ImageReward"),
    (r"^visual\.", "an open_clip model"),
    (r"^vision_model\.", "a CLIP model"),
    (r"^encoder\.block\.\d+\.layer\.0\.SelfAttention", "a T5 text encoder"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn", "a CLIP text encoder"),
    (r"^decoder\.(conv_in|mid|up)", "a VAE"),
    (r"^single_transformer_blocks\.", "a FLUX transformer"),
    (r"^pos_embed\.proj\.", "a Stable Diffusion 3 transformer"),
    (r"^transformer_blocks\.\d+\.img_mod\.", "a Qwen-Image transformer"),
    (r"^(transformer_)?blocks\.\d+\.", "another transformer"),
)
QUANTISED = frozenset(form.words for _, form in _NAMED if form.remedy == _UNQUANTISED)


def form_of_names(names: Iterable[str]) -> Form | None:
    """What the tensors of a file are, by their names; None if they are not known.

    The remedy is empty for the weights of another model.
    """
    every = "\n".join(names)
    for pattern, form in _NAMED:
        if re.search(pattern, every, re.MULTILINE):
            return form
    for pattern, words in _OF_OTHERS:
        if re.search(pattern, every, re.MULTILINE):
            return Form(f"the weights of {words}")
    return None
