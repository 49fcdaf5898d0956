"""The sections that say how a network is trained: `[augment]` and `[train]`. `recipe.py` is the door to them."""

from typing import Literal

from pydantic import Field

from fivefold.sections import Section, Spec


class Augment(Section):
    train: list[Spec] = Field(
        [{"name": "random_resized_crop", "scale": [0.7, 1.0]}, "horizontal_flip"],
        description="transforms of a training image, in order",
    )
    eval: list[Spec] = Field(["resize"], description="transforms of an image that is predicted, in order")
    mix: str = Field("none", description="mixing of a batch: none, mixup or cutmix")
    mix_alpha: float = Field(1.0, gt=0, description="lambda ~ Beta(alpha, alpha)")
    mix_p: float = Field(1.0, ge=0, le=1, description="share of batches that are mixed")
    mix_off_epochs: int = Field(0, ge=0, description="last epochs without mixing, in which images are as they will be")


class Train(Section):
    epochs: int = Field(30, ge=1, description="passes over the training rows")
    batch_size: int = Field(32, ge=1, description="images a step")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are summed before a step")
    loss: Spec = Field(
        "cross_entropy",
        description='cross_entropy, label_smoothing, focal, binary_focal, bce or f1; {name="focal",alpha=.5,gamma=2}',
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: a row counts by 1 / rows of its class"
    )
    sampler: str = Field("shuffle", description="shuffle: every row once an epoch; balanced: classes in equal parts")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a target spread over all classes")
    rdrop_alpha: float = Field(
        0.0, ge=0, description="weight of R-Drop's divergence of two passes; 0: one pass, no R-Drop"
    )
    update: str = Field("plain", description="a step: plain, or sam (two gradients)")
    sam_rho: float = Field(0.05, ge=0, description="sam: how far up the gradient the second one is taken")
    optimizer: str = Field(
        "adamw", description="adamw, adam, sgd (Nesterov) or muon (AdamW for norms, biases, first and last layer)"
    )
    lr: float = Field(1e-3, gt=0, description="largest learning rate")
    backbone_lr: float = Field(1.0, gt=0, le=1, description="the backbone's share of the learning rate")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the learning rate from each layer of the backbone to the one before (timm/… alone)",
    )
    freeze_epochs: int = Field(
        0, ge=0, description="first epochs in which the backbone and its BatchNorm statistics stay as they are"
    )
    weight_decay: float = Field(1e-4, ge=0, description="not applied to norms and biases")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and muon")
    schedule: str = Field("cosine", description="constant, cosine or step")
    warmup_epochs: float = Field(0.0, ge=0, description="linear rise of the learning rate at the start")
    step_epochs: int = Field(10, ge=1, description="step: epochs between two drops")
    gamma: float = Field(0.5, gt=0, lt=1, description="step: factor of a drop")
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of the averaged weights; 0: no averaging")
    patience: int = Field(0, ge=0, description="epochs without improvement before the end; 0: never")
    validate_every: int = Field(
        1, ge=1, description="epochs from one validation to the next; the last epoch is always validated"
    )
    monitor: str = Field("logloss", description="what chooses the best epoch: logloss, loss, acc or f1_macro")
    precision: str = Field(
        "auto",
        description="fp32, bf16, bf16_grouped_fp32 (in fp32 the grouped convolutions that bf16 slows), fp16, or auto: the fastest here by a "
        "short probe",
    )
    channels_last: bool = Field(True, description="NHWC memory, faster on most machines")
    cpu_convs: bool = Field(True, description="on CPUs: convolutions with quicker gradients than torch's own")
    compile: bool = Field(False, description="on CUDA: torch.compile the backbone; slow to start, then faster")
    keep_raw: bool = Field(False, description="with ema_decay: also keep the best unaveraged weights (validates twice)")
    deterministic: bool = Field(
        True,
        description="on CUDA: kernels that give the same bits each time, where there are any; false: the fastest ones",
    )
    device: str = Field("auto", description="auto, cuda, mps or cpu")
    workers: int = Field(-1, ge=-1, description="loader processes; -1: chosen for the machine")
    keep_in_memory: bool = Field(True, description="keep decoded images in memory while they fit in 1 GiB")
    checkpoint_minutes: float = Field(
        10.0,
        ge=0,
        description="minutes between checkpoints within an epoch; one follows each epoch anyway; 0: none within",
    )
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints within an epoch; 0: by time alone")
    trackers: list[str] = Field(["tensorboard"], description="who keeps the run's figures: tensorboard, wandb, mlflow")
    project: str = Field("fivefold", min_length=1, description="of wandb, and the experiment of mlflow")
