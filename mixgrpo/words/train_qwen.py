"""Pretrains the small Qwen-Image and its text encoder on signs by conditional flow matching.

Some of the captions are wrong in one fact, like those of web data, so the base model does not
always follow the text, which preference training improves. Others are replaced by the negative
prompt, for classifier-free guidance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from mixgrpo.maths.schedule import shift_time
from mixgrpo.shapes.fitting import fit
from mixgrpo.words.renderer import HEIGHT, WIDTH
from mixgrpo.words.signs import alter
from mixgrpo.words.train_vae import encode, flat, training_pictures

BATCH = 32
NEGATIVE = " "
# The letters are determined at high noise.
SHIFT = 2.0


@dataclass(frozen=True)
class Tokens:
    """Templated prompts as token ids [N, S] with their mask [N, S], padded on the right."""

    ids: Tensor
    mask: Tensor


def train_qwen(
    pipeline: QwenImagePipeline,
    steps: int,
    seed: int,
    pictures: int,
    wrong_captions: float,
    dropped_captions: float,
    rate: float = 1.5e-3,
) -> None:
    """Fits the transformer and the text encoder in place; the VAE is used as it is.

    Args:
        wrong_captions: fraction of captions with one fact altered.
        dropped_captions: fraction of captions replaced by the negative prompt.
        rate: the highest learning rate.
    """
    images, signs = training_pictures(pictures, seed)
    with flat(pipeline.vae):
        latents = pack(pipeline, encode(pipeline.vae, images))
    rng = random.Random(seed)
    chance = [rng.random() for _ in signs]
    captions = [
        NEGATIVE
        if luck < dropped_captions
        else (alter(sign, rng) if luck > 1 - wrong_captions else sign).caption
        for sign, luck in zip(signs, chance, strict=True)
    ]
    tokens = tokenize(pipeline, captions)
    model = nn.ModuleDict(
        {"transformer": pipeline.transformer, "text": pipeline.text_encoder.model.language_model}
    )
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(pictures, (BATCH,), generator=generator)
        part = Tokens(tokens.ids[chosen], tokens.mask[chosen])
        x0 = latents[chosen]
        x1 = torch.randn(x0.shape, generator=generator)
        sigma = shift_time(torch.rand(BATCH, generator=generator), SHIFT)
        at = sigma[:, None, None]
        predicted = predict(pipeline, (1 - at) * x0 + at * x1, sigma, part)
        return (predicted - (x1 - x0)).square().mean()

    fit(model, loss, steps, rate, "qwen", decay=1e-3, average=True)


def predict(pipeline: QwenImagePipeline, x: Tensor, sigma: Tensor, tokens: Tokens) -> Tensor:
    """The velocity [N, 8, 64] at noise levels sigma [N], without guidance."""
    prefix = pipeline.prompt_template_encode_start_idx
    # What the pipeline takes as hidden_states[-1] is the state behind the last norm.
    states = pipeline.text_encoder.model.language_model(
        input_ids=tokens.ids, attention_mask=tokens.mask
    ).last_hidden_state
    mask = tokens.mask[:, prefix:]
    return pipeline.transformer(
        hidden_states=x,
        timestep=sigma,
        encoder_hidden_states=states[:, prefix:] * mask[:, :, None],
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, HEIGHT // 16, WIDTH // 16)]] * len(x),
        return_dict=False,
    )[0]


def tokenize(pipeline: QwenImagePipeline, captions: list[str]) -> Tokens:
    """Token ids of captions in the pipeline's template."""
    texts = [pipeline.prompt_template_encode.format(caption) for caption in captions]
    out = pipeline.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return Tokens(out.input_ids, out.attention_mask)


def pack(pipeline: QwenImagePipeline, latents: Tensor) -> Tensor:
    """VAE latents [N, 16, 4, 8] -> normalised tokens [N, 8, 64]."""
    config = pipeline.vae.config
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std)
    )
    return QwenImagePipeline._pack_latents((latents - mean) / std, *latents.shape)
