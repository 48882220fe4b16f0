"""From a run's record to the parts of the loop. Beside `model.build` the only reader of configs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from contract.fit import check_fit
from contract.model import FixedProposals, KeypointBranch, MaskBranch, ModelConfig
from contract.recipe import RunConfig
from model.accelerate import accelerate
from model.build import build_detector
from model.weights import Loaded, load_initial
from pipelines.load.loader import EvalLoader, TrainLoader
from pipelines.load.proposals import ProposalTable
from pipelines.shards.dataset import Dataset, open_dataset
from workers.pretrained.weights import fresh_heads, initial_weights, weights_source
from workers.training.prefetch import registration
from workers.training.world import World


def open_datasets(run: RunConfig, cache: str) -> tuple[Dataset, Dataset]:
    """Training and validation data, checked against the model.

    Raises ValueError of one line. Everything that a person can get wrong about the data shows here,
    before the attempt takes the trial's folder.
    """
    train, val = (
        open_dataset(uri, cache, run.data.cache_gib) for uri in (run.data.train, run.data.val)
    )
    check_fit(run, train.manifest.header, val.manifest.header)
    val = val.aligned_with(train)
    trained, evaluated = train.for_training(run.data.filter), val.for_evaluation(run.data)
    # a missing image would otherwise fail in the middle of the training
    if isinstance(run.model.proposals, FixedProposals):
        table = ProposalTable(run.model.proposals.uri)
        table.check_covers(trained.image_ids())
        table.check_covers(evaluated.image_ids())
    return train, val


def initial_detector(
    run: RunConfig,
    device: torch.device | str = "cpu",
    tell: Callable[[Loaded], None] = lambda _: None,
) -> nn.Module:
    """The detector as training begins, on its device and with our kernels for it.

    tell: is called with what came from a file. Raises ValueError if its initial weights do not fit,
    with the field that names them.
    """
    # read first: a file that is not there is told before the seconds that a detector takes to build
    weights = initial_weights(run.model.weights, run.model.backbone)
    detector = build_detector(run.model, run.seed).to(device)
    accelerate(detector)
    if weights is not None:
        # its error knows the names of parameters, not the file that they are from
        try:
            tell(load_initial(detector, *weights, fresh_heads=fresh_heads(run.model.weights)))
        except ValueError as error:
            raise ValueError(f"{weights_source(run.model.weights)}: {error}") from error
    return detector


def train_loader_opener(
    run: RunConfig, dataset: Dataset, world: World
) -> Callable[[int], TrainLoader]:
    """Returns what opens this rank's share of the global batches, from a given one on."""
    register = registration(world.device)

    # a function, since a rollback opens the stream again at another step
    def open_loader(start_step: int) -> TrainLoader:
        keypoints = run.model.keypoints
        return TrainLoader(
            run.data,
            dataset,
            seed=run.seed,
            global_batch=run.loop.global_batch,
            rank=world.rank,
            world_size=world.size,
            max_images_per_forward=run.loop.max_images_per_forward,
            start_step=start_step,
            masks=isinstance(run.model.mask, MaskBranch),
            num_keypoints=keypoints.num_keypoints if isinstance(keypoints, KeypointBranch) else 0,
            proposals_uri=proposals_uri(run.model),
            register=register,
        )

    return open_loader


def eval_loader(run: RunConfig, dataset: Dataset, world: World) -> EvalLoader:
    """This rank's part of the validation images."""
    return EvalLoader(
        run.data,
        dataset,
        run.model.image,
        batch_size=run.loop.eval_batch,
        rank=world.rank,
        world_size=world.size,
        proposals_uri=proposals_uri(run.model),
        register=registration(world.device),
    )


def proposals_uri(model: ModelConfig) -> str:
    """Where fixed proposals are; empty for a model with an RPN."""
    return model.proposals.uri if isinstance(model.proposals, FixedProposals) else ""
