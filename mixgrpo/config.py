"""Every knob of a training run: typed, documented where it is defined, checked before use.

Precedence: the defaults here < a recipe (YAML) < dotted overrides on the command line. The string
under a field is its text in ``--help``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

RECIPES = Path(__file__).parent.parent / "scripts" / "recipes"


@dataclass
class RunConfig:
    """Where a run lives and how long it is."""

    folder: str = "runs/run"
    """folder for checkpoints, metrics, pictures and the resolved configuration"""
    iterations: int = 300
    """training iterations in all; one iteration is one rollout and its optimizer steps"""
    seed: int = 714
    """seed of everything drawn: noise, windows, prompt order, adapter initialisation"""
    resume: bool = False
    """continue from a checkpoint in the folder; without one, start from the beginning"""
    resume_from: str = "latest"
    """resume: latest, the newest checkpoint; undamaged, the newest that is not damaged; or the
    name of a folder in checkpoints, to go back"""
    threads: int = 0
    """CPU threads per process; 0 leaves torch's choice, or an equal share under torchrun"""
    patience: int = 1800
    """seconds without progress after which every process tells where it hangs and ends; 0 never"""
    grace: int = 900
    """seconds to save and end in after SIGTERM or Ctrl-C; then the launcher kills"""


@dataclass
class ModelConfig:
    """The policy: a diffusers pipeline folder and how it is trained."""

    family: Literal["flux"] = "flux"
    """model family"""
    path: str = "data/models/FLUX.1-dev"
    """diffusers pipeline folder with transformer, vae, two text encoders and tokenizers"""
    train: Literal["full", "lora"] = "full"
    """train all transformer weights, or low-rank adapters beside them"""
    lora_rank: int = 64
    """rank of the adapters"""
    lora_alpha: int = 128
    """scale of the adapters, applied as alpha / rank"""
    lora_targets: Literal["attention", "all"] = "all"
    """which projections get adapters: the attention ones, or the feed-forward ones too"""
    weights: Literal["float32", "bfloat16_stochastic"] = "float32"
    """trained weights and gradients: float32; or, in half the memory, bfloat16, rounded without
    bias in the optimizer"""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the model's matrix products; states and step arithmetic stay float32"""
    guidance: float = 3.5
    """value for the distilled guidance embedding; no effect on models without one"""
    height: int = 720
    """picture height in pixels, a multiple of 16"""
    width: int = 720
    """picture width in pixels, a multiple of 16"""
    text_length: int = 512
    """tokens that the T5 encoder sees; longer prompts are truncated, with a warning"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: less memory, about a third more time"""
    checkpoint_every: int = 1
    """gradient_checkpointing: recompute those of every n-th block only; 1 recomputes all"""
    compile: Literal["off", "inductor", "aot_eager"] = "off"
    """compile the transformer's repeated blocks: inductor for speed, after minutes of compiling;
    aot_eager only traces them, to find out what cannot be compiled"""
    attention: Literal[
        "native",
        "_native_flash",
        "_native_efficient",
        "_native_cudnn",
        "_native_math",
        "flash",
        "flex",
        "xformers",
    ] = "native"
    """diffusers' attention backend, of those that can be trained through; native: torch's choice;
    flash and xformers need their packages"""
    tf32: bool = False
    """on a GPU, float32 matrix products with mantissas of 10 bits (TF32), the rewards' included"""


@dataclass
class TextConfig:
    """Where the prompts' embeddings come from."""

    mode: Literal["online", "embeddings"] = "online"
    """online: the text encoders encode each iteration's prompts; embeddings: read from a folder"""
    embeddings: str = ""
    """embeddings: the folder that `python -m mixgrpo preprocess` wrote"""
    placement: Literal["device", "cpu", "offload"] = "device"
    """online: the text encoders stay on the device, or on the CPU and encode there, or come to the
    device just for the encoding"""


@dataclass
class SamplingConfig:
    """How pictures are sampled in the rollout."""

    steps: int = 25
    """denoising steps T"""
    shift: float = 3.0
    """time shift; 0 takes the resolution-dependent shift of FLUX's own inference"""
    transition: Literal["flow_sde", "dance_sde", "cps", "precise"] = "flow_sde"
    """stochastic step used inside the window"""
    eta: float = 0.7
    """noise level of the stochastic step"""
    log_ratio: Literal["normal", "unscaled", "guard"] = "normal"
    """true Gaussian density; the published CPS variant without 1/(2 std^2); or GRPO-Guard's,
    centred and of one scale at every step"""
    shared_noise: bool = True
    """all samples of a prompt start from one initial noise; their common steps are run once"""
    micro_batch: int = 12
    """model evaluations in one forward pass of the rollout"""
    decode_batch: int = 12
    """latents in one pass of the image decoder"""


@dataclass
class WindowConfig:
    """Which steps are stochastic and trained, as a function of the iteration."""

    strategy: Literal["progressive", "random", "decay", "exp_decay", "frozen", "all"] = (
        "progressive"
    )
    """how the window moves"""
    size: int = 4
    """steps in the window"""
    start: int = 0
    """first step of the first window (progressive, decay, exp_decay) or of every one (frozen)"""
    stride: int = 1
    """steps by which the window moves"""
    iters_per_window: int = 25
    """iterations spent on one window"""
    at_end: Literal["clamp", "wrap"] = "clamp"
    """past the last window: stay there, or begin again"""
    min_iters: int = 5
    """decay: iterations on the last window"""
    max_iters: int = 25
    """decay: iterations on the first window"""
    decay_rate: float = 0.1
    """exp_decay: rate k"""
    decay_threshold: int = 13
    """exp_decay: window start up to which nothing decays"""
    envelope: tuple[int, int] | None = None
    """[first, last+1) steps where windows may lie; without one, all but the last step"""
    seed: int | None = None
    """random: seed of the windows; without one, run.seed"""


@dataclass
class PrefixConfig:
    """The deterministic steps before the window. Shortening them collapses quality (the paper's
    ablation); here to be measured."""

    solver: Literal["euler", "dpm"] = "euler"
    """Euler, or DPM-Solver++ multistep"""
    order: int = 2
    """order of DPM-Solver++, 1 to 3"""
    variant: Literal["midpoint", "heun"] = "midpoint"
    """second-order variant of DPM-Solver++"""
    ratio: float = 1.0
    """share of the steps before the window that is kept; 1 keeps the base schedule"""


@dataclass
class TailConfig:
    """The deterministic steps behind the window (MixGRPO-Flash shortens them)."""

    solver: Literal["euler", "dpm"] = "euler"
    """Euler, or DPM-Solver++ multistep"""
    order: int = 2
    """order of DPM-Solver++, 1 to 3"""
    variant: Literal["midpoint", "heun"] = "midpoint"
    """second-order variant of DPM-Solver++"""
    ratio: float = 1.0
    """share of the steps behind the window that is kept; 1 keeps the base schedule"""


@dataclass
class BatchConfig:
    """Prompts and samples of one iteration."""

    prompts_file: str = "data/prompts.txt"
    """training prompts, one a line, UTF-8"""
    prompts: int = 32
    """prompts per iteration, over all processes together"""
    samples: int = 12
    """pictures per prompt: the group whose scores are compared"""


@dataclass
class RewardConfig:
    """One reward. Those with weight 0 are held out: scored in validation, never trained on."""

    kind: str
    """hpsv2, clip_score, pickscore, imagereward, jpeg_size, vlm (a vision-language judge behind an
    HTTP endpoint), ocr (text drawn in the picture), or your own package.module:callable"""
    weight: float = 1.0
    """share in the advantage; the weights are normalised to 1"""
    model: str | None = None
    """architecture name or model folder; vlm: the model's name on its server"""
    checkpoint: str | None = None
    """file with the weights"""
    options: dict[str, Any] = field(default_factory=dict)
    """further options of this kind: dtype; tokenizer or processor, where not in the model folder;
    those of vlm and ocr are in the README"""


@dataclass
class ScoringConfig:
    """How rewards are run."""

    micro_batch: int = 48
    """pictures per call of a reward; as soon as so many are sampled, they are scored"""
    placement: Literal["device", "offload", "cpu"] = "device"
    """the reward models stay where the policy is, are there only to score, or run on the CPU"""
    max_failed: float = 0.5
    """share of an iteration's pictures that a reward may fail on; beyond, training stops"""


@dataclass
class AdvantageConfig:
    """How scores become advantages."""

    kind: Literal["advantage_sum", "reward_sum", "gdpo", "global_std"] = "advantage_sum"
    """advantage_sum normalises each reward in its group before the weighted sum"""
    clip: float = 5.0
    """advantages are clamped to plus or minus this"""
    trim: float = 0.0
    """share of a group's rewards, at each end, that its mean and standard deviation leave out"""
    skip_equal: bool = False
    """groups whose advantages are all 0 do not count in the loss's average (DAPO)"""
    balance: bool = False
    """scale advantages so that the positive ones and the negative ones weigh the same in total"""
    best_of: int = 0
    """pictures of each group that are trained: the better half of them are its best, the other half
    its worst; 0 trains all"""


@dataclass
class UpdateConfig:
    """The policy update."""

    optimizer_steps: int = 4
    """optimizer steps per iteration; each takes an equal part of every group"""
    micro_batch: int = 12
    """model evaluations in one forward and backward pass"""
    clip: float = 1e-4
    """the ratio is clipped to 1 plus or minus this"""
    step_fraction: float = 1.0
    """share of the window's steps that is trained, drawn anew for each sample (DanceGRPO: 0.6)"""
    step_weight: Literal["equal", "inverse_dt", "noise"] | list[float] = "equal"
    """weight of a step's loss: 1; 1 / step size in sigma (GRPO-Guard); its noise over the window's
    mean (TempFlow-GRPO); or a list with one for each denoising step but the last"""
    kl: float = 0.0
    """weight of the KL to the reference policy (the untrained model)"""
    kl_form: Literal["mean", "velocity"] = "mean"
    """KL of the stochastic steps, or mean squared difference of the velocities"""
    kl_target: float = 0.0
    """the KL's weight is doubled or halved, from kl, to keep the KL near this (PPO); 0 leaves it"""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with float32 moments, or in a quarter of the memory with moments of 8 bits"""
    learning_rate: float = 1e-5
    """AdamW learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas"""
    weight_decay: float = 1e-4
    """AdamW weight decay"""
    warmup: int = 0
    """optimizer steps over which the learning rate rises linearly"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""


@dataclass
class EngineConfig:
    """How training is spread over processes. With one process there is nothing to spread."""

    kind: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """single: one process; ddp: each process holds the whole model; fsdp: a part of it (FSDP2);
    deepspeed: ZeRO; auto: single or ddp"""
    gather: Literal["once", "rollout", "evaluation"] = "once"
    """fsdp, ZeRO-3: sharded weights are gathered once for a rollout and once for each optimizer
    step; or once for a rollout only; or, for small GPUs, anew in every evaluation"""
    reduce: Literal["once", "micro_batch"] = "once"
    """fsdp, deepspeed: gradients are exchanged once per optimizer step, up to which each process
    holds all of them; or, for small GPUs, after every micro-batch, of which each keeps its part"""
    hybrid: bool = False
    """fsdp: shard among the processes of a machine, with a copy on every machine"""
    offload: bool = False
    """fsdp: weights, gradients and the optimizer rest and step on the CPU"""
    zero_stage: Literal[2, 3] = 3
    """deepspeed: 2 shards gradients and the optimizer, 3 the weights too"""


@dataclass
class EmaConfig:
    """Exponential moving average of the trained weights."""

    decay: float = 0.0
    """highest decay; 0 keeps no average"""
    every: int = 1
    """iterations between updates of the average"""
    placement: Literal["device", "cpu"] = "device"
    """where the average is kept"""


@dataclass
class ValidationConfig:
    """Deterministic sampling of fixed prompts and noise, before, during and after training."""

    every: int = 25
    """iterations between validations; 0 validates only before and after"""
    before: bool = True
    """validate the untrained model too; false where its scores are known from another run"""
    prompts_file: str = "data/prompts_test.txt"
    """validation prompts, one a line, UTF-8"""
    prompts: int = 64
    """how many of them are used, from the top; 0 uses all"""
    steps: int = 50
    """denoising steps"""
    seed: int = 617
    """seed of the validation noise"""
    pictures: int = 16
    """pictures kept as files and shown in the grids"""
    patience: int = 3
    """validations in a row in which a held-out reward may fall while the trained ones rise, before
    a warning of reward hacking; 0 never warns"""


@dataclass
class CheckpointConfig:
    """Saving."""

    every: int = 25
    """iterations between checkpoints; 0 saves only at the end"""
    keep: int = 2
    """newest checkpoints that are kept; 0 keeps all"""
    asynchronous: bool = True
    """train on while a checkpoint is written; this takes CPU memory for a copy of the state"""


@dataclass
class LogConfig:
    """Reporting. Secrets are no knobs: WANDB_API_KEY comes from the environment."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if WANDB_API_KEY is set, otherwise disabled"""
    project: str = "mixgrpo"
    """wandb project"""
    tensorboard: bool = False
    """write the same for TensorBoard into the folder's tensorboard/"""
    progress: bool = True
    """show a progress bar"""


@dataclass
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    tail: TailConfig = field(default_factory=TailConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """rewards by the name under which they are logged"""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class EncoderConfig:
    """The model whose text encoders are used."""

    family: Literal["flux"] = "flux"
    """model family"""
    path: str = "data/models/FLUX.1-dev"
    """diffusers pipeline folder with two text encoders and tokenizers"""
    text_length: int = 512
    """tokens that the T5 encoder sees; longer prompts are truncated, with a warning"""


@dataclass
class PreprocessConfig:
    """Encoding prompts in advance."""

    prompts_files: list[str]
    """files of prompts, one a line, UTF-8; each distinct prompt is encoded once"""
    output: str
    """folder of the embeddings; prompts that it holds already are kept"""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the encoders and of what is stored; training needs the same model.compute_dtype"""
    shard_size: int = 64
    """prompts in one file"""
    threads: int = 0
    """CPU threads per process; 0 leaves torch's choice, or an equal share under torchrun"""
    progress: bool = True
    """show a progress bar"""


def flatten(config: Any) -> dict[str, Any]:
    """Dotted path -> value of any configuration, as JSON would give it back (tuples are lists)."""
    return dotted(asdict(config))


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted path -> value of nested dicts; empty ones are values."""
    return dict(_leaves("", values))


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(f"{prefix}{key}.", item)]
    return [(prefix.removesuffix("."), list(value) if isinstance(value, tuple) else value)]
