"""What programs put before the names of layers in LoRA files, whatever the family."""

from __future__ import annotations

import re

_PREFIXES = re.compile(
    r"(base_model\.model\.|module\.|model\.|diffusion_model\.|transformer\.|unet\.)+"
    r"|lora_unet_|lora_transformer_|lycoris_"
)
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_TEXT = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoders?[._\d])")


def is_of_text_encoder(name: str) -> bool:
    """Whether a name in a LoRA file is that of a text encoder's layer."""
    return _TEXT.match(name) is not None


def without_prefix(name: str) -> str:
    """The name of a layer without what programs put before it."""
    name = _WRAPPERS.sub("", name)
    prefix = _PREFIXES.match(name)
    return name[prefix.end() :] if prefix else name
