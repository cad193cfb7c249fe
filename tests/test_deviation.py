"""Deviations against what they are by hand, where the textbook forms lose all their digits, and for strange input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyprune import InputError
from pyprune.evaluation.analysis.deviation import PROBABILITY, VECTOR, probability_deviation, vector_deviation


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def one(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()}


def test_a_vector_by_hand() -> None:
    found = one(vector_deviation(row(3, 0, 0), row(3, 4, 0)))
    assert found == pytest.approx(
        {
            "cosine": 1 - 0.6,
            "angle": math.degrees(math.acos(0.6)),
            "norm": 5 / 3,
            "parallel": 0.0,
            "orthogonal": 4 / 3,
            "estimate": (4 / 3) ** 2 / 2,
        }
    )


def test_along_a_vector_there_is_no_angle() -> None:
    found = one(vector_deviation(row(1, 2, 2), row(-0.5, -1, -1)))
    assert found["cosine"] == pytest.approx(2.0) and found["angle"] == pytest.approx(180.0)
    assert found["parallel"] == pytest.approx(-1.5) and found["orthogonal"] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_angles_keep_their_digits(small: float) -> None:
    found = one(vector_deviation(row(1, 0), row(math.cos(small), math.sin(small))))
    assert found["cosine"] == pytest.approx(2 * math.sin(small / 2) ** 2, rel=1e-6)
    assert found["angle"] == pytest.approx(math.degrees(small), rel=1e-6)
    assert found["estimate"] == pytest.approx(found["cosine"], rel=1e-3)


def test_centred_rows_by_hand() -> None:
    found = one(vector_deviation(row(4, 2), row(103, 105), centred=True))  # (1, -1) against (-1, 1)
    assert found["cosine"] == pytest.approx(2.0) and found["norm"] == pytest.approx(1.0)
    shifted = one(vector_deviation(row(1, 2, 6), row(11, 12, 16), centred=True))
    assert shifted["cosine"] == shifted["orthogonal"] == 0.0


def test_rows_of_zeros() -> None:
    both = one(vector_deviation(row(0, 0), row(0, 0)))
    assert both == {"cosine": 0, "angle": 0, "norm": 1, "parallel": 0, "orthogonal": 0, "estimate": 0}
    gone = one(vector_deviation(row(1, 2), row(0, 0)))
    assert gone["cosine"] == 1 and gone["angle"] == pytest.approx(90) and gone["norm"] == 0 and gone["parallel"] == -1


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_very_small_and_very_large_rows(scale: float) -> None:
    found = one(vector_deviation(row(scale, 0), row(scale, scale)))
    assert found["cosine"] == pytest.approx(1 - math.sqrt(0.5)) and found["angle"] == pytest.approx(45)


def test_identical_is_exactly_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 301) * 9
    vector = vector_deviation(x, x.clone())
    assert {name for name, value in vector.items() if value.any()} == {"norm"} and bool((vector["norm"] == 1).all())
    for temperature in (0.3, 1.0, 2.0):
        found = probability_deviation(x, x.clone(), temperature)
        zero = set(PROBABILITY) - {"top1", "top5", "entropy", "entropy_pruned"}
        assert all(not found[name].any() for name in zero)
        assert bool((found["top1"] == 1).all()) and bool((found["top5"] == 1).all())
        assert torch.equal(found["entropy"], found["entropy_pruned"])


def bernoulli(p: float, q: float) -> tuple[Tensor, Tensor]:
    """Logits of (p, 1 - p) and of (q, 1 - q)."""
    return row(math.log(p), math.log1p(-p)), row(math.log(q), math.log1p(-q))


def test_two_outcomes_by_hand() -> None:
    p, q = 0.8, 0.5
    found = one(probability_deviation(*bernoulli(p, q)))
    m = (p + q) / 2
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    to_p = p * math.log(p / m) + (1 - p) * math.log((1 - p) / (1 - m))
    to_q = q * math.log(q / m) + (1 - q) * math.log((1 - q) / (1 - m))
    norm = math.hypot(p, 1 - p)
    delta = math.log(q / p) - math.log((1 - q) / (1 - p))
    expected = {
        "cosine": 1 - (p * q + (1 - p) * (1 - q)) / (norm * math.hypot(q, 1 - q)),
        "kl": kl,
        "kl_reverse": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
        "js": (to_p + to_q) / 2,
        "total_variation": p - q,
        "top1": 1.0,
        "top5": 1.0,
        "entropy": -p * math.log(p) - (1 - p) * math.log(1 - p),
        "entropy_pruned": math.log(2),
        "kl_estimate": p * (1 - p) * delta**2 / 2,
        "cosine_estimate": p**2 * (1 - p) ** 2 / norm**4 * delta**2 / 2,
        "change": math.sqrt(2) * (p - q) / norm,
        "change_estimate": math.sqrt(2) * p * (1 - p) * abs(delta) / norm,
        "change_bound": abs(delta) / math.sqrt(2) / (2 * norm),
    }
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_scaled_logit_vector(temperature: float) -> None:
    """softmax(c z) against softmax(z): KL = log Z(c) - log Z(1) - (c - 1) E_p z, with Z(c) = sum exp(c z / T)."""
    torch.manual_seed(1)
    z = torch.randn(1, 50, dtype=torch.float64) * 3
    c = 1.7
    scaled = z / temperature
    p = scaled.softmax(1)
    expected = float((c * scaled).logsumexp(1) - scaled.logsumexp(1) - (c - 1) * (p * scaled).sum(1))
    assert float(probability_deviation(z, c * z, temperature)["kl"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("small", [1e-2, 1e-4, 1e-6, 1e-8])
def test_nearly_equal_distributions_keep_their_digits(small: float) -> None:
    """Here KL is small^2 / 8 for p = (1/2, 1/2): what the sum of p log(p / q) has lost at 1e-8."""
    found = one(probability_deviation(row(0, 0), row(small, 0)))
    expected = math.log1p(2 * math.sinh(small / 4) ** 2)
    assert found["kl"] == pytest.approx(expected, rel=1e-6)
    assert found["kl_estimate"] == pytest.approx(expected, rel=max(small, 1e-6))
    assert found["js"] == pytest.approx(small**2 / 32, rel=max(small, 1e-4))
    assert found["cosine"] == pytest.approx(small**2 / 8, rel=max(small, 1e-4))
    assert found["change_estimate"] == pytest.approx(found["change"], rel=max(small, 1e-6))


def test_a_shift_of_all_logits_changes_nothing() -> None:
    torch.manual_seed(2)
    z = torch.randn(4, 33)
    found = probability_deviation(z, z + 5.0)
    assert float(found["kl"].max()) < 1e-12 and float(found["change_bound"].max()) < 1e-5


def test_distributions_apart_reach_the_limits() -> None:
    found = one(probability_deviation(row(0, -2000, -3000), row(-2000, 0, -3000)))
    assert found["js"] == pytest.approx(math.log(2)) and found["total_variation"] == pytest.approx(1)
    assert found["kl"] == pytest.approx(2000) and found["kl_reverse"] == pytest.approx(2000)
    assert found["cosine"] == pytest.approx(1) and found["top1"] == 0 and found["top5"] == 1


def test_the_bound_holds_and_the_estimate_is_below_it() -> None:
    torch.manual_seed(3)
    z, delta = torch.randn(200, 40) * 4, torch.randn(200, 40) * torch.logspace(-4, 1, 200)[:, None]
    for temperature in (0.5, 1.0, 2.0):
        found = probability_deviation(z, z + delta, temperature)
        assert bool((found["change"] <= found["change_bound"] * (1 + 1e-9)).all())
        assert bool((found["change_estimate"] <= found["change_bound"] * (1 + 1e-9)).all())
        near = slice(0, 40)
        assert torch.allclose(found["kl"][near], found["kl_estimate"][near], rtol=0.05)
        assert torch.allclose(found["cosine"][near], found["cosine_estimate"][near], rtol=0.05)


def test_rows_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    a, b = torch.randn(9, 20), torch.randn(9, 20)
    whole = probability_deviation(a, b)
    monkeypatch.setattr("pyprune.evaluation.analysis.deviation._BLOCK", 40)
    assert all(torch.equal(whole[name], value) for name, value in probability_deviation(a, b).items())
    order = torch.randperm(20)  # renaming tokens changes nothing
    for name, value in probability_deviation(a[:, order], b[:, order]).items():
        assert torch.allclose(value, whole[name]), name


def test_names() -> None:
    x = torch.randn(2, 6)
    assert tuple(vector_deviation(x, x)) == VECTOR and tuple(probability_deviation(x, x)) == PROBABILITY
    assert all(v.dtype == torch.float64 and v.shape == (2,) for v in probability_deviation(x, x).values())


def test_some_measures_are_those_of_all() -> None:
    a, b = torch.randn(3, 6), torch.randn(3, 6)
    whole = probability_deviation(a, b, 0.7)
    for name in PROBABILITY:
        (found,) = probability_deviation(a, b, 0.7, (name,)).values()
        assert torch.equal(found, whole[name]), name
    with pytest.raises(InputError, match=r"names must be .*; got 'kI'"):
        probability_deviation(a, b, names=("kI",))


@pytest.mark.parametrize("measure", [vector_deviation, probability_deviation])
def test_bad_input(measure: object) -> None:
    assert callable(measure)
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"pruned must be \(2, 3\), as dense is; got \(2, 4\)"):
        measure(x, torch.ones(2, 4))
    with pytest.raises(InputError, match=r"dense must be .T, D., not empty"):
        measure(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(InputError, match="pruned must be finite; got 'NaN or infinity'"):
        measure(x, x.clone().index_fill_(0, torch.tensor([1]), math.nan))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature must be above 0 and finite"):
        probability_deviation(torch.ones(1, 2), torch.ones(1, 2), temperature)
