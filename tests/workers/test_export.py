"""`maskray export`: what it tells of the other library's settings."""

from __future__ import annotations

from pathlib import Path

from contract.presets import preset
from workers.export import detectron2_code


def test_the_config_of_detectron2_has_what_its_proposals_go_by():
    cfg = preset("r50-fpn-detectron2")
    rpn = cfg.rpn.model_copy(update={"nms_iou": 0.6, "min_side_px": 4.0})
    code = detectron2_code(cfg.model_copy(update={"rpn": rpn}), Path("d2.pth"))
    assert "cfg.MODEL.RPN.NMS_THRESH = 0.6" in code
    assert "cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 4.0" in code
