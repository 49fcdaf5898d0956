import unicodedata

import numpy as np
import pytest

from fivefold.data.class_aliases import ClassAliases
from fivefold.data.readers.eval_images import SampleSubmission
from fivefold.data.readers.training_rows import make_rows
from fivefold.errors import DataError
from fivefold.inference.submission import write_submission
from fivefold.predictions import Predictions

ALIASES = (("K5_3세대", "더_뉴_K5"),)
NAMES = ("718", "K5_3세대", "더_뉴_K5")
ROWS = make_rows(["a", "b", "c"], NAMES[::-1], "rows", "test")


def make_table(classes: tuple[str, ...], *rows: list[float]) -> Predictions:
    ids = np.array([f"TEST_{n}" for n in range(len(rows))], dtype=object)
    return Predictions(ids, np.full(len(rows), -1, np.int16), "s", classes, np.log(np.array(rows)).astype(np.float32))


def submit(tmp_path, scores: Predictions, aliases: ClassAliases, columns: tuple[str, ...] = NAMES) -> np.ndarray:
    write_submission(tmp_path / "s.csv", scores, SampleSubmission("ID", tuple(columns), list(scores.ids)), aliases)
    lines = (tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(["ID", *columns])
    return np.array([line.split(",")[1:] for line in lines[1:]], dtype=float)


@pytest.mark.parametrize(
    ("policy", "classes", "row", "columns", "expected"),
    [
        ("none", NAMES, [0.5, 0.3, 0.2], NAMES, [0.5, 0.3, 0.2]),
        ("sum", NAMES, [0.5, 0.3, 0.2], NAMES, [1 / 3, 1 / 3, 1 / 3]),  # .5, .3 + .2, .3 + .2 make 1.5 in all
        ("sum", NAMES, [0.2, 0.7, 0.1], ("더_뉴_K5", "718", "K5_3세대"), [0.8 / 1.8, 0.2 / 1.8, 0.8 / 1.8]),
        ("merge", NAMES[:2], [0.2, 0.8], NAMES, [0.2, 0.4, 0.4]),
    ],
)
def test_submission_probabilities_follow_the_policy(tmp_path, policy, classes, row, columns, expected):
    shares = submit(tmp_path, make_table(classes, row), ClassAliases(ALIASES, policy), columns)
    np.testing.assert_allclose(shares, [expected], atol=1e-6)


def test_sum_policy_labels_use_the_more_probable_alias_of_the_best_class(tmp_path):
    scores, sums = make_table(NAMES, [0.4, 0.25, 0.35], [0.4, 0.35, 0.25]), ClassAliases(ALIASES, "sum")
    for policy, expected in ((sums, ["더_뉴_K5", "K5_3세대"]), (ClassAliases(), ["718", "718"])):
        write_submission(tmp_path / "l.csv", scores, SampleSubmission("ID", ("target",), list(scores.ids)), policy)
        lines = (tmp_path / "l.csv").read_text(encoding="utf-8").splitlines()[1:]
        assert [line.split(",")[1] for line in lines] == expected


def test_merge_replaces_aliases_with_the_first_name_in_rows_and_tables():
    aliases = ClassAliases((tuple(unicodedata.normalize("NFD", name) for name in ALIASES[0]),), "merge")
    merged = aliases.merge_rows(ROWS)
    assert (merged.classes, merged.codes.tolist()) == (("718", "K5_3세대"), [1, 1, 0])
    merged_table = aliases.merge_table(make_table(NAMES, [0.5, 0.3, 0.2]))
    assert merged_table.classes == ("718", "K5_3세대")
    np.testing.assert_allclose(np.exp(merged_table.log_probs), [[0.5, 0.5]], atol=1e-6)
    assert ClassAliases(ALIASES, "sum").merge_rows(ROWS) is ROWS


def test_unusable_aliases_are_rejected_by_name():
    with pytest.raises(DataError, match=r"'더_누_K5'.* did you mean '더_뉴_K5'"):
        ClassAliases((("K5_3세대", "더_누_K5"),), "merge").merge_rows(ROWS)
    with pytest.raises(DataError, match="single class"):
        ClassAliases((NAMES,), "merge").merge_rows(ROWS)
    with pytest.raises(DataError, match=r"models .*'더_뉴_K5'.*split and train with merge"):
        ClassAliases(ALIASES, "merge").check_model(NAMES)
    with pytest.raises(DataError, match="class of the models"):
        ClassAliases(ALIASES, "sum").check_model(("718", "K5_3세대"))


def test_sample_with_a_missing_alias_or_an_unknown_class_is_rejected(tmp_path):
    aliases, scores = ClassAliases(ALIASES, "merge"), make_table(NAMES[:2], [0.2, 0.8])
    with pytest.raises(DataError, match=r"classes: '더_뉴_K5' without a column;"):
        submit(tmp_path, scores, aliases, ("718", "K5_3세대"))
    with pytest.raises(DataError, match=r"classes: '911' unknown to the models;"):
        submit(tmp_path, scores, aliases, (*NAMES, "911"))
    assert not (tmp_path / "s.csv").exists()
