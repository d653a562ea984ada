import pytest

from tailwise.demo.run import run
from tailwise.errors import UserError
from tailwise.progress import silent


def test_head_clusters_shrink_and_tail_clusters_grow(tmp_path):
    result = run(tmp_path / "demo", 1200, silent)
    pool, drawn, picked = (
        sum(values) for values in zip(*((r.samples, r.epochs[0], r.subset) for r in result.rows), strict=True)
    )
    assert (pool, drawn, picked) == (1200, 600, result.subset) == (1200, 600, 332)
    head, tail = result.rows[0], result.rows[-1]
    assert head.epochs[0] / drawn < 0.8 * head.samples / pool
    assert tail.epochs[0] / drawn > 1.2 * tail.samples / pool
    assert head.subset / picked < head.samples / pool
    assert tail.subset / picked > tail.samples / pool
    assert 600 < result.unique[1] < result.unique[2] <= 1200
    assert run(tmp_path / "demo", 1200, silent) == result  # all of it is there already
    with pytest.raises(UserError, match="a demo of 1,200 images, not 600"):
        run(tmp_path / "demo", 600, silent)


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="exists and is no demo"):
        run(tmp_path, 600, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
