"""Decisions and rates as pure functions, and the guard at work in the loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from contract.recipe import SGD, AdamW, CosineSchedule, Guard, LoopConfig, OneCycle, StepSchedule
from tests.workers.fakes import FakeDetector, fake_trial, small_run
from workers.tracking.series import Row
from workers.training.evaluate import Scores
from workers.training.guard import GuardState, first_bad_step, rolled_back
from workers.training.loop import _guarded_loss, due
from workers.training.optim import base_rate, build_optimiser, rate_factor
from workers.training.step import apply_gradients
from workers.trial.errors import DivergedError


@pytest.mark.parametrize(
    ("every", "steps", "evaluated"),
    [
        (-1, 160_000, [40_000, 80_000, 120_000, 160_000]),
        (-1, 450, [113, 226, 339, 450]),  # at three quarters, and not twice near the end
        (-1, 120, [50, 100, 120]),
        (-1, 50, [50]),
        (0, 400, [400]),
        (150, 400, [150, 300, 400]),
        (900, 400, [400]),
    ],
)
def test_a_run_is_evaluated_four_times_unless_it_says_otherwise(every, steps, evaluated):
    loop = LoopConfig(steps=steps, eval_every_steps=every)
    assert [step for step in range(1, steps + 1) if due(loop, step).evaluation] == evaluated


def test_a_loss_that_is_not_finite_is_bad_from_the_first_step():
    _, bad = first_bad_step(Guard(), GuardState(), [1.0, math.nan, 1.0])
    assert bad == 1


def test_a_spike_is_bad_only_beside_a_mean_that_has_settled():
    state, bad = first_bad_step(Guard(), GuardState(), [1.0, 500.0, 1.0])
    assert bad is None
    state, bad = first_bad_step(Guard(), GuardState(), [1.0] * 30)
    assert (state.seen, bad) == (30, None)
    assert first_bad_step(Guard(), state, [1.0, 9.9])[1] is None
    assert first_bad_step(Guard(), state, [1.0, 10.5])[1] == 1


def test_losses_in_pieces_are_judged_as_at_once():
    losses = [1 + 0.1 * k for k in range(50)]
    whole, _ = first_bad_step(Guard(), GuardState(), losses)
    pieces = GuardState()
    for start in range(0, 50, 7):
        pieces, _ = first_bad_step(Guard(), pieces, losses[start : start + 7])
    assert pieces == whole


def test_rolling_back_skips_the_window_or_lowers_the_rate():
    now = GuardState(mean=9.0, seen=60, rollbacks=1, rate=0.5, skipped=10)
    saved = GuardState(mean=1.0, seen=40, skipped=10)
    assert rolled_back(Guard(), saved, now, 40, 60) == GuardState(1.0, 40, 2, 0.5, 30, 40)
    assert rolled_back(Guard(action="lower_rate"), saved, now, 40, 60) == GuardState(
        1.0, 40, 2, 0.25, 10, 40
    )


class Exploding(FakeDetector):
    """Its loss is not finite on the global batches `bad`."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, batch):  # type: ignore[no-untyped-def]
        self.scale = math.nan if int(batch.sample_ids[0]) // 100 in self.bad else 1.0
        return super().forward(batch)


def test_the_loop_rolls_back_skips_the_window_and_says_so(tmp_path):
    trial = fake_trial(tmp_path, small_run(), detector=Exploding({5}))
    assert trial.ending.state == "done"
    assert trial.state.guard.rollbacks == 1
    assert trial.state.data_step == 12 + trial.state.guard.skipped
    [event] = trial.journal.events
    assert (event.kind, event.step) == ("rollback", 6)
    assert "sample ids [500, 501" in event.text
    assert all(torch.isfinite(p).all() for p in trial.state.trained)


@pytest.mark.parametrize(("keep", "places"), [(3, [8, 4]), (1, [8, 8])])
def test_a_checkpoint_that_leads_astray_again_is_left_for_the_one_before(tmp_path, keep, places):
    run = small_run(keep_checkpoints=keep, guard={"max_rollbacks": 2})
    trial = fake_trial(
        tmp_path, run, detector=Exploding({8, 10})
    )  # 8 and 9 are passed over, then comes 10
    assert (trial.ending.state, trial.state.guard.rollbacks) == ("done", 2)
    assert [
        event.text.rpartition("back to step ")[2].partition(",")[0]
        for event in trial.journal.events
    ] == [str(place) for place in places]


def test_the_best_score_outlives_a_rollback(tmp_path):
    def evaluate(now, stopping):  # type: ignore[no-untyped-def]
        now.best = max(now.best, 0.9 if now.step == 4 else 0.5)
        return Scores({"bbox/AP": now.best}, {}, {})

    run = small_run(eval_every_steps=4)
    trial = fake_trial(
        tmp_path, run, detector=Exploding({5}), evaluate=evaluate
    )  # back to 4, saved before its score
    assert (trial.state.guard.rollbacks, trial.state.guard.returned_to, trial.state.best) == (
        1,
        4,
        0.9,
    )


class BreakingGradients(Exploding):
    """Its loss is finite on the global batches `bad`, its gradients are not."""

    def forward(self, batch):  # type: ignore[no-untyped-def]
        terms = super().forward(batch)
        bad, self.scale = math.isnan(self.scale), 1.0
        if bad:
            terms = FakeDetector.forward(self, batch)
            zero = self.head.weight.sum() * 0
            terms["common"] = replace(terms["common"], sum=terms["common"].sum + zero.sqrt())
        return terms


@pytest.mark.parametrize("bad", [2, 3])  # 3 is the last batch before a checkpoint
def test_gradients_that_are_not_finite_roll_back_and_reach_no_checkpoint(tmp_path, bad):
    trial = fake_trial(
        tmp_path,
        small_run(log_every_steps=4, keep_checkpoints=9),
        detector=BreakingGradients({bad}),
    )
    assert (trial.ending.state, trial.state.guard.rollbacks) == ("done", 1)
    [event] = trial.journal.events
    assert (event.step, "gradient norm nan" in event.text) == (bad + 1, True)
    saved = [
        torch.load(path, weights_only=True)["detector"]
        for path in tmp_path.glob("checkpoints/*/state.pt")
    ]
    assert len(saved) == 3
    assert all(torch.isfinite(value).all() for weights in saved for value in weights.values())


def test_with_fp16_gradients_that_are_not_finite_are_left_to_the_scaler():
    row = Row(1, {"loss": 2.0, "grad_norm": math.inf})
    assert _guarded_loss(row, LoopConfig(precision="fp16")) == 2.0
    assert math.isnan(_guarded_loss(row, LoopConfig()))


def test_a_loss_that_was_never_good_begins_again_from_the_start(tmp_path):
    trial = fake_trial(tmp_path, small_run(), detector=Exploding({0}))
    assert (trial.ending.state, trial.state.guard.rollbacks, trial.state.guard.skipped) == (
        "done",
        1,
        2,
    )


def test_the_guard_gives_up_with_step_samples_and_losses(tmp_path):
    run = small_run(guard={"max_rollbacks": 2})
    with pytest.raises(
        DivergedError, match=r"step 5 after 2 rollbacks .*common nan.*sample ids \[800"
    ):
        fake_trial(tmp_path, run, detector=Exploding(set(range(5, 40))))


def test_step_schedule_warms_up_and_drops():
    cfg = StepSchedule(drop_steps=(100, 200), warmup_steps=10, warmup_factor=0.1)
    factors = [rate_factor(cfg, step, 300) for step in (0, 5, 10, 99, 100, 200)]
    assert factors == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.01])


def test_cosine_and_one_cycle_meet_their_ends():
    cosine = CosineSchedule(warmup_steps=0, final_factor=0.1)
    assert [rate_factor(cosine, step, 100) for step in (0, 50, 100)] == pytest.approx(
        [1, 0.55, 0.1]
    )
    cycle = OneCycle(rise=0.25, start_factor=0.04, final_factor=0.0)
    assert [rate_factor(cycle, step, 400) for step in (0, 50, 100, 250, 400)] == pytest.approx(
        [0.04, 0.52, 1, 0.5, 0]
    )


def test_the_rate_scales_with_the_batch_only_on_request():
    assert base_rate(SGD(lr=0.02), 4) == 0.02
    assert base_rate(SGD(lr=0.02, lr_batch=16), 4) == pytest.approx(0.005)


@pytest.mark.parametrize(
    "cfg", [SGD(weight_decay=0.1, norm_weight_decay=0.0), AdamW(weight_decay=0.1)]
)
def test_normalisation_layers_have_a_decay_of_their_own(cfg):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    module[0].bias.requires_grad_(False)
    groups = build_optimiser(cfg, module).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (2, 0.0)]


def test_biases_may_train_faster_and_without_decay():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 1))
    cfg = SGD(weight_decay=0.1, norm_weight_decay=0.0, bias_lr_factor=2.0, bias_decay_factor=0.0)
    optimiser = build_optimiser(cfg, module)
    groups = optimiser.param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.1), (2, 0.0), (2, 0.0)]
    assert groups[2]["params"][0] is module[0].bias
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    scaler = torch.amp.GradScaler(enabled=False)
    bias, scale = module[2].bias.item(), module[1].bias[0].item()
    apply_gradients(list(module.parameters()), optimiser, scaler, rate=0.5, clip_norm=0.0)
    assert [g["lr"] for g in groups] == [0.5, 0.5, 1.0]
    assert module[2].bias.item() == pytest.approx(bias - 1.0)
    assert module[1].bias[0].item() == pytest.approx(scale - 0.5)


class Greedy(FakeDetector):
    def forward(self, batch):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_running_out_of_memory_names_the_shapes_and_what_to_change(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"images of 6x3x8x8; lower loop\.max_images_per_forward"
    ):
        fake_trial(tmp_path, small_run(), detector=Greedy())
