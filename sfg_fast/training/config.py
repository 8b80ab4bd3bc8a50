"""The configuration of a training run. It is typed, one YAML file holds it, and every option is described here."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_shape, one_line, read_text
from ..networks.build import NETWORKS, default_norm, reads_volumes
from ..networks.methods import METHODS
from ..tasks import USUAL, of_images, read_tasks

PRECISIONS = ("auto", "float32", "bfloat16")
GRAPHS = ("auto", "on", "off")
NORMS = ("auto", "batch", "instance", "layer")
DECAYS = ("cosine", "polynomial", "constant")
# These options may differ in a run that is resumed: they change files and time, but no result. (`graph`: a step on one
# GPU is the same operations in a CUDA graph and eagerly, with the same optimiser and the same random numbers.)
OPERATIONAL = {"out", "data", "device", "gpu_check", "graph", "workers", "keep", "max_bad_steps"}


@dataclasses.dataclass
class NetworkConfig:
    """The network.

    Args:
        name: "highresnet" (`SFGHighResNet`) or "unet" (`SFGUNet`), for a value per voxel, or "vgg" (`SFGVGG`), for a
            value per image.
        width: channels of highresnet's three stages, of unet's stages (or of its first, and each has twice as many as
            the one before), or of vgg's first convolution; null: [16, 32, 64], 32, or 64.
        blocks: of highresnet: residual blocks in each stage; null: 3. Of unet: convolutions in each stage, or residual
            blocks; null: 2.
        residual: of highresnet: "separate" (the paper's) or "routed" (cheaper); null: separate. Of unet: true for an
            encoder of residual blocks; null: false.
        stages: of unet: stages of the encoder, each but the first of which halves the image; null: 5.
        down: of unet: what halves the image, "strided" convolutions, or "pooled" for means; null: strided.
        deep_supervision: of unet: true to learn from outputs of each stage of the decoder, too, which are weighed by
            1, 1/2, 1/4 .., the coarsest, too, which nnU-Net leaves out; null: false.
        method: "sfg", or another: one_task, hard_sharing, constant_mask, constant_p, even_split, cross_stitch, retrain
            (docs/network.md).
        norm: "auto" (highresnet and vgg: batch; unet: instance), "batch", "instance", "layer", or null for none.
            Highresnet with separate residual blocks has batch or none.
        init: initial p: a name (uniform, dirichlet, mostly_shared, mostly_specific, vertex), or probabilities, shared
            first.
        estimator: gradient estimator of the grouping: straight_through, gumbel_softmax, gumbel_rao, reinmax or
            selected.
        noise_on: what the noise of a draw is added to: "log_p", so that groups are drawn with probability p; or "p", as
            in the authors' public code: they are drawn with probability softmax(p).
        explore: share of the draws that ignore p: groups are drawn with probability (1 - explore) p + explore / (T+1),
            also where the grouping is fixed. So drawing still acts as a dropout when p has become certain. Choose the
            share on the validation split, as the rate of a dropout.
        shared: of method constant_mask: the share of each layer's kernels that is shared, one number or one for each
            layer; the rest is split evenly among the tasks. null: 1/(T+1).
        dropout: probability with which each channel is zero between two layers, in training and in predictions by
            draws.
        every: n: only every n-th step looks at the groups that kernels were not drawn into. The other steps are
            cheaper, and the mean gradient stays the same.
        grouping: of method retrain: folder of a finished run, whose most probable assignment is fixed from the start.
    """

    name: str = "highresnet"
    width: int | list[int] | None = None
    blocks: int | None = None
    residual: bool | str | None = None
    stages: int | None = None
    down: str | None = None
    deep_supervision: bool | None = None
    method: str = "sfg"
    norm: str | None = "auto"
    init: str | list[float] = "mostly_shared"
    estimator: str = "straight_through"
    noise_on: str = "log_p"
    explore: float = 0.0
    shared: float | list[float] | None = None
    dropout: float = 0.0
    every: int = 1
    grouping: str | None = None


@dataclasses.dataclass
class ObjectiveConfig:
    """The penalties of the objective, eq. 2. (The tasks define its likelihoods.)

    Args:
        lambda1: weight of the sum of squared kernel norms.
        lambda2: weight of the sum of entropies of the grouping probabilities. A large weight keeps p close to uniform
            (docs/experiment.md).
    """

    lambda1: float = 1e-3
    lambda2: float = 1e-3


@dataclasses.dataclass
class ScheduleConfig:
    """How long and how fast a network is trained.

    Args:
        steps: optimiser steps.
        batch: slices, patches or images in a mini-batch of one process; M of eq. 2 is batch x accumulate x processes.
        accumulate: mini-batches whose gradients are added up for a step, each with a draw of its own.
        learning_rate: of Adam, for weights.
        logits_factor: the logits' learning rate is this many times the weights'.
        pooled: how much the step of a kernel's logits follows those of all kernels of its layer: sqrt(K) times their
            mean gradient counts so many times beside its own (`pool_gradients`); 0: each is by itself.
        warmup: steps of linear warm-up.
        decay: how the weights' rate falls: "cosine", to 5 %; "polynomial", (1 - t)^0.9, to 0, as nnU-Net's; "constant".
        decay_from: share of the steps after which the rate falls.
        temperature_start: temperature of the relaxation at the start.
        temperature_end: lowest temperature; the temperature falls to it exponentially.
        temperature_until: share of the steps after which the lowest temperature is reached.
        draw_until: share of the steps with drawn groupings; after it argmax p is fixed and only weights are trained.
            1: draw to the end, as the paper does. A share below 1 is an addition to the paper: drawn and argmax
            evaluation then differ less, and the weights learn faster (docs/experiment.md).
        clip: largest norm of the weights' gradient.
        patience: stop when the validation split has not improved for so many checkpoints; null: never. Checkpoints
            count from `draw_until` on, because the weights have to learn the fixed grouping first.
    """

    steps: int = 20000
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-3
    logits_factor: float = 30.0
    pooled: float = 1.0
    warmup: int = 10
    decay: str = "cosine"
    decay_from: float = 0.5
    temperature_start: float = 1.0
    temperature_end: float = 0.1
    temperature_until: float = 0.8
    draw_until: float = 0.3
    clip: float = 1.0
    patience: int | None = None


@dataclasses.dataclass
class TransferConfig:
    """Start from the filters of another run.

    Args:
        run: folder of a finished run of a network of the same widths and blocks; null for none.
        tasks: which of this run's tasks take which of that run's filters, e.g. {ct: ct}; null: tasks of the same name;
            {}: the shared filters only.
        freeze: keep the transferred kernels as they are, and learn the other tasks with the kernels that are left.
    """

    run: str | None = None
    tasks: dict[str, str] | None = None
    freeze: bool = False


@dataclasses.dataclass
class TrainConfig:
    """A training run.

    Args:
        data: folder made by `sfg-fast preprocess`.
        out: run folder to be made: config.yaml, checkpoints/, history.json, summary.json, progress.png, tensorboard/.
        tasks: what to learn: name -> {kind: .., options of the kind} (docs/tasks.md); or names alone, of ct, organs.
        folds: train on k - 1 of k parts of the cohort's train and val cases and validate on the other, one after the
            other, to OUT/fold_0 ..; the parts are in DATA/splits_final.json. null: the cohort's own split.
        fold: only this one of the folds, 0 .. k - 1.
        patch: height and width of random in-plane patches in voxels; or depth, height and width of 3-D patches, for a
            network that reads volumes; null for whole slices. (Of volumes.)
        foreground: share of the slices (or patches) that must show a label. (Of volumes.)
        bias: augmentation: strength of a random smooth bias field on the MR (log scale); 0 for none. (Of
            volumes.)
        flip: augmentation: mirror every second image, left to right. (Of images.)
        shift: augmentation: move images by up to so many pixels. (Of images.)
        seed: seed of weights, draws and slices.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        gpu_check: "on": if this GPU was never checked, `sfg-fast gpu-check` runs before the first step (a minute), so
            that the fastest kernels that are right are taken; "off": it does not, and such a GPU takes `masked`.
        graph: "auto": in a single process on a GPU steps are captured in CUDA graphs, or a line says why they can't be;
            "on": they are, or an error says why not; "off": they are done eagerly, with the same results. (In a YAML
            file "on" and "off" need the quotes.)
        precision: "float32"; "bfloat16" where autocast allows it; or "auto", bfloat16 on GPUs that multiply it, else
            float32. A run that is resumed keeps the precision that it began with.
        workers: processes that read ahead; 0: none.
        same_assignment: one draw for all processes, and batch statistics over all of them (as one process with the
            whole batch). Otherwise each process draws its own.
        log_every: steps between looks at held-out examples and at the grouping.
        checkpoint_every: steps between checkpoints, and between looks at the validation split.
        validation_slices: how many slices (or patches, or images) of the validation split are looked at.
        keep: how many checkpoints to resume from are kept.
        max_bad_steps: how many steps with a gradient that isn't finite are left out before the run gives up.
    """

    data: str
    out: str
    tasks: Any = dataclasses.field(default_factory=lambda: list(USUAL))
    folds: int | None = None
    fold: int | None = None
    patch: list[int] | None = None
    foreground: float = 0.33
    bias: float = 0.1
    flip: bool = False
    shift: int = 0
    seed: int = 0
    device: str = "auto"
    gpu_check: str = "on"
    graph: str = "auto"
    precision: str = "auto"
    workers: int = 0
    same_assignment: bool = False
    log_every: int = 50
    checkpoint_every: int = 500
    validation_slices: int = 64
    keep: int = 3
    max_bad_steps: int = 10
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)

    @property
    def spatial_dims(self) -> int:
        """How many axes an example has: 3 with 3-D patches, else 2."""
        return 2 if self.patch is None else len(self.patch)


def read_config(path: Path) -> TrainConfig:
    """The configuration in the config.yaml of a run. Raises InputError if it can't be read or is of another version."""
    import yaml

    try:
        saved = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not readable as YAML ({one_line(error)[:200]})") from error
    return from_saved(saved, path)


def from_saved(saved: Any, path: Path) -> TrainConfig:
    """The configuration that was saved (`dataclasses.asdict`) in the file `path`. Raises InputError if it is of another
    version."""
    try:
        check_shape(saved, TrainConfig, "it")
        parts = {
            "network": NetworkConfig(**saved["network"]),
            "objective": ObjectiveConfig(**saved["objective"]),
            "schedule": ScheduleConfig(**saved["schedule"]),
            "transfer": TransferConfig(**saved.get("transfer", {})),
        }
        config = TrainConfig(**{**saved, **parts})
        check(config)
        return config
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{path}: its configuration is not one of this version ({one_line(error)})") from error


def difference(now: dict[str, Any], before: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option that makes two configurations (`dataclasses.asdict`) train differently, and its values now and
    before; None if both train alike. A precision or norm `auto` is now whatever it was before."""
    here, there = _flat(now), _flat(before)
    for key in ("precision", "network.norm"):
        if here.get(key) == "auto":
            here[key] = there.get(key)
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key) and key not in OPERATIONAL:
            return key, here.get(key), there.get(key)
    return None


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:  # an empty dict is a value like others
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def check(config: TrainConfig) -> None:
    """Raise InputError, which names the option, for a value that it can't have. (The network checks its own
    options.)"""

    def refuse(key: str, value: Any, expected: str) -> None:
        raise InputError(f"{key}={value!r}: expected {expected}")

    check_shape(dataclasses.asdict(config), TrainConfig, "the configuration")
    schedule, objective, network = config.schedule, config.objective, config.network
    _check_examples(config)
    if config.patch is not None and (len(config.patch) not in (2, 3) or min(config.patch) < 1):
        refuse("patch", config.patch, "null, or height and width in voxels, or depth, height and width")
    for key, count in {
        "schedule.steps": schedule.steps,
        "schedule.batch": schedule.batch,
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
        "network.blocks": 1 if network.blocks is None else network.blocks,
        "network.stages": 1 if network.stages is None else network.stages,
        "network.every": network.every,
        "schedule.accumulate": schedule.accumulate,
        "validation_slices": config.validation_slices,
        "keep": config.keep,
    }.items():
        if count < 1:
            refuse(key, count, "at least 1")
    for key, rate in {
        "schedule.learning_rate": schedule.learning_rate,
        "schedule.temperature_start": schedule.temperature_start,
        "schedule.temperature_end": schedule.temperature_end,
        "schedule.temperature_until": schedule.temperature_until,
        "schedule.clip": schedule.clip,
    }.items():
        if not rate > 0:
            refuse(key, rate, "a positive number")
    for key, weight in {
        "seed": config.seed,
        "workers": config.workers,
        "max_bad_steps": config.max_bad_steps,
        "schedule.warmup": schedule.warmup,
        "schedule.logits_factor": schedule.logits_factor,
        "schedule.pooled": schedule.pooled,
        "bias": config.bias,
        "shift": config.shift,
        "objective.lambda1": objective.lambda1,
        "objective.lambda2": objective.lambda2,
    }.items():
        if not 0 <= weight < math.inf:
            refuse(key, weight, "a number, at least 0")
    for key, share in {
        "schedule.draw_until": schedule.draw_until,
        "schedule.decay_from": schedule.decay_from,
        "network.explore": network.explore,
        "foreground": config.foreground,
    }.items():
        if not 0 <= share <= 1:
            refuse(key, share, "a share, 0 to 1")
    for key, value, choices in (
        ("graph", config.graph, GRAPHS),
        ("precision", config.precision, PRECISIONS),
        ("gpu_check", config.gpu_check, ("on", "off")),
        ("schedule.decay", schedule.decay, DECAYS),
        ("network.name", network.name, NETWORKS),
        ("network.method", network.method, METHODS),
        ("network.noise_on", network.noise_on, ("log_p", "p")),
    ):
        if value not in choices:
            refuse(key, value, f"one of {', '.join(choices)}")
    if network.norm not in (*NORMS, None):
        refuse("network.norm", network.norm, f"one of {', '.join(NORMS)}, or null")
    if config.seed >= 2**63:
        refuse("seed", config.seed, "less than 2**63")
    if config.patch is not None and config.network.norm is not None and math.prod(config.patch) * schedule.batch == 1:
        refuse("patch", config.patch, "more than one voxel in a batch: one alone can't be normalised")
    norm = default_norm(network.name) if network.norm == "auto" else network.norm
    if config.patch is not None and norm == "instance" and math.prod(config.patch) == 1:
        refuse("patch", config.patch, "more than one voxel: an instance norm can't normalise one alone (network.norm)")
    if config.spatial_dims == 3 and not reads_volumes(network.name):
        refuse("patch", config.patch, f"null, or height and width, because network.name {network.name} reads slices")
    if schedule.patience is not None and schedule.patience < 1:
        refuse("schedule.patience", schedule.patience, "null, or at least 1")
    if config.folds is not None and config.folds < 2:
        refuse("folds", config.folds, "null, or at least 2")
    if config.fold is not None and not 0 <= config.fold < (config.folds or 0):
        refuse("fold", config.fold, "null, or a number below folds" if config.folds else "null, because folds is")
    if not 0 <= network.dropout < 1:
        refuse("network.dropout", network.dropout, "a probability, 0 to less than 1")
    if network.estimator == "none":
        refuse("network.estimator", "none", "an estimator that learns p (for a constant p: network.method constant_p)")
    widths = network.width if isinstance(network.width, list) else [network.width or 1]
    if min(widths, default=0) < 1 or network.width == 0:
        refuse("network.width", network.width, "numbers of channels, each at least 1")
    if (network.method == "retrain") != (network.grouping is not None):
        expected = "the folder of a run" if network.grouping is None else "null, or network.method retrain"
        refuse("network.grouping", network.grouping, expected)
    if config.transfer.run is None and (config.transfer.freeze or config.transfer.tasks is not None):
        refuse("transfer.run", None, "the folder of a run, because transfer.tasks or transfer.freeze is set")
    if schedule.temperature_end > schedule.temperature_start:
        refuse("schedule.temperature_end", schedule.temperature_end, "at most schedule.temperature_start")


def _check_examples(config: TrainConfig) -> None:
    """Raise InputError for tasks that can't be, and for options of slices where the examples are images, or the other
    way round."""
    tasks = read_tasks(config.tasks)
    images, network = of_images(tasks), NETWORKS.get(config.network.name)
    if network is not None and network.per_image != images:
        what = "a value per image" if network.per_image else "a value per voxel"
        fitting = ", ".join(name for name, one in NETWORKS.items() if one.per_image == images)
        first = next(iter(tasks.values()))
        raise InputError(
            f"network.name={config.network.name!r}: it gives {what}, expected {fitting} for {first.name} ({first.kind})"
        )
    for key, value, for_images in (
        ("patch", config.patch, False),
        ("folds", config.folds, False),
        ("flip", config.flip, True),
        ("shift", config.shift, True),
    ):
        if value and images != for_images:
            kind = "images" if for_images else "volumes"
            raise InputError(f"{key}={value!r}: it is for cohorts of {kind}, expected none for these tasks")
    for name, task in tasks.items():
        if config.flip and not getattr(task, "flips", False):
            raise InputError(f"flip=True: a mirrored image has another {name} (tasks.{name}.flips), expected false")
