"""What `make systems` relies on: reproducible data, and a report of each missing or wrong file."""

import hashlib
from pathlib import Path

import pytest

import toy_layouts
from expected_files import REST, Expected, problems

DISTINCT_IMAGES = {
    toy_layouts.draw_cars: 32,
    toy_layouts.draw_sketches: 32,
    toy_layouts.draw_products: 120,
    toy_layouts.draw_faces: 84,
}


@pytest.mark.parametrize("draw", DISTINCT_IMAGES)
def test_toy_layouts_are_reproducible(draw, tmp_path: Path) -> None:
    contents = []
    for root in (tmp_path / "a" / "systems", tmp_path / "b" / "systems"):
        draw(root)
        files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".zip")
        contents.append({path.relative_to(root): hashlib.sha1(path.read_bytes()).hexdigest() for path in files})
    assert contents[0] == contents[1]
    digests = [contents[0][path] for path in contents[0] if path.suffix.lower() in (".jpg", ".jpeg")]
    assert len(set(digests)) >= DISTINCT_IMAGES[draw]


def test_problems_reports_missing_and_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffID,x,y\n1,2,3\n", encoding="utf-8")
    (tmp_path / "b.out").write_text('a log line\n{"accuracy": 0.5, "n": 3}\n')
    for expected, problem in (
        (Expected("a.csv", ("ID", "x", "y"), 1), ""),
        (Expected("?.csv", ("ID", REST), 1, least=10), ""),
        (Expected("b.out", ("accuracy", "n"), 1), ""),
        (Expected("c.csv"), "missing"),
        (Expected("*.*"), "2 files"),
        (Expected("a.csv", ("ID", "y", "x")), "columns ID, x, y; wanted ID, y, x"),
        (Expected("a.csv", rows=2), "1 rows; wanted 2"),
        (Expected("a.csv", least=1000), "16 bytes, at least 1000 are wanted"),
    ):
        assert problems(tmp_path, [expected]) == ([f"{expected.path}: {problem}"] if problem else [])
