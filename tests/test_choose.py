import pytest

from fivefold.choose import choose, did_you_mean
from fivefold.errors import SettingsError

TABLE = {"cosine": 1, "step": 2, "plateau": 3}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cosin", "unknown schedule 'cosin'; did you mean 'cosine'?; known: cosine, plateau, step"),
        ("COSINE", "unknown schedule 'COSINE'; did you mean 'cosine'?; known: cosine, plateau, step"),
        ("xyz", "unknown schedule 'xyz'; known: cosine, plateau, step"),
        ("", "unknown schedule ''; known: cosine, plateau, step"),
    ],
)
def test_an_unknown_name_is_explained(name: str, message: str):
    with pytest.raises(SettingsError) as caught:
        choose(TABLE, "schedule", name)
    assert str(caught.value) == message
    assert caught.value.exit_code == 64


def test_the_nearest_name_keeps_its_own_spelling():
    assert did_you_mean("timm/RESNET18", ["timm/resnet18", "timm/resnet50"]) == "; did you mean 'timm/resnet18'?"
    assert did_you_mean("ground_truth", []) == ""
