"""Corrected labels and proposed groups: how `split` obeys them, and what it refuses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fivefold.contract.files import read_json
from fivefold.data.split.fold_table import FoldTable, read_folds
from toy_data import failure, noise_in, run_stage, write_csv

HEADER = ["id", "decision", "label"]


def split(root: Path, name: str, *arguments: str) -> tuple[FoldTable, dict]:
    assert run_stage(root, "split", name, "split.folds=3", "split.holdout=0.2", *arguments) == 0
    output = root / name / "output"
    return read_folds(output / "folds.parquet", output / "classes.json"), read_json(output / "split_summary.json")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Sixty images of three classes."""
    noise_in(tmp_path / "train", ("ape", "bee", "cat"), 20)
    return tmp_path


def as_frame(table: FoldTable) -> pd.DataFrame:
    return pd.DataFrame({"label": table.labels(), "fold": table.fold, "part": table.part}, index=table.ids.to_pylist())


def test_decisions_change_training_rows_and_neither_folds_nor_holdout(photographs):
    before = as_frame(split(photographs, "before")[0])
    held_out, rest = before[before.part == "holdout"], before[before.part != "holdout"]
    apes = rest[rest.label == "ape"].index
    decided = {
        apes[0]: ("relabel", "bee"),
        apes[1]: ("Drop", ""),
        apes[2]: ("keep", "bee"),
        apes[3]: ("relabel", "ape"),
    }
    decided |= {apes[4]: ("", "bee"), held_out.index[0]: ("drop", ""), held_out.index[1]: ("relabel", "cat")}
    file = write_csv(photographs / "labels.csv", [HEADER, *([name, *words] for name, words in decided.items())])
    table, summary = split(photographs, "after", f"data.labels={file}")
    expected = before.drop(index=apes[1])
    expected.loc[apes[0], "label"] = "bee"
    pd.testing.assert_frame_equal(as_frame(table), expected)
    moved = int(held_out.label.iloc[1] != "cat")
    assert summary["corrections"]["labels"] == {
        "confirmed": 2 + 1 - moved, "relabelled": 1, "dropped": 1, "held_out": 1 + moved, "undecided": 1,
    }  # fmt: skip
    assert len(list((photographs / "train").rglob("*.png"))) == 60


def test_changed_decisions_rerun_the_split(photographs):
    file = write_csv(
        photographs / "train" / "labels.csv",
        [["id", "path", "decision", "label"], ["ape/0.png", "ape/0.png", "drop", ""]],
    )
    assert len(split(photographs, "out", "data.labels=labels.csv")[0]) == 59, (
        "the file in the channel is no table of images"
    )
    write_csv(file, [["id", "decision", "label"], ["ape/0.png", "", ""]])
    assert len(split(photographs, "out", "data.labels=labels.csv")[0]) == 60
    outside = write_csv(photographs / "labels.csv", [HEADER, ["ape/0.png", "drop", ""]])
    for length, decision in ((59, "drop"), (60, "keep")):
        write_csv(outside, [HEADER, ["ape/0.png", decision, ""]])
        assert len(split(photographs, "other", f"data.labels={outside}")[0]) == length


def test_a_class_whose_rows_are_all_dropped_leaves(photographs):
    rows = [[f"ape/{number}.png", "drop", ""] for number in range(20)]
    file = write_csv(photographs / "labels.csv", [HEADER, *rows])
    table, summary = split(photographs, "out", f"data.labels={file}", "split.holdout=0")
    assert (table.classes, len(table)) == (("bee", "cat"), 40)
    assert summary["corrections"]["labels"]["dropped"] == 20


def test_rows_of_a_proposed_group_stay_in_one_fold_with_those_of_given_groups(photographs):
    names = [f"{name}/{number}.png" for name in ("ape", "bee", "cat") for number in range(20)]
    people = [f"p{number // 2}" for number in range(60)]
    rows = [[name, name.split("/")[0], person] for name, person in zip(names, people, strict=True)]
    write_csv(photographs / "train" / "train.csv", [["path", "label", "person"], *rows])
    # a burst of four images joins the people p0, p5 and p10; "p1" is no person here
    burst = [names[index] for index in (1, 10, 20, 21)]
    pair = [names[30], names[50]]
    file = write_csv(
        photographs / "groups.csv",
        [["id", "group"], *([name, "p1"] for name in burst), *([name, "b"] for name in pair)],
    )
    table, summary = split(photographs, "out", "data.group_column=person", f"data.groups={file}")
    frame = as_frame(table).assign(group=table.groups.to_pylist(), person=people)
    for joined in (("p0", "p5", "p10"), ("p15", "p25")):
        together = frame[frame.person.isin(joined)]
        assert len(together.groupby(["fold", "part"])) == together.group.nunique() == 1
    assert frame[~frame.person.isin(["p0", "p5", "p10", "p15", "p25"])].eval("group == person").all()
    assert summary["corrections"]["groups"] == {"groups": 2, "rows": 6}


def test_proposed_groups_alone_are_obeyed(photographs):
    pairs = [[f"{name}/{number}.png", f"{name}{number // 2}"] for name in ("ape", "bee") for number in range(20)]
    file = write_csv(photographs / "groups.csv", [["id", "group"], *pairs])
    frame = as_frame(split(photographs, "out", f"data.groups={file}")[0])
    pairs_of = frame.loc[[name for name, _ in pairs]].assign(pair=[group for _, group in pairs])
    assert (pairs_of.groupby("pair")[["fold", "part"]].nunique() == 1).all(axis=None)
    assert set(np.unique(frame.fold)) == {-1, 0, 1, 2}


@pytest.mark.parametrize(
    ("setting", "rows", "code", "word"),
    [
        ("labels", [HEADER, ["ape/0.png", "drop", ""], ["ape/99.png", "", ""]], 65, "ape/99.png"),
        ("labels", [HEADER, ["ape/0.png", "relabel", "beee"]], 65, "'bee'"),
        ("labels", [HEADER, ["ape/0.png", "relabel", ""]], 65, "''"),
        ("labels", [HEADER, ["ape/0.png", "remove", ""]], 65, "'remove'"),
        ("labels", [HEADER, ["ape/0.png", "keep", ""], ["ape/0.png", "drop", ""]], 65, "keep and drop"),
        ("labels", [["id", "label"], ["ape/0.png", "bee"]], 65, "'decision'"),
        ("labels", [HEADER, *([f"{n}/{i}.png", "drop", ""] for n in ("ape", "bee") for i in range(20))], 65, "1 class"),
        ("labels", None, 66, "labels.csv"),
        ("groups", [["id", "group"], *([f"{n}/{i}.png", "x"] for n in ("ape", "bee", "cat") for i in range(20))], 65, "all 60"),
        ("groups", [["id", "group"], ["ape/0.png", "x"], ["ape/0.png", "y"]], 65, "ape/0.png"),
        ("groups", [["id", "group"], ["ape/0.png", " "]], 65, "group"),
    ],
)  # fmt: skip
def test_invalid_corrections_stop_the_split_with_one_error(photographs, setting, rows, code, word):
    file = photographs / f"{setting}.csv"
    if rows:
        write_csv(file, rows)
    assert run_stage(photographs, "split", "out", f"data.{setting}={file}", "split.folds=3") == code
    assert word in failure(photographs / "out")
    assert not list((photographs / "out" / "output").rglob("*.parquet"))
