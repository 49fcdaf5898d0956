import pytest

from fivefold.errors import SettingsError
from fivefold.lookup import choose


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cosin", "; did you mean 'cosine'?"), ("COSINE", "; did you mean 'cosine'?"), ("xyz", ""), ("", "")],
)
def test_choose_rejects_an_unknown_name_and_suggests_a_similar_one(name: str, hint: str):
    with pytest.raises(SettingsError) as caught:
        choose({"cosine": 1, "step": 2, "plateau": 3}, "schedule", name)
    assert str(caught.value) == f"unknown schedule {name!r}{hint}; known: cosine, plateau, step"
    assert caught.value.exit_code == 64
