"""timm's training loop as a user runs it: `python -m benchmarks.timm_train JSON`.

timm's training script is not part of its package, so this loop calls timm's public parts in the order of the script.
It omits parts that cost time and are not needed: the summary CSV, EMA, mixup, checkpoints within a run. If the script has a choice,
this loop takes the faster one: it fetches the loss once in LOG_INTERVAL steps. With `models` it predicts with the mean of trained
models instead.
"""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from timm import create_model
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import accuracy
from torch import Tensor, nn

from benchmarks.processes import Timer, wait_for_turn

LOG_INTERVAL = 50
"""The script's default."""


def main(request: dict[str, Any]) -> dict[str, Any]:
    args = SimpleNamespace(**request)
    if args.device == "cuda":  # as in the script's main
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(42)  # as in utils.random_seed
    return predict(args) if hasattr(args, "models") else train(args)


def train(args: SimpleNamespace) -> dict[str, Any]:
    """Train; return the passes of all epochs. Write the last weights to `save` if it is set."""
    data = Path(args.data)
    model = build(args, len(list((data / "train").iterdir())))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
    training, validation = loader(args, model, data, "train"), loader(args, model, data, "validation")
    scheduler, _ = create_scheduler_v2(  # as --sched cosine, with one step per update
        optimizer, "cosine", num_epochs=args.epochs, step_on_epochs=False, updates_per_epoch=len(training)
    )
    passes = []
    for epoch in range(args.epochs):
        wait_for_turn()
        timer = Timer()
        images = train_one_epoch(epoch, model, training, optimizer, scheduler, args)
        passes.append(timer.stop(images))
        validate(model, validation, args)  # the script also validates after each epoch
    if hasattr(args, "save"):
        torch.save(model.state_dict(), args.save)  # as CheckpointSaver does
    return {"passes": passes, "precision": args.precision}


def build(args: SimpleNamespace, classes: int) -> nn.Module:
    """Return the model of create_model on the device, in the memory format of --channels-last if `channels_last` is set."""
    model = create_model(args.name, pretrained=False, num_classes=classes).to(args.device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def autocast(args: SimpleNamespace) -> AbstractContextManager:
    """Return the context of --amp --amp-dtype bfloat16, which does not scale the loss, or a context without effect."""
    return torch.autocast(args.device, dtype=torch.bfloat16) if args.precision == "bf16" else nullcontext()


def loader(args: SimpleNamespace, model: nn.Module, root: Path, split: str) -> Any:
    """Return the loader of create_dataset and create_loader with the script's prefetcher: uint8 batches, normalised on the device."""
    training = split == "train"
    config = resolve_data_config({"input_size": (3, args.size, args.size)}, model=model)
    return create_loader(
        create_dataset("", root=str(root), split=split, is_training=training),
        input_size=config["input_size"],
        batch_size=args.batch if training else 2 * args.batch,
        is_training=training,
        scale=tuple(args.scale),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
        crop_pct=1.0,
        mean=config["mean"],
        std=config["std"],
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=args.device == "cuda",
        device=torch.device(args.device),
        use_prefetcher=True,
    )


def train_one_epoch(
    epoch: int, model: nn.Module, batches: Any, optimizer: Any, scheduler: Any, args: SimpleNamespace
) -> int:
    """Train one epoch, as the script's function of this name; return the number of images."""
    criterion, images = nn.CrossEntropyLoss(), 0
    model.train()
    optimizer.zero_grad()
    for number, (inputs, target) in enumerate(batches):
        with autocast(args):
            loss = criterion(model(arrange(inputs, args)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        images += len(inputs)
        if number % LOG_INTERVAL == 0 or number + 1 == len(batches):
            loss.item()
        scheduler.step_update(num_updates=epoch * len(batches) + number + 1)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return images


@torch.inference_mode()
def validate(model: nn.Module, batches: Any, args: SimpleNamespace) -> None:
    """Validate, as the script's function of this name."""
    model.eval()
    for images, target in batches:
        with autocast(args):
            output = model(arrange(images, args))
        accuracy(output.float(), target)[0].item()


@torch.inference_mode()
def predict(args: SimpleNamespace) -> dict[str, Any]:
    """Write the mean probabilities of `models` for the images of `data` to the CSV file `save`."""
    networks = [build(args, args.classes) for _ in args.models]
    for network, path in zip(networks, args.models, strict=True):
        network.load_state_dict(torch.load(path, weights_only=True, map_location=args.device))
        network.eval()
    batches = loader(args, networks[0], Path(args.data), "")
    means = []
    for images, _ in batches:
        with autocast(args):
            logits = [network(arrange(images, args)) for network in networks]
        means.append(torch.stack([each.float().softmax(dim=1) for each in logits]).mean(dim=0).cpu())
    table = pd.DataFrame(torch.cat(means).numpy(), index=batches.dataset.filenames(basename=True))
    table.to_csv(args.save, header=False, float_format="%.6f")
    return {"images": len(table)}


def arrange(images: Tensor, args: SimpleNamespace) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
