"""Slopes and best rates, from made-up results."""

import math
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config.load import load_run
from crystal_hpc.mup_check import figures, page


def measured(mup: bool, width: int, exponent: float) -> dict[str, Any]:
    sizes = {"logits": [0.0, 3 * width**exponent], "embedding": [0.0, 0.5]}
    return {"kind": "coordinates", "mup": mup, "width": width, "changes": sizes}


def trained(mup: bool, width: int, rate: float, loss: float | None) -> dict[str, Any]:
    return {"kind": "transfer", "mup": mup, "width": width, "rate": rate, "loss": loss}


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0])
def test_the_slope_of_a_power_law_is_its_exponent(exponent: float) -> None:
    assert figures.slope({width: 7 * width**exponent for width in (64, 128, 1024)}) == pytest.approx(exponent)


@pytest.mark.parametrize("values", [{64: 1.0}, {64: 1.0, 128: 0.0}, {64: 1.0, 128: None}])
def test_there_is_no_slope_of_one_width_or_of_what_is_zero_or_not_a_number(values: dict[float, float | None]) -> None:
    assert figures.slope(values) is None


def test_flat_and_growing_are_told_apart() -> None:
    results = [measured(mup, width, 0.1 if mup else 1.0) for mup in (True, False) for width in (128, 64, 256)]
    assert figures.extremes(results, True) == pytest.approx((0.0, 0.1))
    assert figures.extremes(results, False) == pytest.approx((0.0, 1.0))
    told = page.tell_coordinates(results)
    assert "muP: flat; slopes from +0.00 to +0.10 (flat: within 0.3)" in told
    assert "standard: not flat; slopes from +0.00 to +1.00 (flat: within 0.3)" in told


def test_an_activation_that_is_no_longer_a_number_is_not_flat() -> None:
    results = [measured(True, width, 0.0) for width in (64, 128)]
    results[1]["changes"]["logits"][1] = None
    assert math.isnan(figures.extremes(results, True)[1])
    assert any(line.startswith("muP: not flat") for line in page.tell_coordinates(results))


def test_of_what_has_diverged_nothing_is_drawn_and_the_drawing_and_the_verdict_say_so() -> None:
    results = [measured(mup, width, 0.5) for mup in (True, False) for width in (64, 128, 256)]
    results[0]["changes"]["logits"][1] = None
    results[4]["changes"]["embedding"][1] = 0.0
    assert page.tell_coordinates(results)[-2:] == [
        "muP: not flat; diverged: width 64", "standard: not flat; no change at all: embedding"
    ]  # fmt: skip
    drawing = page.draw_coordinates(results)
    assert all(said in drawing for said in ("diverged: width 64", "no change at all: embedding"))
    assert "nan" not in drawing
    titles = [one for one in drawing.split("<title>")[1:] if one.startswith(("logits", "embedding"))]
    assert len(titles) == 3 + 3 + 3 + 3 - 2
    # The narrowest width that there is has become the one that the others are multiples of.
    assert titles[0].startswith("logits, 128: 0<")
    assert titles[1].startswith("logits, 256: 0.5<")


def test_what_is_far_above_is_led_to_out_of_the_plot_and_what_diverged_is_named() -> None:
    results = [trained(mup, 64, rate, 1.0 + rate) for mup in (True, False) for rate in (0.1, 0.2, 0.4)]
    results += [trained(True, 64, 0.8, 50.0), trained(False, 64, 0.8, None)]
    drawing = page.draw_transfer(results)
    with_mup, without = (part.partition('"')[0] for part in drawing.split(' clip-path="url(#plot)" d="')[1:])
    assert (with_mup.count("L"), without.count("L")) == (3, 2)
    assert float(with_mup.rpartition(",")[2]) < 0, "the line ends above the drawing"
    assert "diverged: width 64 at 0.8" in drawing
    assert "width 64, 0.8" not in drawing


def test_the_page_is_one_document(tmp_path: Path, narrow_file: Path) -> None:
    results = [measured(mup, width, 1.0) for mup in (True, False) for width in (64, 128)]
    page.write_page(tmp_path, load_run(narrow_file), results)
    content = (tmp_path / "report.html").read_text()
    assert content.startswith("<!DOCTYPE html>")
    assert (content.count("<!DOCTYPE"), content.count("<style>"), content.count("</style>")) == (1, 1, 1)


def test_the_best_rate_is_that_of_the_least_loss_and_its_transfer_costs_what_it_costs() -> None:
    results = [trained(True, 64, 0.1, 3.0), trained(True, 64, 0.2, 2.0), trained(True, 64, 0.4, None)]
    results += [trained(True, 128, 0.1, 1.0), trained(True, 128, 0.2, 1.5), trained(True, 256, 0.1, 0.5)]
    results += [trained(True, 256, 0.2, None)]
    best = figures.best_rates(results, True)
    assert best == {
        64: figures.Best(0.2, 2.0, 2.0), 128: figures.Best(0.1, 1.0, 1.5), 256: figures.Best(0.1, 0.5, None)
    }  # fmt: skip
    assert page.tell_transfer(results)[-1].split() == ["muP", "256", "0.1", "0.500", "diverged"]


def test_a_drawing_is_valid_xml_with_a_curve_for_each_activation_and_each_width() -> None:
    from xml.etree import ElementTree

    both = (True, False)
    coordinates = [measured(mup, width, 1.0) for mup in both for width in (64, 128)]
    transfer = [trained(mup, width, rate, 1 / rate) for mup in both for width in (64, 128) for rate in (1.0, 2.0, 4.0)]
    for drawing in (page.draw_coordinates(coordinates), page.draw_transfer(transfer)):
        lines = [one for one in ElementTree.fromstring(drawing).iter() if "line" in one.get("class", "").split()]
        assert len(lines) == 4
        assert all(line.get("d", "").startswith("M") for line in lines)
        assert "nan" not in drawing
