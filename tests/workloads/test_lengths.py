"""Length models against their closed forms."""

import numpy as np
import pytest

from flexirl.errors import UserError
from flexirl.workloads.lengths import Empirical, Fixed, Images, Independent, Lognormal, Uniform
from flexirl.workloads.trace import check, empty_rows


def filled(model, count=50_000, seed=0):
    rows = empty_rows(count)
    model.fill(rows, np.random.default_rng(seed))
    check(rows, "test")
    return rows


def test_lognormal_quantiles_and_mean():
    tokens = Lognormal(mu=(5.0,), sigma=(0.8,), max=10**6).draw(200_000, np.random.default_rng(0))
    assert np.median(tokens) == pytest.approx(np.exp(5.0), rel=0.02)
    assert tokens.mean() == pytest.approx(np.exp(5.0 + 0.32), rel=0.02)


def test_mixture_weights_and_clipping():
    model = Lognormal(mu=(2.0, 9.0), sigma=(0.1, 0.1), weights=(3.0, 1.0), min=5, max=8000)
    tokens = model.draw(100_000, np.random.default_rng(0))
    assert (tokens > 100).mean() == pytest.approx(0.25, abs=0.01)
    assert tokens.min() >= 5 and tokens.max() == 8000


def test_uniform_and_fixed():
    tokens = Uniform(3, 6).draw(40_000, np.random.default_rng(0))
    assert np.bincount(tokens)[3:] / 40_000 == pytest.approx([0.25] * 4, abs=0.01)
    assert (Fixed(7).draw(3, np.random.default_rng(0)) == 7).all()


def test_max_tokens_says_nothing_about_the_output():
    rows = filled(Independent(Fixed(10), Uniform(1, 100)))
    assert (rows["max_tokens"] == 100).all()


def test_images_are_part_of_the_prompt():
    rows = filled(Images(Fixed(50), Fixed(5), Uniform(10, 20), num_images=(0.2, 0.5, 0.3)))
    assert np.bincount(rows["num_images"]) / len(rows) == pytest.approx([0.2, 0.5, 0.3], abs=0.01)
    assert (rows["prompt_tokens"] == 50 + rows["image_tokens"]).all()
    assert rows["image_tokens"].mean() == pytest.approx(1.1 * 15, rel=0.02)
    assert (rows["image_tokens"][rows["num_images"] == 0] == 0).all()


def test_empirical_keeps_pairs_together_and_uses_weights(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens,prob\n10,1,0.75\n20,2,0.25\n30,3,0\n")
    rows = filled(Empirical(str(path)))
    assert set(zip(rows["prompt_tokens"].tolist(), rows["output_tokens"].tolist(), strict=True)) == {(10, 1), (20, 2)}
    assert (rows["prompt_tokens"] == 10).mean() == pytest.approx(0.75, abs=0.01)
    assert (rows["max_tokens"] == 3).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0),
        lambda: Uniform(5, 4),
        lambda: Lognormal(mu=(1.0, 2.0), sigma=(1.0,)),
        lambda: Lognormal(mu=(1.0,), sigma=(-1.0,)),
        lambda: Images(Fixed(1), Fixed(1), Fixed(1), num_images=()),
    ],
)
def test_bad_parameters(make):
    with pytest.raises(UserError, match="out of range"):
        make()
