"""`python -m workers.export RUN|WEIGHTS --to FORM --out FILE`: weights for other programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contract.command import SUCCESS, add_output_options, run_command
from workers.inference.arguments import add_trained_arguments

if TYPE_CHECKING:
    from contract.model import ModelConfig
    from workers.inference.trained import Trained

_FORMS = ("torchvision", "detectron2", "program", "torchscript")
_SUFFIX = {"torchvision": ".pth", "detectron2": ".pth", "program": ".pt2"}


def main(argv: Sequence[str]) -> int:
    return run_command(lambda: _export(_parser().parse_args(argv)), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskray export",
        description="Writes a trained detector for other programs: a state dict by the names of "
        "torchvision or detectron2, or a program of torch.export for images of one size.",
    )
    add_trained_arguments(parser)
    parser.add_argument("--to", choices=_FORMS, required=True, help="what to write")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--size", metavar="HxW", default="", help="of the images that a program takes: 480x640"
    )
    add_output_options(parser)
    return parser


def _export(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if arguments.to == "torchscript":
        raise ValueError(
            "--to torchscript: torch.jit neither scripts nor traces this detector, whose parts are "
            "chosen by records; --to program writes what torch.export makes, for C++ and Python"
        )
    if out.suffix != _SUFFIX[arguments.to]:
        raise ValueError(f"--out {out}: give a file that ends in {_SUFFIX[arguments.to]}")
    size = _size(arguments.size) if arguments.to == "program" else (0, 0)
    if arguments.size and arguments.to != "program":
        raise ValueError(f"--size has no effect with --to {arguments.to}; leave it out")
    from workers.inference.trained import load_trained

    trained = load_trained(
        arguments.trained, arguments.weights, arguments.config, accelerated=False
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    words = (
        _program(trained, size, out) if arguments.to == "program" else _state(trained, arguments)
    )
    names = [category.name for category in trained.categories]
    if arguments.json:
        print(json.dumps({"out": str(out), "to": arguments.to, "use": words, "classes": names}))
    else:
        print(f"{out}: from {trained.source}\n{words}")
    return SUCCESS


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise ValueError(
            f"--size {text or '(not given)'}: a program takes images of one size; give --size HxW "
            "such as 480x640"
        )
    return int(height), int(width)


def _program(trained: Trained, size: tuple[int, int], out: Path) -> str:
    import torch

    from model.export import ImageProgram

    image = torch.zeros((3, *size), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(ImageProgram(trained.detector), (image,))
    torch.export.save(program, out)
    return (
        "import torch, torchvision\n"
        f"boxes, scores, labels, valid, *more = torch.export.load({str(out)!r}).module()(image)\n"
        f"# image: uint8 RGB (3, {size[0]}, {size[1]}); valid marks what is no padding"
    )


def _state(trained: Trained, arguments: argparse.Namespace) -> str:
    import torch

    from model.export import to_detectron2, to_torchvision

    cfg, out = trained.model, arguments.out
    if arguments.to == "torchvision":
        torch.save(to_torchvision(cfg, trained.detector), out)
        return _torchvision_code(trained, out)
    state = to_detectron2(cfg, trained.detector)
    torch.save({"model": state, "__author__": "maskray", "matching_heuristics": False}, out)
    return detectron2_code(cfg, out)


def _torchvision_code(trained: Trained, out: Path) -> str:
    """The lines that build torchvision's detector with these weights."""
    cfg = trained.model
    assert cfg.backbone.kind == "resnet"
    kind = {"mask": "MaskRCNN", "none": "FasterRCNN"}[cfg.mask.kind]
    more = ""
    if cfg.keypoints.kind == "keypoints":
        kind, more = "KeypointRCNN", f"num_keypoints={cfg.keypoints.num_keypoints}, "
    mean, std = ([round(v / 255, 9) for v in three] for three in (cfg.image.mean, cfg.image.std))
    options = (
        f"num_classes={cfg.num_classes + 1}, {more}"
        f"min_size={cfg.image.short_side_px}, max_size={cfg.image.max_side_px}, "
        f"image_mean={mean}, image_std={std}, "
        f"rpn_pre_nms_top_n_test={cfg.rpn.pre_nms_test}, "
        f"rpn_post_nms_top_n_test={cfg.rpn.post_nms_test}, rpn_nms_thresh={cfg.rpn.nms_iou}, "
        f"box_score_thresh={cfg.inference.score_threshold}, "
        f"box_nms_thresh={cfg.inference.nms_iou}, "
        f"box_detections_per_img={cfg.inference.detections_per_image}"
    )
    lines = [
        "import torch",
        f"from torchvision.models.detection import {kind}",
        "from torchvision.models.detection.backbone_utils import resnet_fpn_backbone",
        f'backbone = resnet_fpn_backbone(backbone_name="resnet{cfg.backbone.depth}", weights=None)',
        f"model = {kind}(backbone, {options})",
        f"model.load_state_dict(torch.load({str(out)!r}))",
        "model.eval()",
    ]
    return "\n".join(lines)


def detectron2_code(cfg: ModelConfig, out: Path) -> str:
    """The lines of a config under which detectron2 computes with these weights what we do."""
    assert cfg.backbone.kind == "resnet"
    values = {
        "MODEL.WEIGHTS": str(out),
        "MODEL.RESNETS.DEPTH": cfg.backbone.depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": cfg.backbone.stride_in_1x1,
        "MODEL.PIXEL_MEAN": list(cfg.image.mean),
        "MODEL.PIXEL_STD": list(cfg.image.std),
        "INPUT.FORMAT": cfg.image.channels.upper(),
        "INPUT.MIN_SIZE_TEST": cfg.image.short_side_px,
        "INPUT.MAX_SIZE_TEST": cfg.image.max_side_px,
        "MODEL.MASK_ON": cfg.mask.kind == "mask",
        "MODEL.KEYPOINT_ON": cfg.keypoints.kind == "keypoints",
        "MODEL.ROI_HEADS.NUM_CLASSES": cfg.num_classes,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": cfg.inference.score_threshold,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": cfg.inference.nms_iou,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": cfg.rpn.pre_nms_test,
        "MODEL.RPN.POST_NMS_TOPK_TEST": cfg.rpn.post_nms_test,
        "MODEL.RPN.NMS_THRESH": cfg.rpn.nms_iou,
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": cfg.rpn.min_side_px,
        "TEST.DETECTIONS_PER_IMAGE": cfg.inference.detections_per_image,
    }
    if cfg.keypoints.kind == "keypoints":
        values["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = cfg.keypoints.num_keypoints
    start = (
        "COCO-Keypoints/keypoint"
        if cfg.keypoints.kind == "keypoints"
        else "COCO-InstanceSegmentation/mask"
    )
    lines = [f"# a config on top of {start}_rcnn_R_50_FPN_1x.yaml"]
    return "\n".join(lines + [f"cfg.{name} = {value!r}" for name, value in values.items()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
