"""timm's training loop as a user of it runs it: `python -m benchmarks.timm_loop JSON`.

timm's training script is no part of its package, so the loop is written here of timm's public parts in the script's order;
each is named where it stands. Left out is what costs time and is not asked for: the summary CSV, the EMA, mixup, checkpoints
within a run. Where the script has a choice, the faster one is taken: the loss is fetched once in LOG_INTERVAL steps.
`predict` of the same JSON averages trained models over a folder, each image decoded once for all of them.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm import create_model
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from benchmarks.clocks import Reading
from benchmarks.turns import my_turn

Given = dict[str, Any]
LOG_INTERVAL = 50
"""The script's default."""


def main(arguments: Sequence[str]) -> int:
    given = json.loads(arguments[0])
    if torch.device(given["device"]).type == "cuda":  # the script's main
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(42)  # utils.random_seed
    print(json.dumps(predicted(given) if "models" in given else trained(given)))
    return 0


def trained(given: Given) -> Given:
    """The passes of all epochs, each in its turn and with its seconds; the last weights go to `save` if it is given."""
    device = torch.device(given["device"])
    data = Path(given["data"])
    classes = len(list((data / "train").iterdir()))
    model = build(given, classes, device)
    # create_optimizer_v2 with --opt adamw: its parameter groups, and torch's default kernel for the device
    optimizer = create_optimizer_v2(model, opt="adamw", lr=given["lr"], weight_decay=given["weight_decay"])
    training, validation = loader(given, model, data, "train", device), loader(given, model, data, "validation", device)
    scheduler, _ = create_scheduler_v2(  # --sched cosine, stepped by updates
        optimizer, "cosine", num_epochs=given["epochs"], step_on_epochs=False, updates_per_epoch=len(training)
    )
    passes, best = [], 0.0
    for epoch in range(given["epochs"]):
        my_turn()
        begun = Reading.now()
        images = train_one_epoch(epoch, model, training, optimizer, scheduler, given, device)
        passes.append(begun.since(images))
        best = max(best, validate(model, validation, given, device))  # the script validates after each epoch
    if given.get("save"):
        torch.save(model.state_dict(), given["save"])  # CheckpointSaver
    del training, validation  # its workers end here
    return {"passes": passes, "best": best, "precision": given["precision"]}


def build(given: Given, classes: int, device: torch.device) -> nn.Module:
    """create_model, to the device, in the memory format of --channels-last."""
    model = create_model(given["model"], pretrained=False, num_classes=classes).to(device)
    return model.to(memory_format=torch.channels_last) if given["channels_last"] else model


def autocast(given: Given, device: torch.device) -> AbstractContextManager:
    """--amp --amp-dtype bfloat16, which scales no loss; or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if given["precision"] == "bf16" else nullcontext()


def loader(given: Given, model: nn.Module, root: Path, split: str, device: torch.device) -> Any:
    """create_dataset and create_loader with the script's prefetcher: uint8 collation, normalised on the device."""
    size, training = (3, given["size"], given["size"]), split == "train"
    config = resolve_data_config({"input_size": size}, model=model)
    # `mean`, `std` and `interpolation` of resolve_data_config are the model's; both sides take bilinear and ImageNet's
    dataset = create_dataset("", root=str(root), split=split, is_training=training)
    return create_loader(
        dataset,
        input_size=size,
        batch_size=given["batch"] if training else 2 * given["batch"],
        is_training=training,
        scale=tuple(given["scale"]),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
        crop_pct=1.0,
        mean=config["mean"],
        std=config["std"],
        num_workers=given["workers"],
        persistent_workers=given["workers"] > 0,
        pin_memory=device.type == "cuda",
        device=device,
        use_prefetcher=True,
    )


def train_one_epoch(
    epoch: int, model: nn.Module, batches: Any, optimizer: Any, scheduler: Any, given: Given, device: torch.device
) -> int:
    """The script's function of this name; the images that were trained on."""
    criterion, losses, images = nn.CrossEntropyLoss(), AverageMeter(), 0
    model.train()
    optimizer.zero_grad()
    for number, (given_images, target) in enumerate(batches):
        inputs = contiguous(given_images, given)
        with autocast(given, device):
            loss = criterion(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        images += len(inputs)
        if number % LOG_INTERVAL == 0 or number + 1 == len(batches):
            losses.update(loss.item(), len(inputs))
        scheduler.step_update(num_updates=epoch * len(batches) + number + 1, metric=losses.avg)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images


@torch.inference_mode()
def validate(model: nn.Module, batches: Any, given: Given, device: torch.device) -> float:
    """The script's function of this name; top-1."""
    top = AverageMeter()
    model.eval()
    for images, target in batches:
        with autocast(given, device):
            output = model(contiguous(images, given))
        (first,) = accuracy(output.float(), target, topk=(1,))
        top.update(float(first), len(images))
    return top.avg


@torch.inference_mode()
def predicted(given: Given) -> Given:
    """Mean probabilities of `models` for the images of `data`, written to `save` as CSV; how many there were."""
    device, data = torch.device(given["device"]), Path(given["data"])
    networks = []
    for path in given["models"]:
        weights = torch.load(path, weights_only=True, map_location=device)
        network = build(given, given["classes"], device)
        network.load_state_dict(weights)
        networks.append(network.eval())
    batches = loader(given, networks[0], data, "", device)
    found = [mean(networks, contiguous(images, given), partial(autocast, given, device)) for images, _ in batches]
    table = torch.cat(found).cpu()
    names = batches.dataset.filenames(basename=True)
    rows = (
        f"{name},{','.join(f'{value:.6f}' for value in row)}" for name, row in zip(names, table.tolist(), strict=True)
    )
    Path(given["save"]).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"images": len(table)}


def mean(networks: Sequence[nn.Module], images: Tensor, cast: Any) -> Tensor:
    def each() -> Iterator[Tensor]:
        for network in networks:
            with cast():
                logits = network(images)
            yield logits.float().softmax(dim=1)

    return torch.stack(list(each())).mean(dim=0)


def contiguous(images: Tensor, given: Given) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if given["channels_last"] else images


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
