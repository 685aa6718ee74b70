"""The knobs of a training run: typed, documented where they are defined, checked before use.

Precedence: the defaults here < a recipe (YAML) < dotted overrides on the command line. The string
under a field is its help text in ``--help``; the limits of numbers are in ``checks.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

RECIPES = Path(__file__).parent.parent / "scripts" / "recipes"

FilePath = Annotated[str, "path"]
"""A knob that names a file or folder: a leading ``~`` is expanded when it is read."""


@dataclass
class RunConfig:
    """The run's folder, length, seed and behaviour when it is interrupted."""

    folder: FilePath = "runs/run"
    """folder for checkpoints, metrics, images and the resolved configuration"""
    iterations: int = 300
    """total number of training iterations; one iteration is one rollout and its optimizer steps"""
    seed: int = 714
    """random seed for everything drawn: noise, windows, prompt order, adapter initialisation"""
    resume: bool = False
    """continue from a checkpoint in the folder; start from the beginning if there is none"""
    resume_from: str = "latest"
    """where run.resume continues: 'latest', the newest checkpoint; 'undamaged', the newest
    checkpoint that is not damaged; or the name of a folder in checkpoints/, to go back to it"""
    deterministic: bool = False
    """use only deterministic kernels on a GPU: a run that was killed and resumed then equals an
    undisturbed one to the last bit; on a CPU it always does"""
    threads: int = 0
    """CPU threads per process; 0 keeps torch's default, or an equal share under torchrun"""
    patience: int = 1800
    """seconds without progress after which every process prints where it hangs and exits; 0
    waits forever"""
    grace: int = 900
    """seconds allowed for saving and exiting after SIGTERM, SIGHUP or Ctrl-C; a process that still
    runs then prints where it hangs and is ended"""


@dataclass
class ModelConfig:
    """The policy: which diffusers pipeline folder it comes from and how it is trained."""

    family: str = "auto"
    """model family: auto, the one whose pipeline model_index.json names, or its name in
    mixgrpo/models/registry.py"""
    path: FilePath = "data/models/FLUX.1-dev"
    """diffusers pipeline folder"""
    train: Literal["full", "lora"] = "full"
    """train all transformer weights, or only low-rank adapters added to them"""
    lora_rank: int = 64
    """rank of the adapters"""
    lora_alpha: int = 128
    """scale of the adapters, applied as alpha / rank"""
    lora_targets: Literal["attention", "all"] = "all"
    """projections that get adapters: those of attention only, or those of the feed-forward layers
    too"""
    lora_init: Literal["uniform", "gaussian"] = "uniform"
    """how the first matrix of an adapter is drawn, the second being 0: uniform, within 1 /
    sqrt(inputs) of 0; gaussian, with standard deviation 1 / lora_rank; both as PEFT does"""
    weights: Literal["float32", "bfloat16_stochastic"] = "float32"
    """dtype of trained weights and gradients: float32, or bfloat16 with stochastic rounding in the
    optimizer, which halves their memory"""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the model's matrix products; latents and step arithmetic stay in float32"""
    guidance: float = 3.5
    """value of the distilled guidance embedding; no effect on models without one"""
    height: int = 720
    """image height in pixels, a multiple of 16"""
    width: int = 720
    """image width in pixels, a multiple of 16"""
    text_length: int = 512
    """maximum number of tokens of a prompt; longer prompts are truncated with a warning"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass, which saves memory and takes about a third more
    time"""
    checkpoint_every: int = 1
    """with gradient_checkpointing, recompute only every n-th block; 1 recomputes all"""
    compile: Literal["off", "inductor", "aot_eager"] = "off"
    """compile the transformer's repeated blocks: inductor is faster after minutes of compilation;
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
    """diffusers attention backend, one that supports gradients; native lets torch choose; flash
    and xformers need their packages"""
    tf32: bool = False
    """compute float32 matrix products in TF32 (10-bit mantissa) on a GPU, those of the rewards
    included"""


@dataclass
class GuidanceConfig:
    """Classifier-free guidance, for families that have it. A model that is distilled for guidance,
    such as FLUX.1-dev, has model.guidance instead."""

    scale: float = 1.0
    """scale w of the rollout, u + w (c - u) of the conditional and the unconditional velocity; 1
    evaluates no unconditional branch"""
    update_scale: float | None = None
    """scale of the update; null uses guidance.scale, and with any other value the ratio of an
    unchanged policy is not 1"""
    validation_scale: float | None = None
    """scale of validations; null uses guidance.scale"""
    negative_prompt: str | None = None
    """prompt of the unconditional branch, for prompts whose line of JSONL has no key
    `negative_prompt`; null uses the family's own"""
    batched: bool = False
    """evaluate both branches in one batch of twice the size instead of one after the other, which
    uses a GPU better when batches are small, and pads the shorter prompt"""
    unconditional_gradient: bool = True
    """in the update, let gradients flow through the unconditional branch too; false saves its
    backward pass, and the gradient is no longer that of the guided velocity"""


@dataclass
class TextConfig:
    """Where the prompts' embeddings come from."""

    mode: Literal["online", "embeddings"] = "online"
    """online: encode each iteration's prompts with the text encoders; embeddings: read stored
    embeddings from a folder"""
    embeddings: FilePath = ""
    """with mode embeddings, the folder that `python -m mixgrpo preprocess` wrote"""
    placement: Literal["device", "cpu", "offload"] = "device"
    """with mode online, where the text encoders are: always on the device, on the CPU (which then
    encodes), or moved to the device only while they encode"""


@dataclass
class SamplingConfig:
    """How images are sampled in the rollout."""

    steps: int = 25
    """number of denoising steps T"""
    shift: float = 3.0
    """time shift; 0 uses the schedule of the family's own inference, which depends on the image
    size"""
    transition: Literal["flow_sde", "dance_sde", "cps", "precise"] = "flow_sde"
    """stochastic step used inside the window"""
    eta: float = 0.7
    """noise level of the stochastic step"""
    log_ratio: Literal["normal", "unscaled", "guard"] = "normal"
    """log-ratio of the policies: normal, from the true Gaussian density; unscaled, the published
    CPS variant without 1/(2 std^2); guard, GRPO-Guard's, centred and on the same scale at every
    step"""
    shared_noise: bool = True
    """start all samples of a prompt from the same initial noise and compute their common steps
    only once"""
    micro_batch: int = 12
    """model evaluations per forward pass of the rollout"""
    decode_batch: int = 12
    """latents per forward pass of the image decoder"""


@dataclass
class WindowConfig:
    """Which steps are stochastic and trained, as a function of the iteration."""

    strategy: Literal["progressive", "random", "decay", "exp_decay", "frozen", "all"] = (
        "progressive"
    )
    """how the window moves"""
    size: int = 4
    """number of steps in the window"""
    start: int = 0
    """first step of the first window (progressive, decay, exp_decay) or of every window (frozen)"""
    stride: int = 1
    """number of steps by which the window moves"""
    iters_per_window: int = 25
    """iterations spent on one window"""
    at_end: Literal["clamp", "wrap"] = "clamp"
    """after the last window: clamp stays there, wrap starts again at the first"""
    min_iters: int = 5
    """with strategy decay, iterations spent on the last window"""
    max_iters: int = 25
    """with strategy decay, iterations spent on the first window"""
    decay_rate: float = 0.1
    """with strategy exp_decay, the rate k"""
    decay_threshold: int = 13
    """with strategy exp_decay, the window start up to which the iterations per window do not
    decay"""
    envelope: tuple[int, int] | None = None
    """range [first, last+1) of steps that windows may cover; null allows all but the last step"""
    seed: int | None = None
    """with strategy random, the seed of the windows; null uses run.seed"""
    convention: Literal["own", "verl_omni"] = "own"
    """verl_omni: iterations count from 1 and random windows are drawn as verl-omni draws them, so
    that its seed gives the same windows; strategies random and progressive only"""


@dataclass
class PrefixConfig:
    """The deterministic steps before the window. Shortening them degrades image quality severely
    (the paper's ablation); the knobs exist so that this can be measured."""

    solver: Literal["euler", "dpm"] = "euler"
    """Euler, or multistep DPM-Solver++"""
    order: int = 2
    """order of DPM-Solver++, 1 to 3"""
    variant: Literal["midpoint", "heun"] = "midpoint"
    """second-order variant of DPM-Solver++"""
    ratio: float = 1.0
    """fraction of the steps before the window that is kept; 1 keeps the base schedule"""


@dataclass
class TailConfig:
    """The deterministic steps after the window (MixGRPO-Flash shortens them)."""

    solver: Literal["euler", "dpm"] = "euler"
    """Euler, or multistep DPM-Solver++"""
    order: int = 2
    """order of DPM-Solver++, 1 to 3"""
    variant: Literal["midpoint", "heun"] = "midpoint"
    """second-order variant of DPM-Solver++"""
    ratio: float = 1.0
    """fraction of the steps after the window that is kept; 1 keeps the base schedule"""


@dataclass
class BatchConfig:
    """Prompts and samples of one iteration."""

    prompts_file: FilePath = "data/prompts.txt"
    """file of training prompts, UTF-8: one per line, or JSONL with a key `prompt`"""
    prompts: int = 32
    """prompts per iteration, summed over all processes"""
    samples: int = 12
    """images per prompt: the group whose scores are compared"""


@dataclass
class RewardConfig:
    """One reward. Those with weight 0 are held out: scored in validation, never trained on."""

    kind: str
    """hpsv2, clip_score, pickscore, imagereward, jpeg_size, vlm (a vision-language model behind an
    HTTP endpoint, as a judge or to transcribe text), ocr (text rendered in the image), or your own
    package.module:callable"""
    weight: float = 1.0
    """weight in the advantage; the weights are normalised to sum to 1"""
    model: FilePath | None = None
    """architecture name or model folder; for vlm, the model's name on its server"""
    checkpoint: FilePath | None = None
    """file with the weights"""
    options: dict[str, Any] = field(default_factory=dict)
    """further options of this kind: dtype; tokenizer or processor, if it is not in the model
    folder; mixgrpo/rewards/README.md lists those of vlm and ocr; --rewards.NAME.options.KEY sets
    one of them"""


@dataclass
class ScoringConfig:
    """How rewards are computed."""

    micro_batch: int = 48
    """images per call of a reward; images are scored as soon as this many have been sampled"""
    placement: Literal["device", "offload", "cpu"] = "device"
    """where the reward models are: always on the policy's device, moved there only while they
    score, or on the CPU"""
    max_failed: float = 0.5
    """fraction of an iteration's images that a reward may fail to score; training stops if more
    fail, and does not start if the reward lacks what it needs in more of a file's prompts"""


@dataclass
class AdvantageConfig:
    """How scores become advantages."""

    kind: Literal["advantage_sum", "reward_sum", "gdpo", "global_std"] = "advantage_sum"
    """how rewards are combined; advantage_sum normalises each reward within its group before the
    weighted sum"""
    clip: float = 5.0
    """advantages are clamped to plus or minus this value"""
    trim: float = 0.0
    """fraction of a group's rewards, at each end, that is excluded from its mean and standard
    deviation"""
    skip_equal: bool = False
    """exclude groups whose advantages are all 0 from the average of the loss (DAPO)"""
    balance: bool = False
    """scale advantages so that the positive and the negative ones have the same total weight"""
    best_of: int = 0
    """number of images of each group to train on, half of them the group's best and half its
    worst; 0 trains on all"""


@dataclass
class UpdateConfig:
    """The policy update."""

    optimizer_steps: int = 4
    """optimizer steps per iteration"""
    split: Literal["samples", "groups"] = "samples"
    """what the optimizer steps divide among them: samples, each uses an equal part of every group;
    groups, each uses all samples of an equal part of the prompts"""
    micro_batch: int = 12
    """model evaluations per forward and backward pass"""
    clip: float = 1e-4
    """the ratio is clipped to 1 plus or minus this value"""
    step_fraction: float = 1.0
    """fraction of the window's steps that is trained, drawn separately for each sample (DanceGRPO:
    0.6)"""
    step_weight: Literal["equal", "inverse_dt", "noise"] | list[float] = "equal"
    """weight of a step's loss: equal, 1; inverse_dt, 1 / step size in sigma (GRPO-Guard); noise,
    the step's noise relative to the window's mean (TempFlow-GRPO); or a list with one weight for
    each denoising step but the last"""
    kl: float = 0.0
    """weight of the KL divergence from the reference policy (the untrained model)"""
    kl_form: Literal["mean", "velocity"] = "mean"
    """mean: the KL divergence of the stochastic steps; velocity: the mean squared difference of the
    velocities"""
    kl_target: float = 0.0
    """target of the KL divergence: its weight starts at update.kl and is doubled or halved to stay
    near this value (PPO); 0 keeps the weight fixed"""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with float32 moments, or with 8-bit moments in a quarter of the memory"""
    learning_rate: float = 1e-5
    """AdamW learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas"""
    weight_decay: float = 1e-4
    """AdamW weight decay"""
    warmup: int = 0
    """optimizer steps over which the learning rate rises linearly"""
    max_grad_norm: float = 1.0
    """maximum gradient norm; larger gradients are scaled down to it"""


@dataclass
class EngineConfig:
    """How training is distributed over processes; irrelevant with a single process."""

    kind: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """single: one process; ddp: each process holds the whole model; fsdp: each process holds a
    shard of it (FSDP2); deepspeed: ZeRO; auto: single or ddp"""
    gather: Literal["once", "rollout", "evaluation"] = "once"
    """with fsdp and ZeRO-3, when sharded weights are gathered: once, one time per rollout and per
    optimizer step; rollout, one time per rollout, and in every evaluation of the update;
    evaluation, in every model evaluation, for small GPUs"""
    reduce: Literal["once", "micro_batch"] = "once"
    """with fsdp and deepspeed, when gradients are reduced: once per optimizer step, until which
    every process holds all gradients; or after every micro-batch, after which each process keeps
    only its shard, for small GPUs"""
    hybrid: bool = False
    """with fsdp, shard within each machine and replicate across machines"""
    offload: bool = False
    """with fsdp, keep weights, gradients and optimizer state on the CPU and run the optimizer
    there"""
    zero_stage: Literal[2, 3] = 3
    """with deepspeed, stage 2 shards gradients and optimizer state, stage 3 the weights too"""


@dataclass
class EmaConfig:
    """Exponential moving average (EMA) of the trained weights."""

    decay: float = 0.0
    """maximum decay; 0 keeps no average"""
    every: int = 1
    """iterations between updates of the average"""
    placement: Literal["device", "cpu"] = "device"
    """where the average is stored"""


@dataclass
class ValidationConfig:
    """Deterministic sampling of fixed prompts from fixed noise, through the whole training."""

    every: int = 25
    """iterations between validations; 0 validates only before and after training"""
    before: bool = True
    """validate the untrained model too; set to false if its scores are known from another run"""
    prompts_file: FilePath = "data/prompts_test.txt"
    """file of validation prompts, UTF-8: one per line, or JSONL with a key `prompt`"""
    prompts: int = 64
    """number of prompts to use, from the top of the file; 0 uses all"""
    steps: int = 50
    """number of denoising steps"""
    seed: int = 617
    """seed of the validation noise"""
    pictures: int = 16
    """number of images that are saved as files and shown in the grids"""
    patience: int = 3
    """number of consecutive validations in which a held-out reward may fall while the trained ones
    rise, before a warning of reward hacking; 0 never warns"""


@dataclass
class CheckpointConfig:
    """When checkpoints are saved and how many are kept."""

    every: int = 25
    """iterations between checkpoints; 0 saves only at the end"""
    keep: int = 2
    """number of newest checkpoints to keep; 0 keeps all"""
    asynchronous: bool = True
    """continue training while a checkpoint is written, which needs CPU memory for a copy of the
    state"""


@dataclass
class LogConfig:
    """Where metrics are logged. WANDB_API_KEY is not a knob: it is read from the environment."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases mode; auto: online if WANDB_API_KEY is set, otherwise disabled"""
    project: str = "mixgrpo"
    """wandb project"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard, to tensorboard/ in run.folder"""
    progress: bool = True
    """show a progress bar"""


@dataclass
class Config:
    """All knobs of a training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    tail: TailConfig = field(default_factory=TailConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """rewards, by the names under which they are logged, of letters, digits, _ and -"""
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
    """The model whose text encoders encode the prompts."""

    family: str = "auto"
    """model family: auto, the one whose pipeline model_index.json names, or its name in
    mixgrpo/models/registry.py"""
    path: FilePath = "data/models/FLUX.1-dev"
    """diffusers pipeline folder"""
    text_length: int = 512
    """maximum number of tokens of a prompt; longer prompts are truncated with a warning"""


@dataclass
class PreprocessConfig:
    """How prompts are encoded in advance."""

    prompts_files: list[FilePath]
    """files of prompts, UTF-8: one per line, or JSONL with a key `prompt`; each distinct prompt is
    encoded once"""
    output: FilePath
    """folder for the embeddings; prompts that it already contains are not encoded again"""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the encoders and of the stored embeddings; training needs the same
    model.compute_dtype"""
    negative_prompt: str | None = None
    """prompt of the unconditional branch of guidance, which is encoded too; null encodes the
    family's own if it has one"""
    shard_size: int = 64
    """prompts per file"""
    threads: int = 0
    """CPU threads per process; 0 keeps torch's default, or an equal share under torchrun"""
    progress: bool = True
    """show a progress bar"""


def flatten(config: Any) -> dict[str, Any]:
    """Dotted path -> value for any configuration, as read back from JSON (tuples become lists)."""
    return dotted(asdict(config))


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted path -> value for nested dicts; an empty dict is a value."""
    return dict(_leaves("", values))


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(f"{prefix}{key}.", item)]
    return [(prefix.removesuffix("."), list(value) if isinstance(value, tuple) else value)]
