import pytest

from fivefold.errors import SettingsError
from fivefold.lookup import choose

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
def test_choose_rejects_an_unknown_name_and_suggests_a_similar_one(name: str, message: str):
    with pytest.raises(SettingsError) as caught:
        choose(TABLE, "schedule", name)
    assert str(caught.value) == message
    assert caught.value.exit_code == 64
