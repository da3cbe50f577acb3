"""A run with fill-in-the-middle: the same rows and losses after an interruption and under every layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Order, Ranks, look_in_step

from crystal_hpc import files
from crystal_hpc.report.ledger import check_ledger

FIM = "phases.code.fim={code: {rate: 0.9, loss: middle}, prose: {rate: 0.5, level: token, spm_variant: 1}}"
CODE = slice(5, 9)  # the steps of the phase that has it


def test_a_run_with_fim_goes_on_with_the_same_rows_and_its_ledger_proves_it(
    one: Ranks, new_run: Callable[..., Path]
) -> None:
    plain, whole = one.train(Order(new_run("plain"))), one.train(Order(new_run("whole", FIM)))
    folder = new_run("parted", FIM)
    first = one.train(Order(folder, signal_at_look=look_in_step(7)))
    rest = one.train(Order(folder))
    assert (len(first.losses), len(rest.losses)) == (7, 5)
    assert first.digests + rest.digests == whole.digests
    assert first.losses + rest.losses == whole.losses
    for name, weights in whole.weights.items():
        np.testing.assert_array_equal(rest.weights[name], weights, err_msg=name)
    assert "12 steps, 96 samples: each read once, as planned" in check_ledger(folder)
    assert whole.digests[:5] + whole.digests[9:] == plain.digests[:5] + plain.digests[9:]
    assert not set(whole.digests[CODE]) & set(plain.digests[CODE])
    assert whole.losses[5] < 0.8 * plain.losses[5], "positions that do not train count in the mean, as zero"
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text().replace("rate: 0.9", "rate: 0.1"))
    with pytest.raises(Exception, match="phase code read other rows"):
        check_ledger(folder)


@pytest.mark.parametrize("layout", ["parallel.tensor=1", "parallel.tensor=2", "parallel.pipeline=2"])
def test_masked_losses_agree_under_every_layout(
    one: Ranks, two: Ranks, new_run: Callable[..., Path], layout: str
) -> None:
    look = look_in_step(8)
    alone = one.train(Order(new_run("alone", FIM), signal_at_look=look))
    seen = two.train(Order(new_run("layout", FIM, layout), signal_at_look=look))
    np.testing.assert_allclose(seen.losses, alone.losses, rtol=5e-6)  # for why, see test_layouts
    assert seen.digests == alone.digests


def test_a_mask_takes_labels_out_of_the_loss_and_its_gradient_but_not_out_of_the_mean() -> None:
    from crystal_hpc.model.loss import mean_loss

    losses = torch.tensor([[1.0, 2.0], [4.0, 8.0]], requires_grad=True)
    loss, reported = mean_loss(losses, torch.tensor([[True, False], [True, True]]))
    loss.backward()
    assert loss.item() == reported["loss"].item() == 13 / 4
    assert losses.grad is not None and losses.grad.tolist() == [[0.25, 0.0], [0.25, 0.25]]
    assert mean_loss(losses)[0].item() == 15 / 4


def test_training_on_published_rows_reads_their_masks(one: Ranks, new_run: Callable[..., Path], tmp_path: Path) -> None:
    import h5py

    ids = np.random.default_rng(1).integers(3, 500, (50, 3, 16), np.int32)
    ids[:, 1] = 0
    (tmp_path / "rows").mkdir()
    with h5py.File(tmp_path / "rows" / "data-00000.h5", "w") as file:
        file.create_dataset("data", data=ids, compression="gzip")
    folder = new_run("published", f"data.sources.code={tmp_path / 'rows'}")
    seen = one.train(Order(folder))
    assert len(seen.losses) == 12 and seen.losses[9:] == [0.0, 0.0, 0.0], "nothing of `code` counts"
    assert "each read once, as planned" in check_ledger(folder)
    assert len(list(files.read_lines(folder / "metrics.jsonl"))) == 12
