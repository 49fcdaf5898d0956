"""The audit of the toy run: its tables and page, with models or without, and the way of a decision back into the split."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fivefold.contract.files import read_json
from toy_data import MODEL, call_jobs, copy_run, failure, run_stage, write_csv

OUTPUTS = ["audit.html", "audit.json", "labels.csv", "odd_images.csv", "stage.json"]
MISLABELLED = {f"{number}.png" for number in (9, 19, 29)}
"""The toy images that look like the next class."""


def read(folder: Path, name: str = "labels.csv") -> pd.DataFrame:
    return pd.read_csv(folder / "output" / name, keep_default_na=False)


@pytest.fixture(scope="module")
def audited(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    assert run_stage(toy_run, "audit", folder, MODEL=toy_run) == 0
    return folder


def test_labels_that_the_fold_models_contradict_are_listed_first(audited):
    assert sorted(path.name for path in (audited / "output").iterdir()) == OUTPUTS
    labels = read(audited)
    counts = read_json(audited / "output" / "audit.json")
    flagged = labels[labels["issue"] == 1]
    assert counts["suspects"] == len(flagged) > 0
    wrong = labels["id"].map(lambda name: Path(name).name in MISLABELLED)
    assert wrong[: len(flagged)].mean() >= 0.6
    assert (labels["decision"] == "").all()
    assert (labels["label"] == labels["suggested"]).all()
    assert (labels["agreement"][: len(flagged)] > 0).all()
    assert counts["not_examined"] == [text for text in counts["not_examined"] if "neighbours" in text] != []


def test_the_page_holds_every_suspect_and_escapes_names(audited):
    page = (audited / "output" / "audit.html").read_text(encoding="utf-8")
    assert "<script src" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<b>" not in page, "as in the name of a class"
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    labels = read(audited)
    for name in ("id", "given", "suggested", "label", "decision"):
        assert [suspect[name] for suspect in data["suspects"]] == labels[name].tolist()
    assert all(data["images"][suspect["images"][0]].startswith("data:image/png") for suspect in data["suspects"])


def test_decisions_survive_a_second_audit_and_change_the_split(toy_run, audited, tmp_path):
    folder = copy_run(audited, tmp_path / "audit")
    labels = read(folder)
    first, second = labels["id"][:2]
    labels.loc[0, "decision"], labels.loc[1, "decision"] = "relabel", "drop"
    kept = labels[~labels.index.isin([1])]
    gone = labels.loc[[1]].assign(id=next(row for row in read_split(toy_run) if row not in set(labels["id"])))
    pd.concat([kept, labels.loc[[1]], gone]).to_csv(folder / "output" / "labels.csv", index=False)
    assert run_stage(toy_run, "audit", folder, "audit.images=false", MODEL=toy_run) == 0
    again = read(folder).set_index("id")
    assert again.loc[[first, second, gone["id"].iloc[0]], "decision"].tolist() == ["relabel", "drop", "drop"]
    assert (again["decision"] != "").sum() == 3

    file = folder / "output" / "labels.csv"
    again.reset_index()[["id", "decision", "label"]].to_csv(file, index=False)  # as the page gives it
    assert run_stage(toy_run, "audit", folder, "audit.images=false", "seed=1", MODEL=toy_run) == 0
    assert read(folder).set_index("id")["decision"].drop(again.index, errors="ignore").eq("").all()
    assert (read(folder)["decision"] != "").sum() == 3
    settings = ("split.folds=3", "split.holdout=0.1", f"data.labels={file}")
    assert run_stage(toy_run, "split", tmp_path / "split", *settings) == 0
    corrected = read_json(tmp_path / "split" / "output" / "split_summary.json")["corrections"]["labels"]
    assert (corrected["relabelled"], corrected["dropped"]) == (1, 2)


def read_split(root: Path) -> list[str]:
    return pd.read_parquet(root / "split" / "output" / "folds.parquet").query("part == 'train'")["id"].tolist()


def test_features_of_given_weights_judge_labels_without_any_model(toy_run, tmp_path):
    weights = toy_run / "fold-0" / "model" / "model.safetensors"
    settings = [*MODEL, f"model.weights={weights}", "train.batch_size=8", "audit.images=false"]
    assert run_stage(toy_run, "audit", tmp_path, *settings) == 0
    labels = read(tmp_path)
    assert read_json(tmp_path / "output" / "audit.json")["not_examined"] == []
    assert labels["neighbours_given"].between(0, 1).all()
    flagged = labels[labels["issue"] == 1]
    assert flagged["id"].map(lambda name: Path(name).name in MISLABELLED).mean() >= 0.6
    assert flagged["neighbours_suggested"].astype(float).mean() > flagged["neighbours_given"].astype(float).mean()


def test_an_audit_needs_only_the_split_of_its_run(toy_run, tmp_path):
    variables = {"SM_CHANNEL_TRAIN": toy_run / "train"}
    for stage, *arguments in (["split", "split.folds=3"], ["audit", "audit.images=false"]):
        ended = call_jobs(stage, f"RUNS={tmp_path}", "RUN=look", *arguments, **variables)
        assert ended.returncode == 0, ended.stderr
    assert len(read_json(tmp_path / "look" / "audit" / "output" / "audit.json")["not_examined"]) == 2


def test_without_models_and_weights_the_images_are_examined_and_the_rest_is_named(toy_run, tmp_path):
    assert run_stage(toy_run, "audit", tmp_path) == 0
    counts = read_json(tmp_path / "output" / "audit.json")
    assert len(counts["not_examined"]) == 2
    assert (counts["suspects"], len(read(tmp_path))) == (0, 0)
    assert np.unique(read(tmp_path, "odd_images.csv")["problem"]).tolist() == sorted(counts["odd_images"])


@pytest.mark.parametrize(("text", "code"), [("id,decision\na,keep\n", 65), ("\n", 65)])
def test_a_labels_file_that_cannot_be_kept_stops_the_audit_and_stays(toy_run, tmp_path, text, code):
    file = write_csv(tmp_path / "output" / "labels.csv", [])
    file.write_text(text)
    assert run_stage(toy_run, "audit", tmp_path, "audit.images=false") == code
    assert "labels.csv" in failure(tmp_path)
    assert file.read_text() == text


def test_models_of_another_split_are_refused(toy_run, tmp_path):
    assert run_stage(toy_run, "split", tmp_path / "other", "split.folds=3", "split.seed=7") == 0
    channels = {"MODEL": toy_run, "FOLDS": tmp_path / "other" / "output"}
    assert run_stage(toy_run, "audit", tmp_path / "out", **channels) == 65
    assert not (tmp_path / "out" / "output" / "labels.csv").exists()
