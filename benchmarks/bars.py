"""What is to be reached: every row of the table of speed, with its bar. Loads nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """`what` is measured, in words; at least (or, with `most`, at most) `limit`, in `unit` ("" for a ratio)."""

    what: str
    limit: float | None
    unit: str = ""
    most: bool = False

    def verdict(self, figure: float) -> str:
        """`reached` or `missed`; "" where there is no limit."""
        if self.limit is None:
            return ""
        return "reached" if (figure <= self.limit if self.most else figure >= self.limit) else "missed"

    def number(self, value: float) -> str:
        """A figure of this row without its unit."""
        if self.unit:
            return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"

    def shown(self, value: float) -> str:
        """A figure of this row as the tables show it."""
        return f"{self.number(value)} {self.unit}".strip()

    @property
    def wanted(self) -> str:
        """The bar itself: `≥ 0.97`, `≤ 4 s`, or "" for none."""
        if self.limit is None:
            return ""
        return f"{'≤' if self.most else '≥'} {self.limit:,g} {self.unit}".strip()


BARS: dict[str, dict[str, Bar]] = {
    "train": {
        name: Bar(f"`train-fold` ÷ the model alone on a resident batch, {text}", 0.97)
        for name, text in (
            ("resnet18@64", "ResNet-18 at 64 px"),
            ("resnet18@224", "ResNet-18 at 224 px"),
            ("efficientnet_b0@224", "EfficientNet-B0 at 224 px"),
            ("convnext_tiny@224", "ConvNeXt-Tiny at 224 px"),
        )
    },
    "peer": {
        "resnet18@64": Bar("`train-fold` ÷ timm's loop at its best, ResNet-18 at 64 px", 1.05),
        "resnet18@224": Bar("`train-fold` ÷ timm's loop at its best, ResNet-18 at 224 px", 1.05),
        "efficientnet_b0@224": Bar("`train-fold` ÷ timm's loop at its best, EfficientNet-B0 at 224 px", 1.25),
        "convnext_tiny@224": Bar("`train-fold` ÷ timm's loop at its best, ConvNeXt-Tiny at 224 px", 1.25),
    },
    "folds": {
        "resnet18@64": Bar("5 folds × 5 epochs and their ensemble: timm's seconds ÷ ours, ResNet-18 at 64 px", 1.5),
    },
    "step": {
        "all_four": Bar("a step with mixup + R-Drop + SAM + EMA ÷ a plain step, ConvNeXt-Tiny", 3.0, most=True),
        "stochastic_depth": Bar("the same at stochastic depth .1 ÷ the cheapest exact form by hand", 1.05, most=True),
        "curve": Bar("its loss curve: farthest from the straightforward version's, share of the loss", 0.01, most=True),
    },
    "ensemble": {
        "resnet18@224": Bar("`ensemble` of 5 models × 3 views ÷ the models alone on resident batches", 0.95),
    },
    "loader": {
        "loader": Bar("cached images to 224 px: crop, resize, flip; one core", 4000, "images/s"),
        "of_torchvision": Bar("the same ÷ torchvision v2 on the same pixels", None),
        "normalise": Bar("normalising such a batch, one core", None, "images/s"),
    },
    "tables": {
        "split": Bar("`split` of a CSV of 1 M rows", 4, "s", most=True),
        "split_memory": Bar("its peak of memory", 600, "MB", most=True),
        "ensemble": Bar("`ensemble` of 5 tables of 100,000 rows × 100 classes", 60, "s", most=True),
        "ensemble_memory": Bar("its peak of memory", 2000, "MB", most=True),
    },
    "start": {
        "small": Bar("process start to the end of the first training step, small network", 3.5, "s", most=True),
        "timm": Bar("the same, a timm model", 4.5, "s", most=True),
        "timm_probed": Bar("the same where its precision is probed: once a run", None, "s"),
        "help": Bar("`python -m jobs --help`", 0.5, "s", most=True),
        "dry_run": Bar("`submit --dry-run`", 0.5, "s", most=True),
    },
    "gpu": {
        "convnext_tiny@224": Bar("on a GPU: `train-fold` ÷ the model alone, ConvNeXt-Tiny", 0.97),
        "efficientnet_b5@456": Bar("on a GPU: `train-fold` ÷ the model alone, EfficientNet-B5", 0.97),
        "convnext_tiny@224 peer": Bar("on a GPU: `train-fold` ÷ timm's loop at its best, ConvNeXt-Tiny", 1.1),
        "efficientnet_b5@456 peer": Bar("on a GPU: `train-fold` ÷ timm's loop at its best, EfficientNet-B5", 1.1),
    },
}
