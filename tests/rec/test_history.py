"""What a checkpoint says of its epochs: as it was written, or refused by what is wrong with it."""

import math

import pytest
import torch

from saml_rec.errors import InputError
from saml_rec.training import TrainOptions, best_epoch, is_cut_off, stopped_by
from saml_rec.training.history import Begun, check_history, is_number, stacked

pytestmark = pytest.mark.cpu

BEGUN = {
    "losses": torch.tensor([0.5, 0.25]),
    "weights": [64.0, 8],
    "seconds": 1.5,
    "random": {"cpu": torch.get_rng_state()},
}


def entry(epoch=1, logloss=0.5, **changes):
    valid = {"logloss": logloss, "auc": None if logloss is None else 0.6}
    times = {"train_loss": 0.7, "seconds": 2.0, "rows_per_second": 10}
    return {"epoch": epoch, "valid": valid, **times} | changes


def test_an_epoch_that_was_begun_is_read_as_it_was_written():
    begun = Begun.from_dict(BEGUN)
    assert begun.steps == 2
    assert begun.losses == [torch.tensor(0.5), torch.tensor(0.25)]
    written = begun.to_dict()
    assert torch.equal(written.pop("losses"), BEGUN["losses"])
    assert written == {name: part for name, part in BEGUN.items() if name != "losses"}
    assert Begun.from_dict(BEGUN | {"weights": [0.5, 0]}).weights == [0.5, 0]
    # A checkpoint just after an epoch's start.
    empty = Begun.from_dict(BEGUN | {"losses": torch.empty(0), "weights": [], "seconds": 0.0})
    assert (empty.steps, empty.to_dict()["losses"].shape) == (0, (0,))


WEIGHTS = "the weights of the epoch that was begun must be finite numbers of at least 0"
SECONDS = "the seconds of the epoch that was begun must be a finite number of at least 0"
NO_VECTOR = "the losses of the epoch that was begun are no vector"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [0.5, 0.25]}, NO_VECTOR),
        ({"losses": torch.ones(2, 1)}, NO_VECTOR),
        ({"losses": torch.ones(2, dtype=torch.int64)}, NO_VECTOR),
        ({"losses": torch.ones(3)}, "the epoch that was begun has 3 losses of 2 steps"),
        ({"weights": (64.0, 8)}, WEIGHTS),
        ({"weights": [64.0, "8"]}, WEIGHTS),
        ({"weights": [64.0, None]}, WEIGHTS),
        ({"weights": [64.0, -1.0]}, WEIGHTS),
        ({"weights": [64.0, math.nan]}, WEIGHTS),
        ({"weights": [64.0, True]}, WEIGHTS),
        ({"seconds": "1"}, SECONDS),
        ({"seconds": math.inf}, SECONDS),
        ({"seconds": -0.5}, SECONDS),
    ],
)
def test_an_epoch_that_nobody_began(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        Begun.from_dict(BEGUN | changes)


@pytest.mark.parametrize("random", [{}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": "x"}, None])
def test_random_numbers_that_are_none(random):
    before = torch.get_rng_state()
    with pytest.raises((KeyError, RuntimeError, TypeError)):
        Begun.from_dict(BEGUN | {"random": random})
    assert torch.equal(torch.get_rng_state(), before)


def test_the_random_state_is_not_set_by_reading():
    before = torch.get_rng_state()
    Begun.from_dict(BEGUN | {"random": {"cpu": torch.Generator().manual_seed(9).get_state()}})
    assert torch.equal(torch.get_rng_state(), before)


def test_histories_as_training_writes_them():
    check_history([])
    check_history([entry(1), entry(2, seconds=3)])
    check_history([entry(1, None)])


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {},
        entry(epoch=1),
        entry(2, train_loss=math.nan),
        entry(2, seconds=None),
        entry(2, rows_per_second="10"),
        entry(2, valid=None),
        entry(2, valid={"logloss": 0.5}),
        entry(2, valid={"logloss": "0.5", "auc": 0.5}),
        entry(2, valid={"logloss": 0.5, "auc": True}),
    ],
)
def test_histories_that_training_does_not_write(wrong):
    with pytest.raises(InputError, match=r"^entry 2 of the history is not as training writes it$"):
        check_history([entry(1), wrong])


@pytest.mark.parametrize("value", [True, "1", None, math.nan, -math.inf, [1], torch.ones(())])
def test_no_finite_number(value):
    assert not is_number(value)


def test_the_best_epoch_and_what_ends_training():
    options = TrainOptions(epochs=4, patience=2)
    for losses, best, ends, cut_off in (
        ([], 0, None, False),
        ([3], 1, None, False),
        ([3, 2, 2, 2], 2, "patience", False),
        ([3, 2, 2.5], 2, None, False),
        ([3, 2, 1, 0.5], 4, "epochs", True),
        ([1, 3, 0.5, 0.75], 3, "epochs", False),
        ([None] * 3, 3, None, False),
        ([None] * 4, 4, "epochs", False),
    ):
        history = [entry(epoch, loss) for epoch, loss in enumerate(losses, 1)]
        assert (best_epoch(history), stopped_by(history, options)) == (best, ends), losses
        assert is_cut_off(history, options) == cut_off
    assert stopped_by([entry(1), entry(2), entry(3)], TrainOptions(epochs=4, patience=0)) is None
    once = TrainOptions(epochs=1, patience=1)
    assert [is_cut_off([entry(1, loss)], once) for loss in (None, 0.5)] == [False, True]
    assert stopped_by([entry(1), entry(2)], TrainOptions(epochs=4, patience=1)) == "patience"
    fitted = TrainOptions(model="logistic_regression")
    assert (stopped_by([], fitted), stopped_by([entry(1)], fitted)) == (None, "fit")


def test_losses_of_no_step():
    assert stacked([]).shape == (0,)
    assert stacked([torch.tensor(1.0)]).tolist() == [1.0]
