"""Weights in every form that is in use: each loads, or one sentence says what it is and what to do.

All files are built here, byte by byte where a library would be needed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from mixgrpo.files.weight_files import check_fits, plain_names, read_shapes
from mixgrpo.files.weight_sets import NAME, find_shards
from mixgrpo.inference.config import InferenceConfig, SampledModelConfig
from mixgrpo.inference.tuned import load_tuned
from mixgrpo.models.flux import FLUX
from mixgrpo.models.stored import empty_transformer

State = dict[str, Tensor]
STEM = NAME.removesuffix(".safetensors")


@pytest.fixture(scope="module")
def base(world) -> State:
    return load_file(world.model / "transformer" / NAME)


@pytest.fixture(scope="module")
def state(base) -> State:
    """Other weights for the same model."""
    return {name: weight + 1 for name, weight in base.items()}


@pytest.fixture
def load(world) -> Callable[..., State]:
    """The weights of the model after ``sample --checkpoint PATH`` has loaded them."""

    def run(path: Path | str, **knobs: Any) -> State:
        module = empty_transformer(FLUX, str(world.model), torch.float32).to_empty(device="cpu")
        config = InferenceConfig(
            model=SampledModelConfig(path=str(world.model)), checkpoint=str(path), **knobs
        )
        load_tuned(module, config).apply()
        return module.state_dict()

    return run


@pytest.fixture
def refused(load) -> Callable[[Path], str]:
    def run(path: Path) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            load(path)
        message = str(caught.value)
        assert "\n" not in message
        assert path.name in message
        assert len(message) < 600, message
        return message

    return run


# ---- forms that load


def in_shards(state: State, folder: Path, name: str, count: int = 3) -> list[Path]:
    names, files = sorted(state), []
    for number in range(count):
        file = folder / name.format(number + 1, count)
        save_file({key: state[key] for key in names[number::count]}, file)
        files.append(file)
    return files


def renamed(state: State, prefix: str) -> State:
    return {prefix + name: weight for name, weight in state.items()}


def wrapped_inside(state: State, word: str) -> State:
    """As if every block had been wrapped on its own."""
    return {
        name.replace("transformer_blocks.0.", f"transformer_blocks.0.{word}."): weight
        for name, weight in state.items()
    }


def as_torch(name: str, wrap: Callable[[State], Any], **how: Any) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        torch.save(wrap(state), folder / name, **how)
        return folder / name

    return write


def as_safetensors(name: str, wrap: Callable[[State], State]) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        save_file(wrap(state), folder / name)
        return folder

    return write


def numbered(name: str, give: Callable[[list[Path]], Path]) -> Callable[[State, Path], Path]:
    return lambda state, folder: give(in_shards(state, folder, name))


def torch_shards(state: State, folder: Path) -> Path:
    names = sorted(state)
    places = {}
    for number in (1, 2):
        file = folder / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({key: state[key] for key in names[number - 1 :: 2]}, file)
        places |= dict.fromkeys(names[number - 1 :: 2], file.name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def beside_what_accelerate_writes(state: State, folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        torch.save({}, folder / name)
    return folder


def in_half_precision(state: State) -> State:
    return {name: weight.bfloat16() for name, weight in state.items()}


LOADS = {
    "bin": as_torch("a.bin", dict),
    "pt": as_torch("a.pt", OrderedDict),
    "pth_state_dict": as_torch("a.pth", lambda s: {"state_dict": s, "epoch": 3, "lr": 0.1}),
    "ckpt_lightning": as_torch(
        "a.ckpt", lambda s: {"state_dict": renamed(s, "model."), "global_step": 1, "loops": {}}
    ),
    "module": as_torch("a.pt", lambda s: {"module": s, "optimizer": None}),
    "model": as_torch("a.pt", lambda s: {"model": s, "optimizer": {"state": {}, "groups": []}}),
    "model_of_dcp": as_torch("a.pt", lambda s: {"model": {"module": s}}),
    "ema": as_torch("a.pt", lambda s: {"ema": s, "step": torch.tensor(3)}),
    "before_pytorch_1.6": as_torch("a.bin", dict, _use_new_zipfile_serialization=False),
    "torch_named_safetensors": as_torch("a.safetensors", dict),
    "ddp": as_torch("a.pt", lambda s: renamed(s, "module.")),
    "compiled": as_safetensors(NAME, lambda s: renamed(s, "_orig_mod.")),
    "compiled_ddp": as_safetensors(NAME, lambda s: renamed(s, "module._orig_mod.")),
    "fsdp": as_torch("a.pt", lambda s: renamed(s, "_fsdp_wrapped_module.")),
    "fsdp_blocks": as_safetensors(NAME, lambda s: wrapped_inside(s, "_fsdp_wrapped_module")),
    "compiled_blocks": as_safetensors(NAME, lambda s: wrapped_inside(s, "_orig_mod")),
    "checkpointed": as_safetensors(NAME, lambda s: wrapped_inside(s, "_checkpoint_wrapped_module")),
    "of_comfyui": as_safetensors("a.safetensors", lambda s: renamed(s, "model.diffusion_model.")),
    "of_a_pipeline": as_safetensors("a.safetensors", lambda s: renamed(s, "transformer.")),
    "any_name": as_safetensors("flux1-dev.v2.safetensors", dict),
    "bf16": as_safetensors(f"{STEM}.bf16.safetensors", dict),
    "fp16": as_safetensors(f"{STEM}.fp16.safetensors", dict),
    "shards": numbered(STEM + "-{:05}-of-{:05}.safetensors", lambda files: files[0].parent),
    "one_of_the_shards": numbered("model-{:05}-of-{:05}.safetensors", lambda files: files[1]),
    "shards_of_a_variant": numbered(STEM + ".fp16-{:05}-of-{:05}.safetensors",
                                    lambda files: files[0].parent),
    "shards_of_a_variant_as_once": numbered(STEM + "-{:05}-of-{:05}.fp16.safetensors",
                                            lambda files: files[0].parent),
    "shards_of_torch": torch_shards,
    "accelerate": beside_what_accelerate_writes,
}  # fmt: skip


@pytest.mark.parametrize("form", LOADS)
def test_a_form_that_loads(form, state, load, tmp_path):
    found = load(LOADS[form](state, tmp_path))
    assert all(torch.equal(found[name], weight) for name, weight in state.items())


def test_other_floating_point_dtypes_load(state, load, tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        save_file({name: weight.to(dtype) for name, weight in state.items()}, tmp_path / NAME)
        found = load(tmp_path)
        assert all(torch.equal(found[n], weight.to(dtype).float()) for n, weight in state.items())


@pytest.mark.parametrize("stem", ["random_model", "scheduler", "sampler", "optimizer_free"])
def test_a_numbered_file_is_found_by_any_name(stem, state, load, tmp_path):
    load(in_shards(state, tmp_path, stem + "-{:05}-of-{:05}.safetensors")[1])


def test_plain_names_only_removes_what_all_names_have() -> None:
    names = {"transformer.a": 1, "visual.b": 2}
    assert plain_names(names) == names
    collide = {"a._orig_mod.w": 1, "a.w": 2}
    assert plain_names(collide) == collide


# ---- forms that are named


def written(name: str, content: bytes) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def head_and_values(header: Any, values: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def of_size(*names: str, dtype: torch.dtype = torch.float32, plus: bool = False) -> Any:
    """A safetensors file of small tensors, with all others that the model needs if ``plus``."""

    def write(state: State, folder: Path) -> Path:
        tensors = {name: torch.zeros(2, 2).to(dtype) for name in names}
        save_file({**(state if plus else {}), **tensors}, folder / "a.safetensors")
        return folder / "a.safetensors"

    return write


def cut(by: int) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        content = save(state)
        (folder / "a.safetensors").write_bytes(content[:by] if by < 0 else content + b"x" * by)
        return folder / "a.safetensors"

    return write


def cut_torch(state: State, folder: Path) -> Path:
    torch.save(state, folder / "a.pt")
    (folder / "a.pt").write_bytes((folder / "a.pt").read_bytes()[:-1000])
    return folder / "a.pt"


def cut_inside_old_torch(state: State, folder: Path) -> Path:
    torch.save(state, folder / "a.pt", _use_new_zipfile_serialization=False)
    (folder / "a.pt").write_bytes((folder / "a.pt").read_bytes()[:2000])
    return folder / "a.pt"


def in_zip(state: State, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a.safetensors", b"")
    return folder / "a.zip"


def in_tar(state: State, folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.safetensors"))
    return folder / "a.tar"


def program(state: State, folder: Path) -> Path:
    torch.jit.script(nn.Linear(2, 2)).save(str(folder / "a.pt"))
    return folder / "a.pt"


def link(target: str) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        (folder / "a.safetensors").symlink_to(target)
        return folder / "a.safetensors"

    return write


def fifo(state: State, folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


def fifo_in_a_folder(state: State, folder: Path) -> Path:
    os.mkfifo(folder / NAME)
    return folder


def folder_of(*names: str) -> Callable[[State, Path], Path]:
    def write(state: State, folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch() if not name.endswith("/") else (folder / name).mkdir()
        return folder

    return write


def one_shard_lost(state: State, folder: Path) -> Path:
    in_shards(state, folder, "model-{:05}-of-{:05}.safetensors")[1].unlink()
    return folder


def one_file_lost(state: State, folder: Path) -> Path:
    torch_shards(state, folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    return folder


def shards_of_two_sets(state: State, folder: Path) -> Path:
    for number, count in ((1, 2), (2, 2), (3, 3)):
        save_file(
            {str(number): torch.ones(1)}, folder / f"model-0000{number}-of-0000{count}.safetensors"
        )
    return folder


def holding_itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


def two_sets(state: State, folder: Path) -> Path:
    for name in ("flux1-dev.safetensors", "ae.safetensors"):
        save_file(state, folder / name)
    return folder


def two_variants(state: State, folder: Path) -> Path:
    for name in ("fp16", "bf16"):
        save_file(state, folder / f"{STEM}.{name}.safetensors")
    return folder


def whole_and_shards(state: State, folder: Path) -> Path:
    in_shards(state, folder, STEM + "-{:05}-of-{:05}.safetensors")
    save_file(state, folder / NAME)
    return folder


def twice_in_shards(state: State, folder: Path) -> Path:
    first, second, _ = in_shards(state, folder, "model-{:05}-of-{:05}.safetensors")
    save_file({**load_file(first), **load_file(second)}, first)
    return folder


def integers(state: State, folder: Path) -> Path:
    save_file({name: weight.to(torch.int8) for name, weight in state.items()}, folder / NAME)
    return folder


def broken_index(content: str) -> Callable[[State, Path], Path]:
    return written(f"{NAME}.index.json", content.encode())


AGAIN, TRUNCATED = "download it again", "is truncated"
Q = "transformer_blocks.0.attn.to_q"
NAMED: dict[str, tuple[Callable[[State, Path], Path], list[str]]] = {
    "empty": (written("a.safetensors", b""), ["is empty", AGAIN]),
    "empty_torch": (written("a.pt", b""), ["is empty", AGAIN]),
    "one_byte": (written("a.safetensors", b"\x80"), [TRUNCATED, AGAIN]),
    "zeros": (written("a.safetensors", bytes(4096)), ["filled with zeros", AGAIN]),
    "random": (written("a.safetensors", bytes(range(1, 256)) * 9), ["not in the safetensors"]),
    "random_bin": (written("a.weights", bytes(range(1, 256)) * 9), ["in no known format"]),
    "cut": (cut(-1000), [TRUNCATED, "bytes instead of", AGAIN]),
    "cut_in_the_header": (written("a.safetensors", save({"a": torch.ones(2)})[:30]),
                          [TRUNCATED, AGAIN]),
    "longer": (cut(7), ["is damaged: it has", "bytes instead of", AGAIN]),
    "cut_torch": (cut_torch, ["truncated", AGAIN]),
    "cut_old_torch": (cut_inside_old_torch, ["cannot be read as a PyTorch file", AGAIN]),
    "header_not_json": (written("a.safetensors", head_and_values(b"{not json at all")),
                        ["damaged header", AGAIN]),
    "header_without_offsets": (written("a.safetensors", head_and_values({"a": {"dtype": "F32"}})),
                               ["damaged header", AGAIN]),
    "unknown_dtype": (
        written("a.safetensors", head_and_values({"a": {"dtype": "Q4", "shape": [2],
                                                        "data_offsets": [0, 1]}}, b"x")),
        ["header is damaged", AGAIN]),
    "offsets_that_overlap": (
        written("a.safetensors", head_and_values(
            {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"1234")),
        ["header is damaged", AGAIN]),
    "no_tensors": (written("a.safetensors", head_and_values({})), ["is empty"]),
    "html": (written("a.safetensors", b"<!DOCTYPE html>\n<html><head><title>Login</title>"),
             ["a web page", "login", AGAIN]),
    "html_torch": (written("a.pt", b"\n  <html lang=en>" + b"x" * 900), ["a web page"]),
    "xml": (written("a.safetensors", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>"),
            ["a web page"]),
    "json_error": (written("a.safetensors", b'{"error":"Repository not found"}'),
                   ["JSON text"]),
    "config_json": (written("config.json", b'{\n "in_channels": 64}'), ["JSON text"]),
    "text": (written("a.safetensors", b"Access to model is restricted.\n"), ["is text, not"]),
    "lfs": (written("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d"),
            ["a git-LFS pointer", "git lfs pull"]),
    "annex_pointer": (written("a.safetensors", b"/annex/objects/MD5E-s12--ab.safetensors\n"),
                      ["a git-annex pointer", "git annex get"]),
    "annex_link": (link(".git/annex/objects/aa/bb/SHA256E-s9--cc/cc"),
                   ["a link to .git/annex", "git annex get a.safetensors"]),
    "broken_link": (link("../../blobs/4d5e"), ["a link to ../../blobs/4d5e", "does not exist"]),
    "link_to_a_device": (link("/dev/zero"), ["a device, not a regular file"]),
    "fifo": (fifo, ["a FIFO, not a regular file"]),
    "fifo_inside": (fifo_in_a_folder, ["a FIFO, not a regular file"]),
    "gguf": (written("flux-Q4.gguf", b"GGUF\x03\0\0\0" + bytes(64)), ["a GGUF file"]),
    "gguf_named_otherwise": (written("a.safetensors", b"GGUF\x03\0\0\0" + bytes(64)), ["a GGUF"]),
    "onnx": (written("model.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0"), ["an ONNX file"]),
    "tensorrt": (written("a.plan", b"\x01\x02\x00\xffabc" * 9), ["a TensorRT engine"]),
    "hdf5": (written("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)), ["an HDF5 file"]),
    "numpy": (written("a.npy", b"\x93NUMPY\x01\0v\0{'descr': '<f4'"), ["a NumPy array"]),
    "image": (written("a.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(99)), ["an image"]),
    "gzip": (written("a.safetensors.gz", b"\x1f\x8b\x08\0" + bytes(99)), ["archive", "unpack"]),
    "zip": (in_zip, ["a zip archive", "unpack"]),
    "tar": (in_tar, ["a tar archive", "unpack"]),
    "torchscript": (program, ["a TorchScript program"]),
    "pickle": (written("a.bin", pickle.dumps({"a": 1})), ["a pickle that torch.save did not"]),
    "code": (as_torch("a.pt", lambda s: {"state_dict": s, "args": Namespace(lr=1)}),
             ["the Python object argparse.Namespace", "may run code", "state_dict()"]),
    "module_whole": (as_torch("a.pt", lambda s: nn.Linear(2, 2)), ["torch.nn.modules.linear.Linear",
                                                                 "may run code"]),
    "list": (as_torch("a.pt", lambda s: list(s.values())), ["holds a list, not a state dict"]),
    "tensor": (as_torch("a.pt", lambda s: torch.ones(3)), ["holds a Tensor, not a state dict"]),
    "numbers": (as_torch("a.pt", lambda s: {"a": 1}), ["holds no state dict"]),
    "nothing": (as_torch("a.pt", lambda s: {}), ["is empty"]),
    "model_and_ema": (as_torch("a.pt", lambda s: {"model": s, "ema": s}),
                      ["several sets of weights (model, ema)", "save one of them"]),
    "itself": (as_torch("a.pt", lambda s: holding_itself()), ["holds no state dict"]),
    "on_meta": (as_torch("a.pt", lambda s: {"a": torch.ones(2, device="meta")}), ["does not fit"]),
    "numpy_values": (as_torch("a.pt", lambda s: {"a": np.ones(3)}), ["numpy", "may run code"]),
    "pickle_0": (written("a.bin", b"cos\nsystem\n(S'true'\ntR."), ["is text"]),
    "optimizer": (as_torch("a.pt", lambda s: {"state": {0: {"exp_avg": torch.ones(2)}}}),
                  ["holds no state dict"]),
    "integers": (integers, ["not floating-point", "(int8)"]),
    "nf4": (of_size(f"{Q}.weight.absmax", f"{Q}.weight.quant_map", plus=True), ["bitsandbytes",
                                                                              "before quant"]),
    "llm_int8": (of_size(f"{Q}.SCB", plus=True), ["bitsandbytes"]),
    "gptq": (of_size(f"{Q}.qweight", f"{Q}.qzeros", f"{Q}.scales"), ["GPTQ or AWQ"]),
    "nunchaku": (of_size(f"{Q}.qweight", f"{Q}.wscales", f"{Q}.lora_down", f"{Q}.lora_up"),
                 ["nunchaku"]),
    "quanto": (of_size(f"{Q}.weight._data", f"{Q}.weight._scale"), ["torchao or quanto"]),
    "torchao": (of_size(f"{Q}._weight_qdata", f"{Q}._weight_scale"), ["torchao or quanto"]),
    "fp8_scaled": (of_size("scaled_fp8", f"{Q}.scale_weight", plus=True), ["fp8 with separate"]),
    "of_black_forest_labs": (of_size("double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
                             ["Black Forest Labs", "from_single_file"]),
    "whole_pipeline": (of_size("model.diffusion_model.a", "vae.encoder.conv_in.weight"),
                       ["a whole pipeline in one file"]),
    "unet": (of_size("down_blocks.0.attentions.0.proj_in.weight"), ["a UNet"]),
    "sd3": (of_size("pos_embed.proj.weight", f"{Q}.weight"), ["Stable Diffusion 3"]),
    "qwen_image": (of_size("transformer_blocks.0.img_mod.1.weight"), ["Qwen-Image"]),
    "t5": (of_size("encoder.block.0.layer.0.SelfAttention.q.weight"), ["a T5 text encoder"]),
    "vae": (of_size("decoder.conv_in.weight"), ["a VAE"]),
    "another": (of_size("weight"), ["does not fit the model: missing", "give complete weights"]),
    "dcp": (folder_of(".metadata", "__0_0.distcp"), ["torch.distributed.checkpoint folder",
                                                    "dcp_to_torch", "weights.pt"]),
    "dcp_without_metadata": (folder_of("__0_0.distcp"), ["without its .metadata"]),
    "zero": (folder_of("zero_pp_rank_0_mp_rank_00_model_states.pt"), ["DeepSpeed", "zero_to_fp32"]),
    "zero_outside": (folder_of("latest", "global_step100/", "zero_to_fp32.py"), ["DeepSpeed"]),
    "fsdp_of_accelerate": (folder_of("pytorch_model_fsdp_0/.metadata", "optimizer_0/"),
                           ["accelerate", "merge-weights"]),
    "gguf_in_a_folder": (folder_of("flux.gguf"), ["a GGUF file"]),
    "onnx_in_a_folder": (folder_of("model.onnx", "weights.pb"), ["an ONNX file"]),
    "folder_without_weights": (folder_of("readme.md", "optimizer.bin"), ["contains no weights"]),
    "shard_lost": (one_shard_lost, ["one of 3 files, of which number 2 is missing"]),
    "file_of_the_index_lost": (one_file_lost, ["pytorch_model-00002-of-00002.bin, which does not"]),
    "shards_of_two_sets": (shards_of_two_sets, ["files of several sets, of [2, 3] files"]),
    "two_sets": (two_sets, ["several sets of weights (ae.safetensors, flux1-dev.safetensors)"]),
    "two_variants": (two_variants, ["several sets of weights"]),
    "whole_and_shards": (whole_and_shards, [f"both {NAME} and"]),
    "twice": (twice_in_shards, ["as does another of its files"]),
    "index_of_a_list": (broken_index("[]"), ["is not an index of weights"]),
    "index_of_numbers": (broken_index('{"weight_map": {"a": 3}}'), ["is not an index of weights"]),
    "index_cut": (broken_index('{"weight_map": {"a'), ["is not an index of weights"]),
}  # fmt: skip


@pytest.mark.parametrize("form", NAMED)
def test_a_form_that_is_named(form, state, refused, tmp_path):
    write, words = NAMED[form]
    message = refused(write(state, tmp_path))
    for word in words:
        assert word in message
    assert ("truncated" in message) == any("truncated" in word for word in words)


def test_code_in_a_pickle_does_not_run(refused, tmp_path, capsys):
    class Payload:
        def __reduce__(self) -> Any:
            return print, ("code ran",)

    for old in (False, True):
        content = io.BytesIO()
        torch.save({"w": Payload()}, content, _use_new_zipfile_serialization=not old)
        (tmp_path / "a.pt").write_bytes(content.getvalue())
        assert "print, which may run code" in refused(tmp_path / "a.pt")
    assert "code ran" not in capsys.readouterr().out


def test_a_lora_is_named_where_full_weights_belong(tmp_path):
    save_file({f"{Q}.lora_A.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    shapes = read_shapes(find_shards(tmp_path))
    with pytest.raises(ValueError, match=r"it holds a LoRA, not full weights; give full weights$"):
        check_fits({"weight": torch.ones(2)}, shapes, tmp_path)
